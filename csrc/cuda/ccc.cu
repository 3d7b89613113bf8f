// ccc and its moments on the GPU.
//
// Bytes: forward reads pred and target once (and a byte of mask a frame or number), backward reads both and writes
// one or two gradients: a float32 pair costs 8 bytes forward, 12 or 16 backward. Memory is the floor; the sums are in
// double (5 double operations and 2 conversions a pair, under half of what an H200 does while the pair arrives).
//
// A group's frames are cut into chunks by its length alone. A block sums one chunk; each thread sums powers of the
// distance to the first valid frame it met, so a constant gives exact zeros and nothing cancels. Centred moments are
// then merged in a fixed order: lanes, warps, and, in a second launch where there are several chunks, chunks.
#include <type_traits>

#include "device.cuh"
#include "../math/ccc.h"

namespace sage::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBatch = 4;  // vectors of pred and of target that a thread has in flight
constexpr int64_t kChunkFrames = 4096,
                  kMaxChunks = 1024;  // few enough for a block to merge, kMerged a thread
constexpr int kMerged = int(kMaxChunks) / kThreads;

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

// Merges the block's threads in a fixed order, C channels at once. Channel c's result is the first lane's of warp c, in
// m[0]. `shared`: C * kWarps * kMoments doubles.
template <int C>
__device__ __forceinline__ void merge_block(M (&m)[C], double* shared) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll 1  // one copy of merge a channel: it is long
  for (int o = kWarp / 2; o > 0; o /= 2)
#pragma unroll
    for (int c = 0; c < C; ++c) m[c] = merge(m[c], shuffle_down(m[c], o));
#pragma unroll
  for (int c = 0; c < C; ++c)
    if (lane == 0) write_moments(shared + (c * kWarps + warp) * kMoments, m[c]);
  __syncthreads();
  if (warp >= C) return;
  m[0] = lane < kWarps ? read_moments(shared + (warp * kWarps + lane) * kMoments) : no_moments<double>();
#pragma unroll 1
  for (int o = kWarps / 2; o > 0; o /= 2) m[0] = merge(m[0], shuffle_down(m[0], o));
}

