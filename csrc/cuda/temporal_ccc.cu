// temporal_ccc on the GPU.
//
// A block is one (sequence, channel). Every step is a scan over frames: each thread folds a run of frames, the block scans
// the threads' folds, each thread goes over its run again from what came before it; runs longer than the block can hold
// come in tiles. So the cost is linear in T and its chain is about T / 256 frames long. Bytes: a float32 pair is read twice
// a sweep (the second time from cache); forward writes 5 bytes, backward reads 12 and writes 4 or 8; with 48 to 128 bytes of
// workspace a frame where slopes or window tails pass between sweeps. The floor is not memory but the scan's latency.
//
//   cumulative, half-life   moments, merged with the past decayed by the frames gone between the last valid ones
//   window                  frames in blocks of `window`: tails of a block (a reverse scan) merged with heads of the next (a
//                           forward scan), so nothing is ever subtracted
//   backward                slopes of each frame (math/ccc.h), and for every frame the sum of the slopes of the
//                           frames that saw it: a reverse scan with the same decay, or tails and heads once more
#include "device.cuh"
#include "../math/temporal_ccc.h"

namespace sage::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kRun = 16;  // frames of one thread in a tile, at most
constexpr int kSlopes = kTemporalCoefficients;

using M = Moments<double>;

__device__ __forceinline__ M shuffle_up(const M& m, int by) {
  return {__shfl_up_sync(kFull, m.count, by),  __shfl_up_sync(kFull, m.mean_p, by),
          __shfl_up_sync(kFull, m.mean_t, by), __shfl_up_sync(kFull, m.m2_p, by),
          __shfl_up_sync(kFull, m.m2_t, by),   __shfl_up_sync(kFull, m.c_pt, by)};
}
// ------------------------------------------------------------------------------------- what is folded and merged
struct Past {  // frames of the cumulative and half-life modes, and how many
  Running<double> run;
  double length;
};
struct Stretch {  // frames of the window mode since the last edge of a block
  M m;
  double edge;  // 1: an edge lies within
};
struct Linear {  // sum -> a + factor * sum
  double a[kSlopes], factor;
};

__device__ __forceinline__ Past shuffle_up(const Past& x, int by) {
  return {
      {shuffle_up(x.run.m, by), __shfl_up_sync(kFull, x.run.seen, by), __shfl_up_sync(kFull, x.run.gap, by)},
      __shfl_up_sync(kFull, x.length, by)};
}
__device__ __forceinline__ Stretch shuffle_up(const Stretch& x, int by) {
  return {shuffle_up(x.m, by), __shfl_up_sync(kFull, x.edge, by)};
}
__device__ __forceinline__ Linear shuffle_up(const Linear& x, int by) {
  Linear y;
#pragma unroll
  for (int k = 0; k < kSlopes; ++k) y.a[k] = __shfl_up_sync(kFull, x.a[k], by);
  y.factor = __shfl_up_sync(kFull, x.factor, by);
  return y;
}
__device__ __forceinline__ Past empty_past() { return {{no_moments<double>(), 0, 0}, 0}; }
__device__ __forceinline__ Stretch empty_stretch() { return {no_moments<double>(), 0}; }
__device__ __forceinline__ Linear identity() { return {{0, 0, 0, 0, 0}, 1}; }

struct JoinPast {
  Decay decay;
  __device__ __forceinline__ Past operator()(const Past& a, const Past& b) const {
    const double length = a.length + b.length;
    if (b.run.seen == 0) return {{a.run.m, a.run.seen, a.run.gap + b.length}, length};
    const double frames = a.run.gap + b.length - b.run.gap;  // from the last valid one of a to that of b
    const double d = decay.rate < 1 ? exp(frames * decay.log_rate) : 1.0;
    const M& m = a.run.m;
    const M past = {m.count * d, m.mean_p, m.mean_t, m.m2_p * d, m.m2_t * d, m.c_pt * d};
    return {{merge(past, b.run.m), a.run.seen + b.run.seen, b.run.gap}, length};
  }
};
struct JoinStretch {
  __device__ __forceinline__ Stretch operator()(const Stretch& a, const Stretch& b) const {
    if (b.edge != 0) return b;
    return {merge(a.m, b.m), a.edge};
  }
};
struct Compose {
  __device__ __forceinline__ Linear operator()(const Linear& a, const Linear& b) const {
    if (b.factor == 0) return b;
    Linear y;
#pragma unroll
    for (int k = 0; k < kSlopes; ++k) y.a[k] = fma(a.a[k], b.factor, b.a[k]);
    y.factor = a.factor * b.factor;
    return y;
  }
};

