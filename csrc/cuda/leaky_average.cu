// leaky_average on the GPU.
//
// A block takes 32 channels of a sequence, a lane a channel, and goes through the frames in tiles. In a tile a warp has a
// run of frames, held in registers: it folds them, the folds of all warps meet in shared memory, every warp puts together
// what came before its own run, and goes over its run again from there. So each value is read once, the chain through T
// frames is T / (8 runs) folds long, and a tile costs one barrier (the folds alternate between two places). Which frames
// are folded together depends on T alone: a sequence's bits do not depend on the batch, a channel's not on its neighbours.
//
// What looks both ways goes through the tiles twice: against time for what lies behind each tile, kept in workspace, then
// with it. Backward is the same scan against time, of the gradients that reach each sum; what has no channels (weights,
// counts, scales, and the gradients of precisions and priors) is a scan of its own, a warp a sequence or an average.
//
// Bytes: forward reads D and writes R D numbers a frame, backward reads (2 R + 1) D and writes D; what has no channels adds
// some 8 R numbers a frame. The floor is to move those. Launches: 2 forward, 4 backward.
#include "device.cuh"
#include "../math/leaky_average.h"

namespace sage::cuda {
namespace {

constexpr int kWarps = 8;  // of a block that scans channels
template <class T>
constexpr int kBlocks =
    sizeof(T) == 8 ? 1 : 2;   // of those, side by side on a multiprocessor: what registers allow
constexpr int64_t kRun = 16;  // frames of a lane in a scan without channels, at most

// ----------------------------------------------------------------------------------------------- where things lie
// A sequence's part of the workspace; A: the arithmetic type.
template <class A>
struct Scratch {
  A *weight, *count, *scale;  // (R, T) each
  A* edges;                   // (tiles, R, padded D): what lies beyond each tile
  A* partial;                 // (channel groups, R + 1, T): inner products over 32 channels
  double* grad_prior;         // (R)