template <class T>
__device__ __forceinline__ void finish(const CccForward& params, int64_t at, const M& m) {
  write_moments(params.moments + at * kMoments, m);
  if (params.ccc) static_cast<T*>(params.ccc)[at] = T(concordance(m, m.count).ccc);
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
__device__ __forceinline__ bool counted(const CccForward& params, int64_t i, int channels) {
  return params.mask_kind == Mask::none || params.mask[params.mask_kind == Mask::element ? i : i / channels];
}

// The mask bytes of a vector of V numbers of C channels, each number its own: loaded at once where they lie aligned.
template <int V, int C, Mask kMask>
struct VectorMask {
  static constexpr int kBytes = kMask == Mask::element ? V : kMask == Mask::frame ? V / C : 1;
  uint8_t bytes[kBytes];
  // `number`: the vector's first, of all in the tensor, or (n less than V) of some at its end
  __device__ __forceinline__ void load(const uint8_t* mask, int64_t number, int n, bool whole) {
    if constexpr (kMask != Mask::none) {
      const uint8_t* from = mask + (kMask == Mask::element ? number : number / C);
      if (whole) {
        using Word =
            std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
        const Word word = *reinterpret_cast<const Word*>(from);
        memcpy(bytes, &word, sizeof bytes);
      } else {
#pragma unroll
        for (int k = 0; k < kBytes; ++k) bytes[k] = k * (V / kBytes) < n ? from[k] : 0;
      }
    }
  }
  __device__ __forceinline__ bool counts(int k) const {
    return kMask == Mask::none || bytes[k / (V / kBytes)];
  }
  // Whether the masks of all vectors from this number on may be loaded at once.
  __device__ static __forceinline__ bool aligned_at(const uint8_t* mask, int64_t number) {
    const uint8_t* from = mask + (kMask == Mask::element ? number : number / C);
    return kMask == Mask::none || reinterpret_cast<uintptr_t>(from) % kBytes == 0;
  }
};

// ---------------------------------------------------------------------------------------------------- forward
// One or two channels, in vectors of 16 bytes: the channel of a vector's number is known at compile time.
template <class T, int C, Mask kMask>
__global__ void __launch_bounds__(kThreads) ccc_flat_kernel(CccForward params, int64_t chunks, int64_t per) {
  constexpr int V = kVector<T>;
  using Counts = VectorMask<V, C, kMask>;
  const Span span(blockIdx.x, chunks, per, params.frames);
  const int64_t base = (span.group * params.frames + span.begin) * C, numbers = span.frames * C,
                vectors = numbers / V;
  const T *pred = static_cast<const T*>(params.pred) + base,
          *target = static_cast<const T*>(params.target) + base;
  const bool whole = aligned(pred, 0) && aligned(target, 0);  // the same vectors either way, so the same bits
  const bool whole_mask = Counts::aligned_at(params.mask, base);
  Shifted s[C] = {};
  const auto take = [&](const T* x, const T* y, const Counts& counts, int n) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < n) s[k % C].add(counts.counts(k), double(x[k]), double(y[k]));
  };
  int64_t v = threadIdx.x;
  for (; v + (kBatch - 1) * kThreads < vectors; v += kBatch * kThreads) {
    T x[kBatch][V], y[kBatch][V];
    Counts counts[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      counts[b].load(params.mask, base + (v + b * kThreads) * V, V, whole_mask);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      load_vector(pred + (v + b * kThreads) * V, V, whole, x[b]);
      load_vector(target + (v + b * kThreads) * V, V, whole, y[b]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) take(x[b], y[b], counts[b], V);
  }
  const auto rest = [&](int64_t vector, int n) {
    T x[V], y[V];
    Counts counts;
    counts.load(params.mask, base + vector * V, n, n == V && whole_mask);
    load_vector(pred + vector * V, n, n == V && whole, x);
    load_vector(target + vector * V, n, n == V && whole, y);
    take(x, y, counts, n);
  };
  for (; v < vectors; v += kThreads) rest(v, V);
  if (threadIdx.x == kThreads - 1 && numbers % V) rest(vectors, int(numbers % V));
  M m[C];
#pragma unroll
  for (int c = 0; c < C; ++c) m[c] = s[c].moments();
  merge_block(m, shared_memory<double>());
  const int c = int(threadIdx.x) / kWarp;
  if (c >= C || threadIdx.x % kWarp) return;
  if (chunks == 1)
    finish<T>(params, span.group * C + c, m[0]);
  else
    write_moments(params.workspace + (int64_t(blockIdx.x) * C + c) * kMoments, m[0]);
}

// Any number of channels: a block takes one channel of a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    ccc_strided_kernel(CccForward params, int64_t chunks, int64_t per) {
  const int C = params.channels;
  const int64_t c = blockIdx.x % unsigned(C), block = blockIdx.x / unsigned(C);
  const Span span(block, chunks, per, params.frames);
  const int64_t base = (span.group * params.frames + span.begin) * C + c;
  Shifted s = {};
  for (int64_t f = threadIdx.x; f < span.frames; f += kThreads) {
    const int64_t i = base + f * C;
    if (counted(params, i, C))
      s.add(true, double(static_cast<const T*>(params.pred)[i]),
            double(static_cast<const T*>(params.target)[i]));
  }
  M m[1] = {s.moments()};
  merge_block(m, shared_memory<double>());
  if (threadIdx.x == 0) {
    if (chunks == 1)
      finish<T>(params, span.group * C + c, m[0]);
    else
      write_moments(params.workspace + int64_t(blockIdx.x) * kMoments, m[0]);
  }
}