// A scan over n steps: extend(item, i) appends step i, visit(i, item) sees what all steps up to i come to. `carry` starts
// it and ends as the whole. All of the block's writes to memory are visible when it returns.
template <class Item, class Join, class Extend, class Visit>
__device__ __forceinline__ void sweep(int64_t n, const Item& empty, Item& carry, Item* shared, Join join,
                                      Extend extend, Visit visit) {
  const int64_t even = (n + kThreads - 1) / kThreads, run = even < 1 ? 1 : even < kRun ? even : kRun;
  for (int64_t tile = 0; tile < n; tile += run * kThreads) {
    const int64_t first = tile + run * int64_t(threadIdx.x), last = first + run < n ? first + run : n;
    Item mine = empty;
    for (int64_t i = first; i < last; ++i) extend(mine, i);
    Item item = block_scan<kWarps>(mine, carry, shared, join);
    for (int64_t i = first; i < last; ++i) {
      extend(item, i);
      visit(i, item);
    }
  }
  __syncthreads();
}

// ------------------------------------------------------------------------------------------------------ the data
struct Frame {
  double x, y;  // 0 where not valid
  bool valid;
};

template <class T>
struct Lane {  // one (sequence, channel)
  int64_t number, sequence, channel;
  __device__ __forceinline__ explicit Lane(const TemporalCccForward& q)
      : number(blockIdx.x), sequence(number / q.channels), channel(number % q.channels) {}
  __device__ __forceinline__ int64_t at(const TemporalCccForward& q, int64_t t) const {
    return (sequence * q.frames + t) * q.channels + channel;
  }
  __device__ __forceinline__ Frame frame(const TemporalCccForward& q, int64_t t) const {
    const int64_t i = at(q, t);
    const bool valid =
        q.mask_kind == Mask::none || q.mask[q.mask_kind == Mask::frame ? sequence * q.frames + t : i];
    return {valid ? double(static_cast<const T*>(q.pred)[i]) : 0,
            valid ? double(static_cast<const T*>(q.target)[i]) : 0, valid};
  }
  // Frame j of history and chunk together.
  __device__ __forceinline__ Frame joined(const TemporalCccForward& q, int64_t j) const {
    if (j >= q.history) return frame(q, j - q.history);
    const double* s = q.state_in + (number * q.history + j) * 3;
    return {s[0], s[1], s[2] > 0};
  }
};

// Calls visit(t, frame, moments of the frames that t sees, how many of them are valid, decay) for every t, each on one
// thread. `tails`: (history + frames, 6) of workspace in window mode.
template <class T, bool Window, class Visit>
__device__ __forceinline__ void scan(const TemporalCccForward& q, const Lane<T>& lane, double* tails,
                                     Visit visit) {
  if (!Window) {
    Past* shared = shared_memory<Past>();
    const Decay decay = {q.decay, q.decay < 1 ? log(q.decay) : 0};
    Past carry = empty_past();
    if (q.state_in) {
      const double* s = q.state_in + lane.number * kTemporalState;
      carry.run = {read_moments(s + 1), s[0], s[7]};
    }
    double applied = 1;
    sweep(
        q.frames, empty_past(), carry, shared, JoinPast{decay},
        [&](Past& past, int64_t t) {
          const Frame f = lane.frame(q, t);
          applied = running_step(past.run, decay, f.valid ? 1.0 : 0.0, f.x, f.y);
          past.length += 1;
        },
        [&](int64_t t, const Past& past) { visit(t, lane.frame(q, t), past.run.m, past.run.seen, applied); });
    if (q.state_out && threadIdx.x == 0) {
      double* s = q.state_out + lane.number * kTemporalState;
      s[0] = carry.run.seen, s[7] = carry.run.gap;
      write_moments(s + 1, carry.run.m);
    }
    return;
  }
  Stretch* shared = shared_memory<Stretch>();
  const int64_t total = q.history + q.frames, window = q.window;
  const auto extend = [&](Stretch& s, int64_t j, bool edge) {
    if (edge) s = {no_moments<double>(), 1};
    const Frame f = lane.joined(q, j);
    s.m = push(s.m, 1.0, f.valid ? 1.0 : 0.0, f.x, f.y);
  };
  Stretch carry = empty_stretch();
  sweep(
      total, empty_stretch(), carry, shared, JoinStretch{},
      [&](Stretch& s, int64_t i) { extend(s, total - 1 - i, (total - 1 - i) % window == window - 1); },
      [&](int64_t i, const Stretch& s) { write_moments(tails + (total - 1 - i) * kMoments, s.m); });
  carry = empty_stretch();
  sweep(
      total, empty_stretch(), carry, shared, JoinStretch{},
      [&](Stretch& s, int64_t j) { extend(s, j, j % window == 0); },
      [&](int64_t j, const Stretch& s) {
        if (j < q.history) return;
        const bool whole = j < window || j % window == window - 1;
        const M m = whole ? s.m : merge(read_moments(tails + (j - window + 1) * kMoments), s.m);
        visit(j - q.history, lane.joined(q, j), m, m.count, 1.0);
      });
  if (q.state_out)
    for (int64_t k = threadIdx.x; k < q.history_out; k += kThreads) {
      const Frame f = lane.joined(q, total - q.history_out + k);
      double* s = q.state_out + (lane.number * q.history_out + k) * 3;
      s[0] = f.x, s[1] = f.y, s[2] = f.valid ? 1 : 0;
    }
}

