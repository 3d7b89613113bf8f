// ccc and its moments on the GPU.
//
// Bytes: forward reads pred and target once (and a byte of mask a frame or number), backward reads both and writes one or
// two gradients: a float32 pair costs 8 bytes forward, 12 or 16 backward. Memory is the floor; the sums are in double
// (5 double operations and 2 conversions a pair, under half of what an H200 does while the pair arrives).
//
// A group's frames are cut into chunks by its length alone. A block sums one chunk; each thread sums powers of the
// distance to the first valid frame it met, so a constant gives exact zeros and nothing cancels. Centred moments are then
// merged in a fixed order: lanes, warps, and, in a second launch where there are several chunks, chunks.
#include "device.cuh"
#include "../math/ccc.h"

namespace sage::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBatch = 4;  // vectors of pred and of target that a thread has in flight
constexpr int64_t kChunkFrames = 4096, kMaxChunks = 4096;
constexpr int64_t kBackwardVectors = 8 * kThreads;  // a block's share of backward

// Never more chunks than the CPU's, for which the workspace is made.
int64_t chunk_frames(int64_t frames) {
  const int64_t per = (frames + kMaxChunks - 1) / kMaxChunks;
  return per <= kChunkFrames ? kChunkFrames : (per + 1023) / 1024 * 1024;
}

using M = Moments<double>;

__device__ __forceinline__ M shuffle_down(const M& m, int by) {
  return {__shfl_down_sync(kFull, m.count, by),  __shfl_down_sync(kFull, m.mean_p, by),
          __shfl_down_sync(kFull, m.mean_t, by), __shfl_down_sync(kFull, m.m2_p, by),
          __shfl_down_sync(kFull, m.m2_t, by),   __shfl_down_sync(kFull, m.c_pt, by)};
}

struct Shifted {  // sums of one thread, about its first valid frame
  double shift_p, shift_t, p, t, pp, tt, pt;
  int64_t count;
  __device__ __forceinline__ void add(bool valid, double x, double y) {
    if (!valid) return;
    if (count == 0) shift_p = x, shift_t = y;
    ++count;
    x -= shift_p, y -= shift_t;
    p += x, t += y;
    pp = fma(x, x, pp), tt = fma(y, y, tt), pt = fma(x, y, pt);
  }
  __device__ __forceinline__ M moments() const {
    return centred(double(count), shift_p, shift_t, p, t, pp, tt, pt);
  }
};

// Merges the block's threads in a fixed order; the result is thread 0's. `shared`: kWarps * kMoments doubles.
__device__ __forceinline__ M merge_block(M m, double* shared) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll 1  // one copy of merge: it is long
  for (int o = kWarp / 2; o > 0; o /= 2) m = merge(m, shuffle_down(m, o));
  if (lane == 0) write_moments(shared + warp * kMoments, m);
  __syncthreads();
  if (threadIdx.x == 0)
#pragma unroll 1
    for (int w = 1; w < kWarps; ++w) m = merge(m, read_moments(shared + w * kMoments));
  return m;
}

template <class T>
__device__ __forceinline__ void finish(const CccForward& q, int64_t at, const M& m) {
  write_moments(q.moments + at * kMoments, m);
  if (q.ccc) static_cast<T*>(q.ccc)[at] = T(concordance(m, m.count).ccc);
}

// Where a block of moments or gradients stands: group, first frame, frames.
struct Span {
  int64_t group, begin, frames;
  __device__ __forceinline__ Span(int64_t block, int64_t chunks, int64_t per, int64_t all) {
    group = block / chunks;
    begin = block % chunks * per;
    frames = all - begin < per ? all - begin : per;
  }
};

// Is number i (channels interleaved, i / C its frame) counted?
template <int C>
__device__ __forceinline__ bool counted(const CccForward& q, int64_t i, int channels) {
  return q.mask_kind == Mask::none || q.mask[q.mask_kind == Mask::element ? i : i / (C ? C : channels)];
}