// The chunks of one (group, channel), in order.
template <class T>
__global__ void __launch_bounds__(kThreads) ccc_merge_kernel(CccForward params, int64_t chunks) {
  const int C = params.channels;
  const int64_t group = blockIdx.x / unsigned(C), c = blockIdx.x % unsigned(C);
  // All of a thread's chunks are on their way before the first is merged.
  M all[kMerged];
#pragma unroll
  for (int k = 0; k < kMerged; ++k) {
    const int64_t chunk = k * kThreads + threadIdx.x;
    all[k] = no_moments<double>();
    if (chunk < chunks)
      all[k] = read_moments(params.workspace + ((group * chunks + chunk) * C + c) * kMoments);
  }
  M m[1] = {all[0]};
#pragma unroll
  for (int k = 1; k < kMerged; ++k) m[0] = merge(m[0], all[k]);
  merge_block(m, shared_memory<double>());
  if (threadIdx.x == 0) finish<T>(params, blockIdx.x, m[0]);
}

// --------------------------------------------------------------------------------------------------- backward
// at: group * channels + channel
template <class T>
__device__ __forceinline__ FrameGradient gradient_of(const CccBackward& params, int64_t at) {
  const Moments<double> m = read_moments(params.forward.moments + at * kMoments);
  if (params.grad_moments) return frame_gradient(m, params.grad_moments + at * kMoments);
  return frame_gradient(m, double(static_cast<const T*>(params.grad_ccc)[at]));
}

// A block takes kBatch vectors a thread: all are asked for before the gradients' slopes are computed.
template <class T, int C, Mask kMask>
__global__ void __launch_bounds__(kThreads)
    ccc_flat_gradient_kernel(CccBackward params, int64_t chunks, int64_t per) {
  constexpr int V = kVector<T>;
  using Counts = VectorMask<V, C, kMask>;
  const CccForward& forward = params.forward;
  const Span span(blockIdx.x, chunks, per, forward.frames);
  const int64_t base = (span.group * forward.frames + span.begin) * C;
  const int numbers = int(span.frames * C);
  const T *pred = static_cast<const T*>(forward.pred) + base,
          *target = static_cast<const T*>(forward.target) + base;
  T* const grad_pred = params.grad_pred ? static_cast<T*>(params.grad_pred) + base : nullptr;
  T* const grad_target = params.grad_target ? static_cast<T*>(params.grad_target) + base : nullptr;
  const bool whole = numbers == kBatch * kThreads * V && aligned(pred, 0) && aligned(target, 0) &&
                     aligned(grad_pred, 0) && aligned(grad_target, 0) &&
                     Counts::aligned_at(forward.mask, base);
  const auto number_of = [&](int b) { return (b * kThreads + int(threadIdx.x)) * V; };
  const auto size_of = [&](int b) {  // of vector b
    const int left = numbers - number_of(b);
    return left < 0 ? 0 : left < V ? left : V;
  };
  T x[kBatch][V], y[kBatch][V];
  Counts counts[kBatch];
  const auto read = [&](bool together) {  // known where it is called: no load waits for a choice
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int n = together ? V : size_of(b);
      counts[b].load(forward.mask, base + number_of(b), n, together);
      load_vector(pred + number_of(b), n, together, x[b]);
      load_vector(target + number_of(b), n, together, y[b]);
    }
  };
  if (whole)
    read(true);
  else
    read(false);
  FrameGradient gradients[C];
#pragma unroll
  for (int c = 0; c < C; ++c) gradients[c] = gradient_of<T>(params, span.group * C + c);
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    T gp[V], gt[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool valid = counts[b].counts(k);
      const double p = double(x[b][k]), t = double(y[b][k]);
      gp[k] = valid ? T(gradients[k % C].pred(p, t)) : T(0);
      gt[k] = valid ? T(gradients[k % C].target(p, t)) : T(0);
    }
    if (grad_pred) store_vector(grad_pred + number_of(b), size_of(b), whole, gp);
    if (grad_target) store_vector(grad_target + number_of(b), size_of(b), whole, gt);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    ccc_strided_gradient_kernel(CccBackward params, int64_t chunks, int64_t per) {
  const CccForward& forward = params.forward;
  const int C = forward.channels;
  const int64_t c = blockIdx.x % unsigned(C);
  const Span span(blockIdx.x / unsigned(C), chunks, per, forward.frames);
  const int64_t base = (span.group * forward.frames + span.begin) * C + c;
  const FrameGradient a = gradient_of<T>(params, span.group * C + c);
  for (int64_t k = threadIdx.x; k < span.frames; k += kThreads) {
    const int64_t i = base + k * C;
    const bool valid = counted(forward, i, C);
    const double x = valid ? double(static_cast<const T*>(forward.pred)[i]) : 0,
                 y = valid ? double(static_cast<const T*>(forward.target)[i]) : 0;
    if (params.grad_pred) static_cast<T*>(params.grad_pred)[i] = valid ? T(a.pred(x, y)) : T(0);
    if (params.grad_target) static_cast<T*>(params.grad_target)[i] = valid ? T(a.target(x, y)) : T(0);
  }
}