template <class T, bool Window>
__global__ void __launch_bounds__(kThreads) temporal_ccc_kernel(TemporalCccForward q) {
  const Lane<T> lane(q);
  scan<T, Window>(q, lane, q.workspace + lane.number * kMoments * (q.history + q.frames),
                  [&](int64_t t, const Frame&, const M& m, double seen, double) {
                    const auto rho = concordance(m, seen);
                    const int64_t i = lane.at(q, t);
                    static_cast<T*>(q.rho)[i] = T(rho.ccc);
                    q.defined[i] = rho.defined ? 1 : 0;
                  });
}

// The first valid frame of the chunk, or its length.
template <class T>
__device__ __forceinline__ int64_t first_valid(const TemporalCccForward& q, const Lane<T>& lane) {
  int64_t* shared = shared_memory<int64_t>();
  int64_t found = q.frames;
  for (int64_t tile = 0; tile < q.frames && found == q.frames; tile += kThreads) {
    const int64_t t = tile + threadIdx.x;
    const unsigned bits = __ballot_sync(kFull, t < q.frames && lane.frame(q, t).valid);
    int bit = 0;
    while (bit < kWarp - 1 && !(bits >> bit & 1)) ++bit;
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = bits ? t + bit : q.frames;
    __syncthreads();
    for (int w = kWarps - 1; w >= 0; --w) found = shared[w] < q.frames ? shared[w] : found;
    __syncthreads();
  }
  return found;
}