// ---------------------------------------------------------------------------------------------------- forward
// One or two channels, in vectors of 16 bytes: the channel of a vector's number is known at compile time.
template <class T, int C, bool Masked>
__global__ void __launch_bounds__(kThreads) ccc_flat_kernel(CccForward q, int64_t chunks, int64_t per) {
  constexpr int V = kVector<T>;
  const Span span(blockIdx.x, chunks, per, q.frames);
  const int64_t base = (span.group * q.frames + span.begin) * C, numbers = span.frames * C,
                vectors = numbers / V;
  const T *pred = static_cast<const T*>(q.pred) + base, *target = static_cast<const T*>(q.target) + base;
  const bool whole = aligned(pred, 0) && aligned(target, 0);  // the same vectors either way, so the same bits
  Shifted s[C] = {};
  const auto take = [&](int64_t i, const T* x, const T* y, int n) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < n) s[k % C].add(!Masked || counted<C>(q, base + i + k, C), double(x[k]), double(y[k]));
  };
  int64_t v = threadIdx.x;
  for (; v + (kBatch - 1) * kThreads < vectors; v += kBatch * kThreads) {
    T x[kBatch][V], y[kBatch][V];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      load_vector(pred + (v + b * kThreads) * V, V, whole, x[b]);
      load_vector(target + (v + b * kThreads) * V, V, whole, y[b]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) take((v + b * kThreads) * V, x[b], y[b], V);
  }
  for (; v < vectors; v += kThreads) {
    T x[V], y[V];
    load_vector(pred + v * V, V, whole, x);
    load_vector(target + v * V, V, whole, y);
    take(v * V, x, y, V);
  }
  if (threadIdx.x == kThreads - 1 && numbers % V) {
    T x[V], y[V];
    load_vector(pred + vectors * V, int(numbers % V), false, x);
    load_vector(target + vectors * V, int(numbers % V), false, y);
    take(vectors * V, x, y, int(numbers % V));
  }
  double* shared = shared_memory<double>();
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const M m = merge_block(s[c].moments(), shared + c * kWarps * kMoments);
    if (threadIdx.x == 0) {
      if (chunks == 1)
        finish<T>(q, span.group * C + c, m);
      else
        write_moments(q.workspace + (int64_t(blockIdx.x) * C + c) * kMoments, m);
    }
  }
}

// Any number of channels: a block takes one channel of a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) ccc_strided_kernel(CccForward q, int64_t chunks, int64_t per) {
  const int C = q.channels;
  const int64_t c = blockIdx.x % unsigned(C), block = blockIdx.x / unsigned(C);
  const Span span(block, chunks, per, q.frames);
  const int64_t base = (span.group * q.frames + span.begin) * C + c;
  Shifted s = {};
  for (int64_t f = threadIdx.x; f < span.frames; f += kThreads) {
    const int64_t i = base + f * C;
    if (counted<0>(q, i, C))
      s.add(true, double(static_cast<const T*>(q.pred)[i]), double(static_cast<const T*>(q.target)[i]));
  }
  const M m = merge_block(s.moments(), shared_memory<double>());
  if (threadIdx.x == 0) {
    if (chunks == 1)
      finish<T>(q, span.group * C + c, m);
    else
      write_moments(q.workspace + int64_t(blockIdx.x) * kMoments, m);
  }
}

// The chunks of one (group, channel), in order.
template <class T>
__global__ void __launch_bounds__(kThreads) ccc_merge_kernel(CccForward q, int64_t chunks) {
  const int C = q.channels;
  const int64_t group = blockIdx.x / unsigned(C), c = blockIdx.x % unsigned(C);
  M m = no_moments<double>();
  for (int64_t k = threadIdx.x; k < chunks; k += kThreads)
    m = merge(m, read_moments(q.workspace + ((group * chunks + k) * C + c) * kMoments));
  m = merge_block(m, shared_memory<double>());
  if (threadIdx.x == 0) finish<T>(q, blockIdx.x, m);
}

// --------------------------------------------------------------------------------------------------- backward
struct Line {  // the gradients of one (group, channel)
  double mean_p, mean_t;
  Slopes<double> slopes;
  __device__ __forceinline__ double pred(double x, double y) const {
    return slopes.pred(x - mean_p, y - mean_t);
  }
  __device__ __forceinline__ double target(double x, double y) const {
    return slopes.target(x - mean_p, y - mean_t);
  }
};

