// y = W x + b on one block, and how the matrices lie for it.
//
// A matrix is packed in vectors of 16 bytes, four outputs of one input (or of two in bfloat16), so neighbouring lanes read
// neighbouring vectors. Its inputs are cut into slices of `depth`; a lane takes four outputs of one slice for all Q rows, so
// each weight is read once; the slices' sums meet in shared memory and are added in order. Depth depends on the model
// alone, so a row's bits depend on neither Q nor the rows beside it.
#pragma once
#include "device.cuh"
#include "../stream/model.h"

namespace sage::cuda {

using stream::Linear;

constexpr int kTile = 4;  // outputs and inputs that a lane multiplies at a time
__host__ __device__ __forceinline__ int tiled(int64_t n) { return int((n + kTile - 1) / kTile * kTile); }

// --------------------------------------------------------------------------------------------------------- the host's part
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

// How a product of some depth is shared out over warps; returns the tasks, one warp's work each.
inline int share_out(Linear& f, int depth) {
  const int quads = tiled(f.outputs) / kTile;
  f.lanes = 1;
  while (f.lanes < quads && f.lanes < kWarp) f.lanes *= 2;
  f.columns = (quads + f.lanes - 1) / f.lanes;
  f.depth = depth;
  f.slices = (tiled(f.inputs) + depth - 1) / depth;
  const int slices = kWarp / f.lanes;  // of a task
  return f.tasks = f.columns * ((f.slices + slices - 1) / slices);
}

// ------------------------------------------------------------------------------------------------------- the block's part
struct Job {
  const Linear* f;
  const float* x;  // row after row, `stride` apart
  int stride;
};

// Four inputs' weights of four outputs: w[input][output].
template <class T>
__device__ __forceinline__ void load_tile(const T* at, int64_t step, float (&w)[kTile][kTile]) {
  constexpr int V = kVector<T>, P = V / kTile;  // inputs of a vector
#pragma unroll
  for (int v = 0; v < kTile / P; ++v) load_vector<T>(at + v * step, V, true, w[v * P]);
}

// The slices' sums of Q rows from `first` on, of all jobs; rows past the last repeat it.
template <class T, int Q, class JobOf>
__device__ __forceinline__ void multiply(float* part, int jobs, int first, int rows, const JobOf& job_of) {
  constexpr int P = kVector<T> / kTile;
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  int task = int(threadIdx.x) / kWarp;
#pragma unroll 1
  for (int j = 0; j < jobs; ++j) {
    const Job job = job_of(j);
    const Linear& f = *job.f;
    const int quads = tiled(f.outputs) / kTile, inputs = tiled(f.inputs);
#pragma unroll 1
    for (; task < f.tasks; task += warps) {
      const int slice = task / f.columns * (kWarp / f.lanes) + lane / f.lanes;
      const int quad = task % f.columns * f.lanes + lane % f.lanes;
      if (slice >= f.slices || quad >= quads) continue;
      float sum[Q][kTile];
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int n = 0; n < kTile; ++n) sum[q][n] = 0;
      if (slice == 0) {
        load_vector<float>(f.bias + quad * kTile, kTile, true, sum[0]);
#pragma unroll
        for (int q = 1; q < Q; ++q)
#pragma unroll
          for (int n = 0; n < kTile; ++n) sum[q][n] = sum[0][n];
      }
      const int begin = slice * f.depth, end = begin + f.depth < inputs ? begin + f.depth : inputs;
      const int64_t step = int64_t(quads) * P * kTile;  // numbers from vector to vector of a lane
      const T* at = static_cast<const T*>(f.weight) + int64_t(begin) * quads * kTile + quad * P * kTile;
#pragma unroll(Q <= 3 ? 2 : 1)
      for (int k = begin; k < end; k += kTile) {
        float w[kTile][kTile];
        load_tile<T>(at, step, w);
        at += step * (kTile / P);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int row = first + q < rows ? first + q : rows - 1;
          float x[kTile];
          load_vector<float>(job.x + row * job.stride + k, kTile, true, x);
#pragma unroll
          for (int i = 0; i < kTile; ++i)
#pragma unroll
            for (int n = 0; n < kTile; ++n) sum[q][n] = fma(w[i][n], x[i], sum[q][n]);
        }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q)
        store_vector<float>(part + ((slice * Q + q) * quads + quad) * kTile, kTile, true, sum[q]);
    }
    task -= f.tasks;
    part += f.slices * Q * quads * kTile;
  }
}

// done(job, row, output, sum + bias) of each output of the rows that multiply() took.
template <int Q, class JobOf, class Done>
__device__ __forceinline__ void finish(const float* part, int jobs, int first, int rows, const JobOf& job_of,
                                       const Done& done) {
  const int threads = int(blockDim.x);
  int i = int(threadIdx.x);
#pragma unroll 1
  for (int j = 0; j < jobs; ++j) {
    const Linear& f = *job_of(j).f;
    const int wide = tiled(f.outputs), slices = f.slices;
#pragma unroll 1
    for (; i < Q * wide; i += threads) {
      const int row = first + i / wide, n = i % wide;
      if (row >= rows || n >= f.outputs) continue;
      float sum = part[i];
#pragma unroll 4
      for (int s = 1; s < slices; ++s) sum += part[s * Q * wide + i];
      done(j, row, n, sum);
    }
    i -= Q * wide;
    part += slices * Q * wide;
  }
}

// y = W x + b of `rows` rows a job, Q at a time. Needs a barrier before it, ends with one.
template <class T, int Q, class JobOf, class Done>
__device__ __forceinline__ void product(float* part, int jobs, int rows, const JobOf& job_of,
                                        const Done& done) {
#pragma unroll 1
  for (int first = 0; first < rows; first += Q) {
    multiply<T, Q>(part, jobs, first, rows, job_of);
    __syncthreads();
    finish<Q>(part, jobs, first, rows, job_of, done);
    __syncthreads();
  }
}

}  // namespace sage::cuda