template <class T, bool Window>
__global__ void __launch_bounds__(kThreads) temporal_ccc_gradient_kernel(TemporalCccBackward q) {
  const TemporalCccForward& f = q.forward;
  const Lane<T> lane(f);
  const int64_t frames = f.frames, window = f.window;
  double* const tails =
      f.workspace + lane.number * (Window ? kMoments * (f.history + frames) + 2 * kSlopes * frames
                                          : (kSlopes + 1) * frames);
  double* const slopes = tails + (Window ? kMoments * (f.history + frames) : 0);  // (frames, 5)
  double* const beside = slopes + kSlopes * frames;  // window: (frames, 5) running sums; else (frames) decays

  // An origin near the data, so that slope * (x - origin) cancels nothing. Frames before it get gradient 0 anyway.
  const int64_t from = first_valid(f, lane);
  double origin_p = 0, origin_t = 0;
  if (from < frames) {
    const Frame e = lane.frame(f, from);
    origin_p = e.x, origin_t = e.y;
  }
  scan<T, Window>(f, lane, tails, [&](int64_t t, const Frame&, const M& m, double seen, double decay) {
    const double grad = double(static_cast<const T*>(q.grad_rho)[lane.at(f, t)]);
    const Slopes<double> s =
        about_origin(concordance_slopes(m, seen, grad), m.mean_p - origin_p, m.mean_t - origin_t);
    double* at = slopes + t * kSlopes;
    at[0] = s.offset_p, at[1] = s.offset_t, at[2] = s.slope_p, at[3] = s.slope_t, at[4] = s.slope_c;
    if (!Window) beside[t] = decay;
  });

  Linear* shared = shared_memory<Linear>();
  const auto extend = [&](Linear& sum, int64_t t, double factor) {
    const double* at = slopes + t * kSlopes;
    if (factor == 0) sum = identity();
#pragma unroll
    for (int k = 0; k < kSlopes; ++k) sum.a[k] = fma(sum.a[k], factor, at[k]);
    sum.factor *= factor;
  };
  const auto emit = [&](int64_t t, const double* a) {
    const Frame e = lane.frame(f, t);
    const double x = e.x - origin_p, y = e.y - origin_t;
    const Slopes<double> s = {a[0], a[1], a[2], a[3], a[4]};
    const int64_t i = lane.at(f, t);
    if (q.grad_pred) static_cast<T*>(q.grad_pred)[i] = e.valid ? T(s.pred(x, y)) : T(0);
    if (q.grad_target) static_cast<T*>(q.grad_target)[i] = e.valid ? T(s.target(x, y)) : T(0);
  };
  Linear carry = identity();
  if (!Window) {
    sweep(
        frames, identity(), carry, shared, Compose{},
        [&](Linear& sum, int64_t i) { extend(sum, frames - 1 - i, i ? beside[frames - i] : 1.0); },
        [&](int64_t i, const Linear& sum) { emit(frames - 1 - i, sum.a); });
    return;
  }
  // Frame t was seen by t .. t + window - 1: the rest of its own block and the head of the next.
  sweep(
      frames, identity(), carry, shared, Compose{},
      [&](Linear& sum, int64_t t) { extend(sum, t, t % window ? 1.0 : 0.0); },
      [&](int64_t t, const Linear& sum) {
#pragma unroll
        for (int k = 0; k < kSlopes; ++k) beside[t * kSlopes + k] = sum.a[k];
      });
  carry = identity();
  sweep(
      frames, identity(), carry, shared, Compose{},
      [&](Linear& sum, int64_t i) {
        extend(sum, frames - 1 - i, (frames - 1 - i) % window == window - 1 ? 0.0 : 1.0);
      },
      [&](int64_t i, const Linear& sum) {
        const int64_t t = frames - 1 - i, last = t + window - 1 < frames - 1 ? t + window - 1 : frames - 1;
        double a[kSlopes];
#pragma unroll
        for (int k = 0; k < kSlopes; ++k)
          a[k] = last / window > t / window ? sum.a[k] + beside[last * kSlopes + k] : sum.a[k];
        emit(t, a);
      });
}

// --------------------------------------------------------------------------------------------------- launchers
Call call_of(const char* op, const TemporalCccForward& q, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of (%lld, %lld, %d) %s", op, (long long)q.batch,
           (long long)q.frames, q.channels, dtype_name(q.dtype));
  return call;
}

constexpr size_t kShared = kWarps * sizeof(Past);  // the largest item

}  // namespace

void temporal_ccc_forward(const TemporalCccForward& q, Exec exec) {
  if (!q.batch || !q.channels) return;
  const Call call = call_of("temporal_ccc", q, exec);
  const DeviceGuard guard(exec.where);
  const dim3 grid(grid_x(call, q.batch * q.channels));
  const auto kernel =
      q.dtype == DType::f64
          ? (q.window ? temporal_ccc_kernel<double, true> : temporal_ccc_kernel<double, false>)
          : (q.window ? temporal_ccc_kernel<float, true> : temporal_ccc_kernel<float, false>);
  launch(call, kernel, grid, kThreads, kShared, q);
}

void temporal_ccc_backward(const TemporalCccBackward& q, Exec exec) {
  const TemporalCccForward& f = q.forward;
  if (!f.batch || !f.frames || !f.channels) return;
  const Call call = call_of("temporal_ccc backward", f, exec);
  const DeviceGuard guard(exec.where);
  const dim3 grid(grid_x(call, f.batch * f.channels));
  const auto kernel = f.dtype == DType::f64 ? (f.window ? temporal_ccc_gradient_kernel<double, true>
                                                        : temporal_ccc_gradient_kernel<double, false>)
                                            : (f.window ? temporal_ccc_gradient_kernel<float, true>
                                                        : temporal_ccc_gradient_kernel<float, false>);
  launch(call, kernel, grid, kThreads, kShared, q);
}

}  // namespace sage::cuda