template <class T>
__device__ __forceinline__ Line line(const CccBackward& q, int64_t at) {
  const M m = read_moments(q.forward.moments + at * kMoments);
  if (!q.grad_moments)
    return {m.mean_p, m.mean_t,
            concordance_slopes(m, m.count, double(static_cast<const T*>(q.grad_ccc)[at]))};
  const double* g = q.grad_moments + at * kMoments;
  return {m.mean_p, m.mean_t, moments_slopes(g[1], g[2], g[3], g[4], g[5], m.count)};
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    ccc_flat_gradient_kernel(CccBackward q, int64_t chunks, int64_t per) {
  constexpr int V = kVector<T>;
  const CccForward& f = q.forward;
  const Span span(blockIdx.x, chunks, per, f.frames);
  const int64_t base = (span.group * f.frames + span.begin) * C, numbers = span.frames * C;
  const T *pred = static_cast<const T*>(f.pred) + base, *target = static_cast<const T*>(f.target) + base;
  T* const grad_pred = q.grad_pred ? static_cast<T*>(q.grad_pred) + base : nullptr;
  T* const grad_target = q.grad_target ? static_cast<T*>(q.grad_target) + base : nullptr;
  const bool all_whole =
      aligned(pred, 0) && aligned(target, 0) && aligned(grad_pred, 0) && aligned(grad_target, 0);
  Line lines[C];
#pragma unroll
  for (int c = 0; c < C; ++c) lines[c] = line<T>(q, span.group * C + c);
  for (int64_t i = int64_t(threadIdx.x) * V; i < numbers; i += int64_t(kThreads) * V) {
    const int n = int(numbers - i < V ? numbers - i : V);
    const bool whole = n == V && all_whole;
    T x[V], y[V], gp[V], gt[V];
    load_vector(pred + i, n, whole, x);
    load_vector(target + i, n, whole, y);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool valid = k < n && counted<C>(f, base + i + k, C);
      gp[k] = valid ? T(lines[k % C].pred(double(x[k]), double(y[k]))) : T(0);
      gt[k] = valid ? T(lines[k % C].target(double(x[k]), double(y[k]))) : T(0);
    }
    if (grad_pred) store_vector(grad_pred + i, n, whole, gp);
    if (grad_target) store_vector(grad_target + i, n, whole, gt);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    ccc_strided_gradient_kernel(CccBackward q, int64_t chunks, int64_t per) {
  const CccForward& f = q.forward;
  const int C = f.channels;
  const int64_t c = blockIdx.x % unsigned(C);
  const Span span(blockIdx.x / unsigned(C), chunks, per, f.frames);
  const int64_t base = (span.group * f.frames + span.begin) * C + c;
  const Line a = line<T>(q, span.group * C + c);
  for (int64_t k = threadIdx.x; k < span.frames; k += kThreads) {
    const int64_t i = base + k * C;
    const bool valid = counted<0>(f, i, C);
    const double x = valid ? double(static_cast<const T*>(f.pred)[i]) : 0,
                 y = valid ? double(static_cast<const T*>(f.target)[i]) : 0;
    if (q.grad_pred) static_cast<T*>(q.grad_pred)[i] = valid ? T(a.pred(x, y)) : T(0);
    if (q.grad_target) static_cast<T*>(q.grad_target)[i] = valid ? T(a.target(x, y)) : T(0);
  }
}

// --------------------------------------------------------------------------------------------------- launchers
Call call_of(const char* op, const CccForward& q, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of (%lld, %lld, %d) %s", op, (long long)q.groups,
           (long long)q.frames, q.channels, dtype_name(q.dtype));
  return call;
}

template <class T>
void forward_all(const CccForward& q, const Call& call) {
  const int C = q.channels;
  const int64_t per = chunk_frames(q.frames), chunks = q.frames ? (q.frames + per - 1) / per : 1;
  constexpr size_t kShared = kWarps * kMoments * sizeof(double);
  if (C <= 2) {
    const unsigned grid = grid_x(call, q.groups * chunks);
    const bool masked = q.mask_kind != Mask::none;
    const auto kernel = C == 1 ? (masked ? ccc_flat_kernel<T, 1, true> : ccc_flat_kernel<T, 1, false>)
                               : (masked ? ccc_flat_kernel<T, 2, true> : ccc_flat_kernel<T, 2, false>);
    launch(call, kernel, dim3(grid), kThreads, size_t(C) * kShared, q, chunks, per);
  } else {
    launch(call, ccc_strided_kernel<T>, dim3(grid_x(call, q.groups * chunks * C)), kThreads, kShared, q,
           chunks, per);
  }
  if (chunks > 1)
    launch(call, ccc_merge_kernel<T>, dim3(grid_x(call, q.groups * C)), kThreads, kShared, q, chunks);
}

template <class T>
void backward_all(const CccBackward& q, const Call& call) {
  const CccForward& f = q.forward;
  const int C = f.channels;
  if (C <= 2) {
    const int64_t per = kBackwardVectors * kVector<T> / C, chunks = (f.frames + per - 1) / per;
    const auto kernel = C == 1 ? ccc_flat_gradient_kernel<T, 1> : ccc_flat_gradient_kernel<T, 2>;
    launch(call, kernel, dim3(grid_x(call, f.groups * chunks)), kThreads, 0, q, chunks, per);
  } else {
    const int64_t per = kChunkFrames, chunks = (f.frames + per - 1) / per;
    launch(call, ccc_strided_gradient_kernel<T>, dim3(grid_x(call, f.groups * chunks * C)), kThreads, 0, q,
           chunks, per);
  }
}

}  // namespace

void ccc_forward(const CccForward& q, Exec exec) {
  if (!q.groups || !q.channels) return;
  const Call call = call_of("ccc", q, exec);
  const DeviceGuard guard(exec.where);
  q.dtype == DType::f64 ? forward_all<double>(q, call) : forward_all<float>(q, call);
}

void ccc_backward(const CccBackward& q, Exec exec) {
  const CccForward& f = q.forward;
  if (!f.groups || !f.frames || !f.channels) return;
  const Call call = call_of("ccc backward", f, exec);
  const DeviceGuard guard(exec.where);
  f.dtype == DType::f64 ? backward_all<double>(q, call) : backward_all<float>(q, call);
}

}  // namespace sage::cuda