// --------------------------------------------------------------------------------------------------- launchers
Call call_of(const char* op, const CccForward& params, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of (%lld, %lld, %d) %s", op, (long long)params.groups,
           (long long)params.frames, params.channels, dtype_name(params.dtype));
  return call;
}

// The instance of a kernel for T, C = 1 or 2 and a kind of mask. A mask a number and one a frame are alike for one channel.
#define SAGE_BY_MASK(kernel, kind)                                                                     \
  (C == 1                  ? kind == Mask::none ? kernel<T, 1, Mask::none> : kernel<T, 1, Mask::frame> \
   : kind == Mask::none    ? kernel<T, 2, Mask::none>                                                  \
   : kind == Mask::element ? kernel<T, 2, Mask::element>                                               \
                           : kernel<T, 2, Mask::frame>)

template <class T>
void forward_all(const CccForward& params, const Call& call) {
  const int C = params.channels;
  const int64_t per = chunk_frames(params.frames),
                chunks = params.frames ? (params.frames + per - 1) / per : 1;
  constexpr size_t kShared = kWarps * kMoments * sizeof(double);
  if (C <= 2) {
    const unsigned grid = grid_x(call, params.groups * chunks);
    const auto kernel = SAGE_BY_MASK(ccc_flat_kernel, params.mask_kind);
    launch(call, kernel, dim3(grid), kThreads, size_t(C) * kShared, params, chunks, per);
  } else {
    launch(call, ccc_strided_kernel<T>, dim3(grid_x(call, params.groups * chunks * C)), kThreads, kShared,
           params, chunks, per);
  }
  if (chunks > 1)
    launch(call, ccc_merge_kernel<T>, dim3(grid_x(call, params.groups * C)), kThreads, kShared, params,
           chunks);
}

template <class T>
void backward_all(const CccBackward& params, const Call& call) {
  const CccForward& forward = params.forward;
  const int C = forward.channels;
  if (C <= 2) {
    const int64_t per = kBatch * kThreads * kVector<T> / C, chunks = (forward.frames + per - 1) / per;
    const auto kernel = SAGE_BY_MASK(ccc_flat_gradient_kernel, forward.mask_kind);
    launch(call, kernel, dim3(grid_x(call, forward.groups * chunks)), kThreads, 0, params, chunks, per);
  } else {
    const int64_t per = kChunkFrames, chunks = (forward.frames + per - 1) / per;
    launch(call, ccc_strided_gradient_kernel<T>, dim3(grid_x(call, forward.groups * chunks * C)), kThreads, 0,
           params, chunks, per);
  }
}

}  // namespace

void ccc_forward(const CccForward& params, Exec exec) {
  if (!params.groups || !params.channels) return;
  const Call call = call_of("ccc", params, exec);
  const DeviceGuard guard(exec.where);
  params.dtype == DType::f64 ? forward_all<double>(params, call) : forward_all<float>(params, call);
}

void ccc_backward(const CccBackward& params, Exec exec) {
  const CccForward& forward = params.forward;
  if (!forward.groups || !forward.frames || !forward.channels) return;
  const Call call = call_of("ccc backward", forward, exec);
  const DeviceGuard guard(exec.where);
  forward.dtype == DType::f64 ? backward_all<double>(params, call) : backward_all<float>(params, call);
}

}  // namespace sage::cuda
