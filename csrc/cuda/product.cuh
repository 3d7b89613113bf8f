// y = W x + b on one block, and how the matrices lie for it.
//
// A matrix is packed in vectors of 16 bytes, four outputs of one input (or of two in bfloat16), so neighbouring lanes read
// neighbouring vectors. Its inputs are cut into slices of `depth`; a lane takes four outputs of one slice for all Q rows, so
// each weight is read once; the slices' sums meet in shared memory and are added in order. Depth depends on the model
// alone, so a row's bits depend on neither Q nor the rows beside it. The products that can be done at once make up a phase:
// a run of jobs in a table that the host fills in, so that one piece of code, and no division, serves all of them.
#pragma once
#include "device.cuh"
#include "../math/activation.h"
#include "../ops.h"

namespace sage::cuda {

constexpr int kTile = 4;  // outputs and inputs that a lane multiplies at a time
constexpr int kWarpBits = 5;
__host__ __device__ __forceinline__ int tiled(int64_t n) { return int((n + kTile - 1) / kTile * kTile); }

// -------------------------------------------------------------------------------------------------------- the host's part
// Vectors of 16 bytes: four outputs of one input, or of two in bfloat16, one input after another.
template <class T>
struct Vectors {
  static size_t bytes(int64_t inputs, int64_t outputs) {
    return size_t(tiled(inputs)) * size_t(tiled(outputs)) * sizeof(T);
  }
  static void write(const float* from, int64_t inputs, int64_t outputs, void* memory) {
    constexpr int P = kVector<T> / kTile;
    T* to = static_cast<T*>(memory);
    for (int64_t k = 0; k < tiled(inputs); k += P)
      for (int64_t n = 0; n < tiled(outputs); n += kTile)
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < kTile; ++j)
            narrow(k + i < inputs && n + j < outputs ? from[(n + j) * inputs + k + i] : 0.0f, *to++);
  }
};

// Division by a number that is known when a session is planned, of x with x * by < 2^32.
struct Divisor {
  unsigned by, magic;  // ceil(2^32 / by); 0 for 1

  Divisor(int n = 1) : by(unsigned(n)), magic(n == 1 ? 0 : 0xffffffffu / unsigned(n) + 1) {}
  __device__ __forceinline__ int quotient(int x) const {
    return magic ? int(uint64_t(unsigned(x)) * magic >> 32) : x;
  }
};

enum class Activation : int { none, silu, gelu, tanh };
enum class Store : int { set, add, subtract };

// y = activation(W x + b) of some rows, as the block's threads read it: everything that they would have to work out is worked
// out when the session is planned. Rows lie in shared memory, at offsets in floats from its first float.
struct alignas(16) Job {
  const void* weight;
  const float* bias;
  int x, x_stride, y, y_stride;
  int mask;  // int: row r's result is 0 where number r kMaxModalities from here on is 0; below 0: there is no mask
  Activation activation;
  Store store;
  int outputs, inputs;    // whole tiles of inputs
  int depth, slices;      // inputs of a slice; slices
  int tasks, lane_bits;   // of one warp each: 2^lane_bits quads of neighbouring outputs of several slices
  Divisor columns, wide;  // tasks side by side that cover all outputs; outputs, in whole quads
};

// How a product of some depth is shared out over warps; returns the tasks, one warp's work each.
inline int share_out(Job& f, int depth) {
  const int quads = int(f.wide.by) / kTile;
  f.lane_bits = 0;
  while ((1 << f.lane_bits) < quads && (1 << f.lane_bits) < kWarp) ++f.lane_bits;
  const int columns = (quads + (1 << f.lane_bits) - 1) >> f.lane_bits,
            slices = kWarp >> f.lane_bits;  // of a task
  f.columns = Divisor(columns);
  f.depth = depth;
  f.slices = (f.inputs + depth - 1) / depth;
  return f.tasks = columns * ((f.slices + slices - 1) / slices);
}