  __device__ __forceinline__ Scratch(const LeakyAverageForward& params, int64_t sequence, int64_t own) {
    const int64_t numbers = params.frames * params.averages;
    const int64_t chunks = (params.frames + kLeakyChunkFrames - 1) / kLeakyChunkFrames;
    A* at = reinterpret_cast<A*>(params.workspace + params.batch * params.averages + sequence * own);
    weight = at, count = at + numbers, scale = at + 2 * numbers;
    edges = at + 3 * numbers;
    partial = edges + (params.causal ? 0 : chunks * params.averages * groups(params.dim) * kLeakyChannels);
    grad_prior = params.workspace + sequence * params.averages;
  }
  __device__ __forceinline__ static int64_t groups(int64_t dim) {
    return (dim + kLeakyChannels - 1) / kLeakyChannels;
  }
};

template <class A>
__device__ __forceinline__ double half_life(const LeakyAverageForward& params, int r) {
  return double(static_cast<const A*>(params.halflife)[r]);
}

// ------------------------------------------------------------------------------------- scans of what has no channels
// Two numbers that leak at the same rate: value' = decay value + term. `factor` is the decay over all that was folded.
template <class A>
struct Leak {
  A first, second, factor;
};
template <class A>
__device__ __forceinline__ Leak<A> shuffle_up(const Leak<A>& x, int by) {
  return {__shfl_up_sync(kFull, x.first, by), __shfl_up_sync(kFull, x.second, by),
          __shfl_up_sync(kFull, x.factor, by)};
}
struct JoinLeaks {
  template <class A>
  __device__ __forceinline__ Leak<A> operator()(const Leak<A>& past, const Leak<A>& now) const {
    return {fma(past.first, now.factor, now.first), fma(past.second, now.factor, now.second),
            past.factor * now.factor};
  }
};

// One warp through n steps, each lane a run of them: term(i, first, second) gives what step i adds; visit(i, before, now)
// sees the values around it. `carry`: the values before the first step, becomes those after the last. What the lanes wrote
// to memory is seen by all of them when it returns.
template <class A, class Term, class Visit>
__device__ __forceinline__ void leak(int64_t n, A decay, Leak<A>& carry, const Term& term,
                                     const Visit& visit) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t even = (n + kWarp - 1) / kWarp, run = even < kRun ? even : kRun;
  const auto extend = [&](Leak<A> value, int64_t i) {
    A first(0), second(0);
    term(i, first, second);
    return Leak<A>{fma(decay, value.first, first), fma(decay, value.second, second), value.factor * decay};
  };
  for (int64_t tile = 0; tile < n; tile += run * kWarp) {
    const int64_t begin = tile + run * lane, end = begin + run < n ? begin + run : n;
    Leak<A> mine = {A(0), A(0), A(1)};
    for (int64_t i = begin; i < end; ++i) mine = extend(mine, i);
    const Leak<A> through = warp_scan(mine, lane, JoinLeaks{});
    const Leak<A> left = shuffle_up(through, 1);
    Leak<A> value = lane ? JoinLeaks{}(carry, left) : carry;
    for (int64_t i = begin; i < end; ++i) {
      const Leak<A> before = value;
      value = extend(value, i);
      visit(i, before, value);
    }
    carry = JoinLeaks{}(
        carry, {__shfl_sync(kFull, through.first, kWarp - 1), __shfl_sync(kFull, through.second, kWarp - 1),
                __shfl_sync(kFull, through.factor, kWarp - 1)});
  }
  __syncwarp();  // orders memory: a shuffle is no fence
}

// Weight, count and scale of every frame: a warp a (sequence, average).
template <class A>
__global__ void __launch_bounds__(kWarp, 8) leaky_totals_kernel(LeakyAverageForward params, int64_t own) {
  const int r = int(blockIdx.x % unsigned(params.averages));
  const int64_t sequence = blockIdx.x / unsigned(params.averages), T = params.frames;
  const Scratch<A> scratch(params, sequence, own);
  const A decay = A(exp2(-1.0 / half_life<A>(params, r))), prior = static_cast<const A*>(params.prior)[r];
  const A* precision = static_cast<const A*>(params.precision) + sequence * T;
  A *weight = scratch.weight + r * T, *count = scratch.count + r * T, *scale = scratch.scale + r * T;
  const int64_t state = (sequence * params.averages + r) * (params.dim + 2) + params.dim;
  Leak<A> carry = {A(0), A(0), A(1)};
  if (params.state_in) {
    const A* before = static_cast<const A*>(params.state_in) + state;
    carry.first = before[0], carry.second = before[1];
  }
  const auto set = [&](int64_t t, A w, A n) {
    weight[t] = w, count[t] = n;
    scale[t] = leaky_scale(prior, w, n, params.relative);
  };
  leak<A>(
      T, decay, carry,
      [&](int64_t t, A& w, A& n) {
        w = leaky_weight(A(0), A(0), precision[t]), n = leaky_count(A(0), A(0), precision[t]);
      },
      [&](int64_t t, const Leak<A>&, const Leak<A>& now) { set(t, now.first, now.second); });
  if (params.state_out && threadIdx.x == 0) {
    A* after = static_cast<A*>(params.state_out) + state;
    after[0] = carry.first, after[1] = carry.second;
  }
  if (params.causal) return;
  carry = {A(0), A(0), A(1)};
  leak<A>(
      T, decay, carry,
      [&](int64_t i, A& w, A& n) {
        const A p = precision[T - 1 - i];
        w = leaky_weight(A(0), A(0), p), n = leaky_count(A(0), A(0), p);
      },
      [&](int64_t i, const Leak<A>& later, const Leak<A>&) {
        const int64_t t = T - 1 - i;
        set(t, fma(decay, later.first, weight[t]), fma(decay, later.second, count[t]));
      });
}

// ------------------------------------------------------------------------------------------------ scans of channels
// What a block keeps in shared memory.
template <class A, int Most>
struct Shared {
  A decay[Most], over_run[Most];      // of a frame, of a run
  A fold[2][2][kWarps][Most][kWarp];  // [place][with or against the scan][warp][average][lane]
};

// One block through the steps of a scan over `steps` frames: load(i, term) gives what step i adds to each average's sum in
// this lane's channel, visit(i, sum, other) sees the sum up to and with step i and, unless OneWay, what the steps behind it
// come to as it sees them. `sum` holds the sums before the first step. `edges`: of this lane, `stride` from average to
// average.
template <int Most, int Run, bool OneWay, class A, class Load, class Visit>
__device__ __forceinline__ void scan_channels(int64_t steps, int averages, Shared<A, Most>& shared,
                                              A (&sum)[Most], A* edges, int64_t stride, const Load& load,
                                              const Visit& visit) {
  constexpr int kTile = kWarps * Run;
  static_assert(OneWay || kTile >= kLeakyChunkFrames, "workspace has room for the edges");
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t tiles = (steps + kTile - 1) / kTile;
  A term[Run][Most], decay[Most];
#pragma unroll
  for (int r = 0; r < Most; ++r) decay[r] = shared.decay[r];
  const auto load_run = [&](int64_t tile, bool last_time) {
#pragma unroll
    for (int k = 0; k < Run; ++k) {
      const int64_t i = tile * kTile + warp * Run + k;
#pragma unroll
      for (int r = 0; r < Most; ++r) term[k][r] = A(0);
      if (i < steps) load(i, term[k], last_time);
    }
  };
  // This warp's run as its last step sees it, or, against the scan, as its first step does.
  const auto fold = [&](int place, bool against) {
#pragma unroll
    for (int r = 0; r < Most; ++r) {
      A folded(0);
#pragma unroll
      for (int k = 0; k < Run; ++k) folded = fma(decay[r], folded, term[against ? Run - 1 - k : k][r]);
      shared.fold[place][against][warp][r][lane] = folded;
    }
  };

  int place = 0;
  if (!OneWay) {
    A behind[Most];  // what lies behind the tile, as the step after its last one sees it
#pragma unroll
    for (int r = 0; r < Most; ++r) behind[r] = A(0);
    for (int64_t tile = tiles - 1; tile >= 0; --tile, place ^= 1) {
      if (warp == 0)
#pragma unroll
        for (int r = 0; r < Most; ++r)
          if (r < averages) edges[(tile * averages + r) * stride] = behind[r];
      load_run(tile, false);
      fold(place, true);
      __syncthreads();
#pragma unroll
      for (int w = kWarps - 1; w >= 0; --w)
#pragma unroll
        for (int r = 0; r < Most; ++r)
          behind[r] = fma(shared.over_run[r], behind[r], shared.fold[place][1][w][r][lane]);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile, place ^= 1) {
    load_run(tile, true);
    fold(place, false);
    if (!OneWay) fold(place, true);
    __syncthreads();
    A here[Most], other[Run][Most];
#pragma unroll
    for (int r = 0; r < Most; ++r) here[r] = sum[r];
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
#pragma unroll
      for (int r = 0; r < Most; ++r) {
        if (w == warp) here[r] = sum[r];
        sum[r] = fma(shared.over_run[r], sum[r], shared.fold[place][0][w][r][lane]);
      }
    if (!OneWay) {
#pragma unroll
      for (int r = 0; r < Most; ++r) {
        A behind = r < averages ? edges[(tile * averages + r) * stride] : A(0);
        for (int w = kWarps - 1; w > warp; --w)
          behind = fma(shared.over_run[r], behind, shared.fold[place][1][w][r][lane]);
#pragma unroll
        for (int k = Run - 1; k >= 0; --k) {
          other[k][r] = decay[r] * behind;
          behind = other[k][r] + term[k][r];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < Run; ++k) {
      const int64_t i = tile * kTile + warp * Run + k;
#pragma unroll
      for (int r = 0; r < Most; ++r) {
        here[r] = fma(decay[r], here[r], term[k][r]);
        if (OneWay) other[k][r] = A(0);
      }
      if (i < steps) visit(i, here, other[k]);
    }
  }
}

// Which channel of which sequence a lane has.
struct Place {
  int64_t sequence, group, channel;
  bool inside;
  __device__ __forceinline__ explicit Place(int64_t dim) {
    const int64_t groups = (dim + kLeakyChannels - 1) / kLeakyChannels;
    sequence = blockIdx.x / groups, group = blockIdx.x % groups;
    channel = group * kLeakyChannels + threadIdx.x % kWarp;
    inside = channel < dim;
  }
};

template <class A, int Most>
__device__ __forceinline__ Shared<A, Most>& begin_scan(const LeakyAverageForward& params, int run) {
  Shared<A, Most>& shared = *shared_memory<Shared<A, Most>>();
  const int r = int(threadIdx.x);
  if (r < Most) {
    const double rate = r < params.averages ? -1.0 / half_life<A>(params, r) : 0.0;
    shared.decay[r] = A(exp2(rate)), shared.over_run[r] = A(exp2(double(run) * rate));
  }
  __syncthreads();
  return shared;
}

// The sums' part of a state, one channel: `to`[r] from it, or zeros.
template <class A, int Most>
__device__ __forceinline__ void read_sums(const void* state, const LeakyAverageForward& params,
                                          const Place& place, A (&to)[Most]) {
#pragma unroll
  for (int r = 0; r < Most; ++r) {
    to[r] = A(0);
    if (state && place.inside && r < params.averages)
      to[r] = static_cast<const A*>(
          state)[(place.sequence * params.averages + r) * (params.dim + 2) + place.channel];
  }
}
template <class A, int Most>
__device__ __forceinline__ void write_sums(void* state, const LeakyAverageForward& params, const Place& place,
                                           const A (&from)[Most]) {
#pragma unroll
  for (int r = 0; r < Most; ++r)
    if (place.inside && r < params.averages)
      static_cast<A*>(state)[(place.sequence * params.averages + r) * (params.dim + 2) + place.channel] =
          from[r];
}

template <class T, int Most, int Run, bool Causal>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>)
    leaky_average_kernel(LeakyAverageForward params, int64_t own) {
  using A = ArithmeticOf<T>;
  const int64_t T_ = params.frames, D = params.dim;
  const int R = params.averages;
  const Place place(D);
  const Scratch<A> scratch(params, place.sequence, own);
  Shared<A, Most>& shared = begin_scan<A, Most>(params, Run);
  const A* precision = static_cast<const A*>(params.precision) + place.sequence * T_;
  const T* x = static_cast<const T*>(params.x) + place.sequence * T_ * D + place.channel;
  T* average = static_cast<T*>(params.average) + place.sequence * T_ * R * D + place.channel;
  A sum[Most];
  read_sums(params.state_in, params, place, sum);
  if (T_ == 0 && threadIdx.x < kWarp) write_sums(params.state_out, params, place, sum);
  scan_channels<Most, Run, Causal>(
      T_, R, shared, sum, scratch.edges + place.channel, Scratch<A>::groups(D) * kLeakyChannels,
      [&](int64_t t, A(&term)[Most], bool) {
        const A added = place.inside ? leaky_term(precision[t], A(widen(x[t * D]))) : A(0);
#pragma unroll
        for (int r = 0; r < Most; ++r) term[r] = added;
      },
      [&](int64_t t, const A(&upto)[Most], const A(&behind)[Most]) {
        if (!place.inside) return;
#pragma unroll
        for (int r = 0; r < Most; ++r)
          if (r < R) narrow((upto[r] + behind[r]) * scratch.scale[r * T_ + t], average[(t * R + r) * D]);
        if (t == T_ - 1) write_sums(params.state_out, params, place, upto);
      });
}

template <class T, int Most, int Run, bool Causal>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<T>)
    leaky_average_gradient_kernel(LeakyAverageBackward params, int64_t own) {
  using A = ArithmeticOf<T>;
  const LeakyAverageForward& forward = params.forward;
  const int64_t T_ = forward.frames, D = forward.dim;
  const int R = forward.averages, lane = int(threadIdx.x) % kWarp;
  const Place place(D);
  const Scratch<A> scratch(forward, place.sequence, own);
  Shared<A, Most>& shared = begin_scan<A, Most>(forward, Run);
  const A* precision = static_cast<const A*>(forward.precision) + place.sequence * T_;
  const T* x = static_cast<const T*>(forward.x) + place.sequence * T_ * D + place.channel;
  const int64_t averages_at = place.sequence * T_ * R * D + place.channel;
  const T* average = static_cast<const T*>(forward.average) + averages_at;
  const T* grad_average =
      params.grad_average ? static_cast<const T*>(params.grad_average) + averages_at : nullptr;
  T* grad_x = static_cast<T*>(params.grad_x) + place.sequence * T_ * D + place.channel;
  A* partial = scratch.partial + place.group * (R + 1) * T_;
  A last[Most], sum[Most];  // what reaches the sums after the last frame: part of that frame's own gradient
  read_sums(params.grad_state_out, forward, place, last);
  if (T_ == 0 && params.grad_state_in && threadIdx.x < kWarp)
    write_sums(params.grad_state_in, forward, place, last);
#pragma unroll
  for (int r = 0; r < Most; ++r) sum[r] = A(0);
  scan_channels<Most, Run, Causal>(
      T_, R, shared, sum, scratch.edges + place.channel, Scratch<A>::groups(D) * kLeakyChannels,
      [&](int64_t i, A(&term)[Most], bool last_time) {
        const int64_t t = T_ - 1 - i;
#pragma unroll
        for (int r = 0; r < Most; ++r) {
          if (r >= R) continue;  // the same for all lanes
          A given(0), found(0);
          if (grad_average && place.inside) given = A(widen(grad_average[(t * R + r) * D]));
          if (last_time) {
            if (grad_average && place.inside) found = A(widen(average[(t * R + r) * D]));
            const A dot = lanes_sum<1, kWarp>(given * found);
            if (lane == 0) partial[r * T_ + t] = dot;
          }
          term[r] = fma(given, scratch.scale[r * T_ + t], t == T_ - 1 ? last[r] : A(0));
        }
      },
      [&](int64_t i, const A(&upto)[Most], const A(&behind)[Most]) {
        const int64_t t = T_ - 1 - i;
        const A p = precision[t];
        A whole(0);  // gradient of the term that this frame adds to every average's sum
#pragma unroll
        for (int r = 0; r < Most; ++r) whole += r < R ? upto[r] + behind[r] : A(0);
        const bool seen = place.inside && !(p <= A(0));
        const A to_precision = lanes_sum<1, kWarp>(seen ? whole * A(widen(x[t * D])) : A(0));
        if (lane == 0) partial[R * T_ + t] = to_precision;
        if (place.inside) narrow(leaky_term(p, whole), grad_x[t * D]);
        if (t == 0 && params.grad_state_in) {
          A before[Most];
#pragma unroll
          for (int r = 0; r < Most; ++r) before[r] = shared.decay[r] * upto[r];
          write_sums(params.grad_state_in, forward, place, before);
        }
      });
}

// Gradients of the precisions, of the weights and counts before the first frame, and of this sequence's priors: a warp a
// sequence.
template <class A>
__global__ void __launch_bounds__(kWarp, 8) leaky_precision_kernel(LeakyAverageBackward params, int64_t own) {
  const LeakyAverageForward& forward = params.forward;
  const int64_t sequence = blockIdx.x, T = forward.frames, groups = Scratch<A>::groups(forward.dim);
  const int R = forward.averages, lane = int(threadIdx.x);
  const Scratch<A> scratch(forward, sequence, own);
  const A* precision = static_cast<const A*>(forward.precision) + sequence * T;
  A* grad = static_cast<A*>(params.grad_precision) + sequence * T;
  const auto over_channels = [&](int k, int64_t t) {
    A sum(0);
    for (int64_t g = 0; g < groups; ++g) sum += scratch.partial[(g * (R + 1) + k) * T + t];
    return sum;
  };
  for (int64_t t = lane; t < T; t += kWarp) grad[t] = over_channels(R, t);
  for (int r = 0; r < R; ++r) {
    const A decay = A(exp2(-1.0 / half_life<A>(forward, r))), prior = static_cast<const A*>(forward.prior)[r];
    A *weight = scratch.weight + r * T, *count = scratch.count + r * T;
    const A* scale = scratch.scale + r * T;
    double to_prior = 0;
    for (int64_t t = lane; t < T; t += kWarp) {  // in place of weight and count come their gradients
      const LeakyScaleGradient<A> found =
          leaky_scale_gradient(prior, weight[t], count[t], scale[t], over_channels(r, t), forward.relative);
      weight[t] = found.weight, count[t] = found.count;
      to_prior += double(found.prior);
    }
    to_prior = lanes_sum<1, kWarp>(to_prior);
    if (lane == 0) scratch.grad_prior[r] = to_prior;
    __syncwarp();  // orders memory: a shuffle is no fence

    const int64_t state = (sequence * R + r) * (forward.dim + 2) + forward.dim;
    Leak<A> last = {A(0), A(0), A(1)}, carry = last;
    if (params.grad_state_out) {
      const A* given = static_cast<const A*>(params.grad_state_out) + state;
      last.first = given[0], last.second = given[1];
    }
    leak<A>(
        T, decay, carry,
        [&](int64_t i, A& w, A& n) {
          const int64_t t = T - 1 - i;
          w = weight[t] + (i ? A(0) : last.first), n = count[t] + (i ? A(0) : last.second);
        },
        [&](int64_t i, const Leak<A>&, const Leak<A>& now) { grad[T - 1 - i] += now.first; });
    if (params.grad_state_in && lane == 0) {
      A* before = static_cast<A*>(params.grad_state_in) + state;
      before[0] = T ? decay * carry.first : last.first, before[1] = T ? decay * carry.second : last.second;
    }
    if (forward.causal) continue;
    carry = {A(0), A(0), A(1)};
    leak<A>(
        T, decay, carry, [&](int64_t t, A& w, A&) { w = weight[t]; },
        [&](int64_t t, const Leak<A>& before, const Leak<A>&) {
          grad[t] = fma(decay, before.first, grad[t]);
        });
  }
  for (int64_t t = lane; t < T; t += kWarp)
    if (precision[t] <= A(0)) grad[t] = A(0);  // what was not read has no gradient
}

// The sequences' shares of the priors' gradients, added up in a fixed order: a warp an average.
template <class A>
__global__ void __launch_bounds__(kMaxAverages* kWarp) leaky_prior_kernel(LeakyAverageBackward params) {
  const LeakyAverageForward& forward = params.forward;
  const int r = int(threadIdx.x) / kWarp;
  double sum = 0;
  for (int64_t b = threadIdx.x % kWarp; b < forward.batch; b += kWarp)
    sum += forward.workspace[b * forward.averages + r];
  sum = lanes_sum<1, kWarp>(sum);
  if (threadIdx.x % kWarp == 0) static_cast<A*>(params.grad_prior)[r] = A(sum);
}

// ------------------------------------------------------------------------------------------------------- launchers
Call call_of(const char* op, const LeakyAverageForward& params, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of (%lld, %lld, %lld), %d averages, %s", op,
           (long long)params.batch, (long long)params.frames, (long long)params.dim, params.averages,
           dtype_name(params.dtype));
  return call;
}

int64_t own_doubles(const LeakyAverageForward& params) {  // of a sequence in the workspace
  return leaky_average_workspace(1, params.frames, params.dim, params.averages, params.causal) -
         params.averages;
}

template <class A>
void totals(const LeakyAverageForward& params, const Call& call) {
  launch(call, leaky_totals_kernel<A>, dim3(grid_x(call, params.batch * params.averages)), kWarp, 0, params,
         own_doubles(params));
}

// Few averages leave registers for longer runs.
template <class T, int Most>
void forward_most(const LeakyAverageForward& params, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kLong = sizeof(T) == 8 ? 4 : 48 / Most, kShort = sizeof(T) == 8 ? 4 : 32 / Most;
  const int64_t blocks = params.batch * ((params.dim + kLeakyChannels - 1) / kLeakyChannels);
  totals<A>(params, call);
  if (!blocks) return;
  launch(call,
         params.causal ? leaky_average_kernel<T, Most, kLong, true>
                       : leaky_average_kernel<T, Most, kShort, false>,
         dim3(grid_x(call, blocks)), kWarps * kWarp, sizeof(Shared<A, Most>), params, own_doubles(params));
}
template <class T, int Most>
void backward_most(const LeakyAverageBackward& params, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kSteps = sizeof(T) == 8 ? 4 : 32 / Most;
  const LeakyAverageForward& forward = params.forward;
  const int64_t blocks = forward.batch * ((forward.dim + kLeakyChannels - 1) / kLeakyChannels),
                own = own_doubles(forward);
  LeakyAverageForward again = forward;
  again.state_out = nullptr;
  totals<A>(again, call);
  if (blocks)
    launch(call,
           forward.causal ? leaky_average_gradient_kernel<T, Most, kSteps, true>
                          : leaky_average_gradient_kernel<T, Most, kSteps, false>,
           dim3(grid_x(call, blocks)), kWarps * kWarp, sizeof(Shared<A, Most>), params, own);
  launch(call, leaky_precision_kernel<A>, dim3(grid_x(call, forward.batch)), kWarp, 0, params, own);
  launch(call, leaky_prior_kernel<A>, dim3(1), forward.averages * kWarp, 0, params);
}

// The reference model keeps three averages; other numbers than up to four are rare, and each kernel costs build time.
template <class T>
void forward_all(const LeakyAverageForward& params, const Call& call) {
  params.averages <= 4 ? forward_most<T, 4>(params, call) : forward_most<T, 8>(params, call);
}
template <class T>
void backward_all(const LeakyAverageBackward& params, const Call& call) {
  params.forward.averages <= 4 ? backward_most<T, 4>(params, call) : backward_most<T, 8>(params, call);
}

}  // namespace

#define SAGE_BY_TYPE(dtype, all, params)       \
  switch (dtype) {                             \
    case DType::f32:                           \
      return all<float>(params, call);         \
    case DType::f64:                           \
      return all<double>(params, call);        \
    case DType::f16:                           \
      return all<__half>(params, call);        \
    case DType::bf16:                          \
      return all<__nv_bfloat16>(params, call); \
  }

void leaky_average_forward(const LeakyAverageForward& params, Exec exec) {
  if (!params.batch) return;
  const Call call = call_of("leaky_average", params, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(params.dtype, forward_all, params)
}

void leaky_average_backward(const LeakyAverageBackward& params, Exec exec) {
  if (!params.forward.batch) return;
  const Call call = call_of("leaky_average backward", params.forward, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(params.forward.dtype, backward_all, params)
}

}  // namespace sage::cuda