// ------------------------------------------------------------------------------------------------------- the block's part
// An address out of a table, of which the compiler cannot know that it is not one of shared memory.
template <class T>
__device__ __forceinline__ const T* in_global(const T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Four inputs' weights of four outputs: w[input][output].
template <class T>
__device__ __forceinline__ void load_tile(const T* at, int64_t step, float (&w)[kTile][kTile]) {
  constexpr int V = kVector<T>, P = V / kTile;  // inputs of a vector
#pragma unroll
  for (int v = 0; v < kTile / P; ++v) load_vector<T>(at + v * step, V, true, w[v * P]);
}

// The slices' sums of Q rows from `first` on, of all jobs; rows past the last repeat it.
template <class T, int Q>
__device__ __forceinline__ void multiply(float* shared, float* part, const Job* jobs, int count, int first,
                                         int rows) {
  constexpr int P = kVector<T> / kTile, kTiles = Q <= 3 ? 2 : 1;  // tiles whose weights are asked for at once
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  int task = int(threadIdx.x) / kWarp;
#pragma unroll 1
  for (const Job* job = jobs; job < jobs + count; ++job) {
    const Job& f = *job;
    const int wide = int(f.wide.by), quads = wide / kTile;
#pragma unroll 1
    for (; task < f.tasks; task += warps) {
      const int group = f.columns.quotient(task), column = task - group * int(f.columns.by);
      const int slice = (group << (kWarpBits - f.lane_bits)) + (lane >> f.lane_bits);
      const int quad = (column << f.lane_bits) + (lane & ((1 << f.lane_bits) - 1));
      if (slice >= f.slices || quad >= quads) continue;
      float sum[Q][kTile];
#pragma unroll
      for (int n = 0; n < kTile; ++n) sum[0][n] = 0;
      if (slice == 0) load_vector<float>(in_global(f.bias) + quad * kTile, kTile, true, sum[0]);
#pragma unroll
      for (int q = 1; q < Q; ++q)
#pragma unroll
        for (int n = 0; n < kTile; ++n) sum[q][n] = sum[0][n];
      const int begin = slice * f.depth, end = begin + f.depth < f.inputs ? begin + f.depth : f.inputs;
      const int64_t step = int64_t(wide) * P;  // numbers from vector to vector of a lane
      const T* at = in_global(static_cast<const T*>(f.weight)) + int64_t(begin) * wide + quad * P * kTile;
      const float* x[Q];
#pragma unroll
      for (int q = 0; q < Q; ++q)
        x[q] = shared + f.x + (first + q < rows ? first + q : rows - 1) * f.x_stride;
#pragma unroll 1
      for (int k = begin; k < end; k += kTiles * kTile) {
        float w[kTiles][kTile][kTile];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          if (t == 0 || k + t * kTile < end) load_tile<T>(at + t * step * (kTile / P), step, w[t]);
        at += step * (kTiles * kTile / P);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t && k + t * kTile >= end) break;
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            float v[kTile];
            load_vector<float>(x[q] + k + t * kTile, kTile, true, v);
#pragma unroll
            for (int i = 0; i < kTile; ++i)
#pragma unroll
              for (int n = 0; n < kTile; ++n) sum[q][n] = fma(w[t][i][n], v[i], sum[q][n]);
          }
        }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q)
        store_vector<float>(part + ((slice * Q + q) * quads + quad) * kTile, kTile, true, sum[q]);
    }
    task -= f.tasks;
    part += f.slices * Q * wide;
  }
}

__device__ __forceinline__ float activate(Activation how, float x) {
  if (how == Activation::silu) return silu(x);
  if (how == Activation::gelu) return gelu(x);
  return how == Activation::tanh ? tanh(x) : x;
}

// What multiply() left of Q rows becomes outputs.
__device__ __forceinline__ void finish(float* shared, const float* part, const Job* jobs, int count, int Q,
                                       int first, int rows) {
  const int threads = int(blockDim.x);
  int i = int(threadIdx.x);
#pragma unroll 1
  for (const Job* job = jobs; job < jobs + count; ++job) {
    const Job& f = *job;
    const int wide = int(f.wide.by), sums = Q * wide, slices = f.slices;
#pragma unroll 1
    for (; i < sums; i += threads) {
      const int q = f.wide.quotient(i), n = i - q * wide, row = first + q;
      if (row >= rows || n >= f.outputs) continue;
      float sum = part[i];
#pragma unroll 4
      for (int s = 1; s < slices; ++s) sum += part[s * sums + i];
      float y = activate(f.activation, sum), *to = shared + f.y + row * f.y_stride + n;
      if (f.mask >= 0 && !reinterpret_cast<const int*>(shared)[f.mask + row * kMaxModalities]) y = 0;
      *to = f.store == Store::set ? y : f.store == Store::add ? *to + y : *to - y;
    }
    i -= sums;
    part += slices * sums;
  }
}

}  // namespace sage::cuda
