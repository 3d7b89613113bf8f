// stage_filter on the GPU.
//
// A sequence is a group of 4 lanes (float32, S <= 4) or 16, a lane a stage; state in registers, emissions loaded some
// frames ahead. Bytes: forward reads S and writes S numbers a frame (2 S with the log-belief), backward reads 3 S and
// writes S. Memory is not the floor: that is the chain of one frame, exchange p, S multiply-adds, total, reciprocal.
// So logarithms stay off the chain, and so does the total: with e the emission of a stage, p its probability up to a
// factor and a[i][j] the probability of going from stage i to j,
//   p'[j] = sum_j w[j],  sum_j = sum_i p[i] a[i][j],  w[j] = exp(e[j] - max e),  total = sum_j p'[j],
// of which p' / total is a frame's posterior, and p is divided by it only every kFramesAhead frames. These frames are computed
// without a test and judged together: where a sum could have lost terms to underflow (math/stage_filter.h, kSafeSum), or a
// frame's evidence is so far against the prior that total falls, all of them are taken again as stage_step does it, in log
// space, by the groups of lanes that need it; the others keep what they have.
//
// Long sequences (by T alone, so a sequence's bits do not depend on the batch) are cut into chunks. Three launches:
//   1  every chunk from every certain start i: its last log-belief and the log-likelihood L_i of its evidence
//   2  each chunk's true start, in order: belief' = log_softmax_j logsumexp_i (belief[i] + L_i + last_i[j])
//   3  every chunk again from its true start, writing posteriors
// The summaries of launch 1 and the starts of launch 2 need no memory of their own: they lie in the output, in the
// place of the chunk's posterior (in backward, of its emission gradient), which launch 3 then writes over them.
// Backward is linear in the gradient that arrives at a chunk's end, so the same three launches serve it.
#include <type_traits>

#include "device.cuh"
#include "../math/stage_filter.h"

namespace sage::cuda {
namespace {

// Frames whose numbers are loaded together, and judged together: what registers allow.
template <class T>
constexpr int kFramesAhead = 32 / int(sizeof(T));
constexpr int kFlushFrames = 64;  // transition gradients: sums this long, then double
constexpr double kLikely = 1e-6;  // a frame that leaves less of the total: the evidence contradicts the prior

// ------------------------------------------------------------------------------- one job: a chunk from one start
struct Cut {  // how a sequence is cut
  int64_t frames, chunks;
  __host__ __device__ __forceinline__ int64_t begin(int64_t chunk) const { return chunk * kStageChunkFrames; }
  __host__ __device__ __forceinline__ int frames_of(int64_t chunk) const {
    return int((chunk + 1 < chunks ? begin(chunk + 1) : frames) - begin(chunk));
  }
};

template <class T>
__device__ __forceinline__ T nothing() {
  return T(kImpossible);
}

// log_softmax of the transition's rows into shared memory: log_a[S * S], and a as columns for a stage's lane (to
// stage j) and as lines (from stage j), L numbers for each of the L lanes, zeros past S.
template <class T, int L>
__device__ __forceinline__ void read_transition(const T* logits, int S, T* log_a, T* column, T* line) {
  for (int k = int(threadIdx.x); k < L * L; k += kWarp) column[k] = line[k] = T(0);
  __syncthreads();
  const int i = int(threadIdx.x);
  if (i < S) {
    transition_row(S, logits + i * S, [&](int j, double l) {
      log_a[i * S + j] = finite_logit(T(l));
      column[i * L + j] = line[j * L + i] = T(exp(l));
    });
  }
  __syncthreads();
}

// A lane's numbers a[0 .. L): in registers where there are few, else left in shared memory.
template <class T, int L>
struct Row {
  const T* at;
  __device__ __forceinline__ Row(const T* table, int j) : at(table + j) {}
  __device__ __forceinline__ T operator[](int i) const { return at[i * L]; }
};
template <class T>
struct Row<T, 4> {
  T x[4];
  __device__ __forceinline__ Row(const T* table, int j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = table[i * 4 + j];
  }
  __device__ __forceinline__ T operator[](int i) const { return x[i]; }
};

// All of a group's numbers in every lane.
template <int L, class T>
__device__ __forceinline__ void gather(T x, T* all) {
  const int base = int(threadIdx.x) % kWarp / L * L;
#pragma unroll
  for (int i = 0; i < L; ++i) all[i] = __shfl_sync(kFull, x, base + i);
}
template <int L, class T>
__device__ __forceinline__ T sum_of(const T* x) {
  T total = x[0];
#pragma unroll
  for (int i = 1; i < L; ++i) total += x[i];
  return total;
}
template <int L, class T>
__device__ __forceinline__ T max_of(const T* x) {
  T peak = x[0];
#pragma unroll
  for (int i = 1; i < L; ++i) peak = max(peak, x[i]);
  return peak;
}

// One lane's view of a group: which sequence, chunk and start it works on, and its stage.
template <int L>
struct Job {
  int64_t sequence, chunk;
  int start, stage;
  bool real;  // a group past the last job repeats it and writes nothing
  __device__ __forceinline__ Job(int64_t jobs, int64_t chunks, int starts) {
    const int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / L;
    const int64_t job = group < jobs ? group : jobs - 1;
    real = group < jobs;
    start = int(job % starts);
    chunk = job / starts % chunks;
    sequence = job / starts / chunks;
    stage = int(threadIdx.x) % L;
  }
};

// log_softmax(initial) of a lane's stage, and its exponential.
template <int L, class T>
__device__ __forceinline__ void initial_belief(const T* initial, int64_t stride, int64_t sequence, int stage,
                                               int S, T& belief, T& p) {
  T all[L];
  const bool inside = stage < S;
  const T own = inside ? (initial ? finite_logit(initial[sequence * stride + stage]) : T(0)) : nothing<T>();
  gather<L>(own, all);
  const T peak = max_of<L>(all);
  T total(0);
#pragma unroll
  for (int i = 0; i < L; ++i) total += i < S ? exp(all[i] - peak) : T(0);
  belief = nothing<T>(), p = T(0);
  if (!inside) return;
  belief = own - peak - log(total);
  p = exp(belief);
}

// Where chunk c of sequence b keeps its summary: S starts of S + 2 numbers (belief, log-likelihood in two parts), or
// backward's S + 1 starts of S; then its true start, S numbers.
template <class T>
__device__ __forceinline__ T* summary(void* buffer, const Cut& cut, int64_t sequence, int64_t chunk, int S) {
  return static_cast<T*>(buffer) + (sequence * cut.frames + cut.begin(chunk)) * S;
}

// ------------------------------------------------------------------------------------------------------ forward
enum class Pass { whole, summarise, replay };

// Numbers of some frames of a lane's stage, as they lie in memory: asked for all at once, looked at later. `at(k)`: the
// place of frame k's number.
template <int kAhead, class T, class At>
__device__ __forceinline__ void ask_all(T (&x)[kAhead], const T* from, const At& at) {
#pragma unroll
  for (int k = 0; k < kAhead; ++k) x[k] = from[at(k)];
}

// The hardware's minimum and maximum: a NaN loses, so whoever uses them sees to NaN in another way.
__device__ __forceinline__ float least(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double least(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float most_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double most_of(double a, double b) { return fmax(a, b); }

// Beliefs: params.belief is wanted.
template <class T, int L, Pass kPass, bool Beliefs>
__global__ void __launch_bounds__(kWarp, 8) stage_filter_kernel(StageFilterForward params, Cut cut) {
  constexpr bool kSummarise = kPass == Pass::summarise;
  constexpr int kAhead = kFramesAhead<T>;
  const int S = params.stages;
  T *log_a = shared_memory<T>(), *columns = log_a + S * S, *lines = columns + L * L;
  const int starts = kSummarise ? S : 1;
  const Job<L> job(params.batch * cut.chunks * starts, cut.chunks, starts);
  const int j = job.stage;
  const bool inside = j < S;
  const int64_t begin = cut.begin(job.chunk);
  // Frames of this chunk and the longest one's: groups of a warp go through as many (only the last chunk is longer).
  const int frames = cut.frames_of(job.chunk);
  const int most = kPass == Pass::whole ? frames : cut.frames_of(cut.chunks - 1);

  // A lane past the last stage reads the last stage's numbers, which change no maximum, and multiplies them by 0; a frame
  // past the last one is the last one: every load is in bounds and none waits for a test.
  const int64_t first = job.sequence * params.frames + begin;
  const T* emission = static_cast<const T*>(params.emission) + first * S + (inside ? j : S - 1);
  const uint8_t* mask = params.mask ? params.mask + first : nullptr;
  T asked[kAhead] = {};
  uint8_t counts[kAhead] = {};
  const auto ask = [&](int t0) {
    const auto frame = [&](int k) { return t0 + k < frames ? t0 + k : frames - 1; };
    ask_all(asked, emission, [&](int k) { return frame(k) * S; });
    if (mask) ask_all(counts, mask, frame);
  };
  if (most > 0) ask(0);

  read_transition<T, L>(static_cast<const T*>(params.transition), S, log_a, columns, lines);
  const Row<T, L> a(columns, j);  // into this stage
  T* const scratch =
      kPass == Pass::whole ? nullptr : summary<T>(params.posterior, cut, job.sequence, job.chunk, S);
  T belief, p;  // of this lane's stage
  double likelihood = 0;
  if (kPass == Pass::whole) {
    initial_belief<L>(static_cast<const T*>(params.initial), params.initial_stride, job.sequence, j, S,
                      belief, p);
  } else if (kSummarise) {
    belief = j == job.start ? T(0) : nothing<T>();
    p = j == job.start ? T(1) : T(0);
  } else {
    belief = inside ? scratch[S * (S + 2) + j] : nothing<T>();
    p = inside ? exp(belief) : T(0);
    __syncwarp();  // orders memory: the first posterior overwrites what a group past the last job has read too
  }

  const bool writes = !kSummarise && job.real && inside;
  T* const posterior = static_cast<T*>(params.posterior) + first * S + j;
  T* const beliefs = Beliefs ? static_cast<T*>(params.belief) + first * S + j : nullptr;
#pragma unroll 1
  for (int t0 = 0; t0 < most; t0 += kAhead) {
    T e[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) e[k] = finite_logit(asked[k]);
    if (mask) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) e[k] = counts[k] ? e[k] : T(0);
    }
    ask(t0 + kAhead);  // while these are worked on
    T all[L], own = p, sum(1), off(0), total(1), smallest(1), likeliest(1);
    double peaks = 0;
    gather<L>(p, all);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (t0 + k >= most) break;                                  // the same for all lanes
      const bool live = kPass == Pass::whole || t0 + k < frames;  // else nothing moves
      T peak = e[k];
#pragma unroll
      for (int o = 1; o < L; o *= 2) peak = most_of(peak, __shfl_xor_sync(kFull, peak, o));
      T into(0);
#pragma unroll
      for (int i = 0; i < L; ++i) into = fma(all[i], a[i], into);
      const T before = total;
      if (live) off = e[k] - peak, sum = into, own = into * exp(off);
      gather<L>(own, all);  // total is NaN from where anything is
      total = sum_of<L>(all);
      if (live) {
        smallest = least(smallest, sum), likeliest = least(likeliest, fma(T(-kLikely), before, total));
        if (kSummarise) peaks += double(peak);
        const T inverse = reciprocal(total);
        if (writes) {
          posterior[(t0 + k) * S] = own * inverse;
          if (Beliefs) beliefs[(t0 + k) * S] = log(sum * inverse) + off;
        }
      }
    }
    const T inverse = reciprocal(total);
    T now = log(sum * inverse) + off, next = own * inverse;
    double gained = kSummarise ? peaks + double(log(total)) : 0;
    if (kPass != Pass::whole && t0 >= frames)
      now = belief, next = p, gained = 0;  // none of these frames is here
    const bool bad = (inside && !(smallest >= T(kSafeSum))) || !(likeliest >= T(0)) || !(total >= T(0));
    const unsigned failed = __ballot_sync(kFull, bad);
    if (failed) {  // as math/stage_filter.h's stage_step, a lane a stage
      const bool again = (failed >> (int(threadIdx.x) % kWarp / L * L) & ((1u << L) - 1)) != 0;  // this group
      T belief_again = belief, p_again = p;
      double gained_again = 0;
#pragma unroll 1
      for (int t = t0; t < t0 + kAhead && t < most; ++t) {
        const int at = t < frames ? t : frames - 1;
        const T x = inside && (!mask || mask[at]) ? finite_logit(emission[at * S]) : T(0);
        T peak = inside ? x : nothing<T>();
#pragma unroll
        for (int o = 1; o < L; o *= 2) peak = max(peak, __shfl_xor_sync(kFull, peak, o));
        gather<L>(p_again, all);
        T into(0);
#pragma unroll
        for (int i = 0; i < L; ++i) into = fma(all[i], a[i], into);
        gather<L>(belief_again, all);
        const T prior =
            into >= T(kSafeSum) || !inside ? log(into) : stage_prior_exact<T, T, L>(S, all, log_a, j);
        const T score = inside ? prior + (x - peak) : nothing<T>();
        gather<L>(score, all);
        const T best = max_of<L>(all);
        T mass(0);
#pragma unroll
        for (int i = 0; i < L; ++i) mass += i < S ? exp(all[i] - best) : T(0);
        if (t < frames) {
          belief_again = score - best - log(mass);
          p_again = inside ? exp(score - best) / mass : T(0);
          if (kSummarise) gained_again += double(peak) + double(best + log(mass));
          if (again && writes) {
            posterior[t * S] = p_again;
            if (Beliefs) beliefs[t * S] = belief_again;
          }
        }
      }
      if (again) now = belief_again, next = p_again, gained = gained_again;
    }
    belief = now, p = next, likelihood += gained;
  }
  if (!job.real || !inside) return;
  if (kSummarise) {
    T* out = scratch + job.start * (S + 2);
    out[j] = belief;
    if (j == 0) {
      const T high = T(likelihood);
      out[S] = high;
      out[S + 1] = T(likelihood - double(high));
    }
  } else if (job.chunk == cut.chunks - 1) {
    static_cast<T*>(params.final_belief)[job.sequence * S + j] = belief;
  }
}

// Launch 2: a group a sequence, chunk after chunk.
template <class T, int L>
__global__ void __launch_bounds__(kWarp, 8) stage_filter_chain_kernel(StageFilterForward params, Cut cut) {
  const int S = params.stages;
  const Job<L> job(params.batch, 1, 1);
  const int j = job.stage;
  const bool inside = j < S;
  T belief, unused;
  initial_belief<L>(static_cast<const T*>(params.initial), params.initial_stride, job.sequence, j, S, belief,
                    unused);
  for (int64_t c = 0; c < cut.chunks; ++c) {
    T* const s = summary<T>(params.posterior, cut, job.sequence, c, S);
    if (job.real && inside) s[S * (S + 2) + j] = belief;
    // Lane i weighs start i; likelihoods are told apart in double, however large.
    double weight =
        inside ? double(belief) + double(s[j * (S + 2) + S]) + double(s[j * (S + 2) + S + 1]) : -1e300;
    double peak = weight;
#pragma unroll
    for (int o = 1; o < L; o *= 2) peak = max(peak, __shfl_xor_sync(kFull, peak, o));
    T weights[L];
    gather<L>(inside ? T(max(weight - peak, -1e30)) : nothing<T>(), weights);
    T scores[L], total(0), score = nothing<T>();
    if (inside) score = log_sum_exp<T, L>(S, [&](int i) { return weights[i] + s[i * (S + 2) + j]; });
    gather<L>(score, scores);
    const T best = max_of<L>(scores);
#pragma unroll
    for (int i = 0; i < L; ++i) total += i < S ? exp(scores[i] - best) : T(0);
    belief = inside ? score - best - log(total) : nothing<T>();
  }
}

// ----------------------------------------------------------------------------------------------------- backward
// As stage_step_backward, a lane a stage. Starts of a chunk's summary: gradient 0 arriving with the outputs' own
// gradients (start S), or unit gradient i arriving without them (start i < S). `flows`: (B, chunks, S, S) of
// workspace.
template <class T, int L, Pass kPass>
__global__ void __launch_bounds__(kWarp, 8)
    stage_filter_gradient_kernel(StageFilterBackward params, Cut cut) {
  constexpr bool kSummarise = kPass == Pass::summarise;
  constexpr int kAhead = 8;
  constexpr bool kTogether = sizeof(T) == 4;  // float64, of twice the registers, goes frame by frame
  const int S = params.stages;
  T *log_a = shared_memory<T>(), *columns = log_a + S * S, *lines = columns + L * L;
  const int starts = kSummarise ? S + 1 : 1;
  const Job<L> job(params.batch * cut.chunks * starts, cut.chunks, starts);
  const int j = job.stage;
  const bool inside = j < S;
  const int64_t begin = cut.begin(job.chunk);
  const int frames = cut.frames_of(job.chunk);
  const int most = kPass == Pass::whole ? frames : cut.frames_of(cut.chunks - 1);

  // As in forward every load is in bounds and none waits for a test: lanes past the last stage and frames before the first
  // one read numbers of which nothing is made. Frames are counted in the chunk; frame k of a block is n0 + k before its last.
  const int64_t first = job.sequence * params.frames + begin, at = first * S + (inside ? j : S - 1);
  const bool start = begin == 0;  // of the sequence
  const T *posterior = static_cast<const T*>(params.posterior) + at,
          *emission = static_cast<const T*>(params.emission) + at;
  const bool driven = !kSummarise || job.start == S;  // do the outputs' gradients enter?
  const T* grad_posterior =
      params.grad_posterior ? static_cast<const T*>(params.grad_posterior) + at : nullptr;
  const uint8_t* mask = params.mask ? params.mask + first : nullptr;
  T asked_p[kAhead] = {}, asked_g[kAhead] = {}, asked_e[kAhead] = {};
  uint8_t counts[kAhead] = {};
  const auto ask = [&](int n0) {
    const auto frame = [&](int k) { return frames - 1 - (n0 + k) > 0 ? frames - 1 - (n0 + k) : 0; };
    ask_all(asked_p, posterior, [&](int k) { return start && frame(k) == 0 ? 0 : (frame(k) - 1) * S; });
    if (grad_posterior) ask_all(asked_g, grad_posterior, [&](int k) { return frame(k) * S; });
    if (kSummarise) return;
    ask_all(asked_e, emission, [&](int k) { return frame(k) * S; });
    if (mask) ask_all(counts, mask, frame);
  };
  if (kTogether && most > 0) ask(0);

  read_transition<T, L>(static_cast<const T*>(params.transition), S, log_a, columns, lines);
  const Row<T, L> column(columns, j), line(lines, j);  // into this stage, and out of it
  T* const scratch =
      kPass == Pass::whole ? nullptr : summary<T>(params.grad_emission, cut, job.sequence, job.chunk, S);
  T grad(0);
  if (kPass == Pass::whole) {
    if (params.grad_final && inside) grad = static_cast<const T*>(params.grad_final)[job.sequence * S + j];
  } else if (kSummarise) {
    grad = j == job.start && inside ? T(1) : T(0);
  } else {
    grad = inside ? scratch[(S + 1) * S + j] : T(0);
    __syncwarp();  // orders memory: the first gradient overwrites what a group past the last job has read too
  }
  T first_belief, first_p;
  initial_belief<L>(static_cast<const T*>(params.initial), params.initial_stride, job.sequence, j, S,
                    first_belief, first_p);

  T flow[L];
  double flows[L];
#pragma unroll
  for (int i = 0; i < L; ++i) flow[i] = T(0), flows[i] = 0;
  T p_now = inside && frames > 0 ? posterior[(frames - 1) * S] : T(0);
  T* const grad_emission = static_cast<T*>(params.grad_emission) + at;
  // One frame: `before` is the last frame's probability of this stage, g_out the gradient of this frame's. Careful: some
  // lane's sum may be lost. Both kinds of frame round alike, for a warp takes the careful one on account of any sequence.
  const auto frame = [&](int t, T before, T g_out, T raw, bool counted, auto careful) {
    const bool live = kPass == Pass::whole || t >= 0;
    T p[L], grads[L], share[L];
    gather<L>(before, p);
    T sum(0);
#pragma unroll
    for (int i = 0; i < L; ++i) sum = fma(p[i], column[i], sum);
    const bool lost = careful.value && live && inside && !(sum >= T(kSafeSum));
    const T arriving = fma(g_out, p_now, grad);
    gather<L>(arriving, grads);
    const T g = inside ? fma(-p_now, sum_of<L>(grads), arriving) : T(0);
    const T h = lost || !inside ? T(0) : g * reciprocal(sum);
    gather<L>(h, share);
    T back(0);
#pragma unroll
    for (int i = 0; i < L; ++i) back = fma(line[i], share[i], back);
    back *= before;
    if (careful.value && __any_sync(kFull, lost)) {
      T last = nothing<T>();
      if (inside && live)
        last = start && t == 0 ? first_belief : static_cast<const T*>(params.belief)[at + (t - 1) * S];
      T all[L], theirs[L];
      gather<L>(last, all);
      T prior(0);
      if (lost) {
        prior = stage_prior_exact<T, T, L>(S, all, log_a, j);
#pragma unroll
        for (int i = 0; i < L; ++i)
          if (i < S) flow[i] += exp(all[i] + log_a[i * S + j] - prior) * g;
      }
      gather<L>(lost ? prior : T(0), all);
      gather<L>(lost ? g : T(0), theirs);
#pragma unroll
      for (int i = 0; i < L; ++i)  // where lane i's sum was lost
        if (i < S && inside && theirs[i] != T(0)) back += exp(last + log_a[j * S + i] - all[i]) * theirs[i];
    }
    if (!live) return;
#pragma unroll
    for (int i = 0; i < L; ++i) flow[i] = fma(p[i] * column[i], h, flow[i]);
    if (!kSummarise && job.real && inside)
      grad_emission[t * S] = counted ? finite_logit_adjoint(raw, g) : T(0);
    grad = back;
    p_now = before;
  };
#pragma unroll 1
  for (int n0 = 0; n0 < most; n0 += kAhead) {
    T before[kAhead], g_out[kAhead], raw[kAhead];
    bool counted[kAhead], careful = !kTogether;
    if (kTogether) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int t = frames - 1 - (n0 + k);
        before[k] = !inside || t < 0 ? T(0) : start && t == 0 ? first_p : asked_p[k];
        g_out[k] = inside && driven && t >= 0 ? asked_g[k] : T(0);
        raw[k] = asked_e[k], counted[k] = !mask || counts[k];
      }
      ask(n0 + kAhead);  // while these are worked on
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        T p[L], sum(0);
        gather<L>(before[k], p);
#pragma unroll
        for (int i = 0; i < L; ++i) sum = fma(p[i], column[i], sum);
        careful = careful || (inside && frames - 1 - (n0 + k) >= 0 && !(sum >= T(kSafeSum)));
      }
    }
    if (!__any_sync(kFull, careful)) {
#pragma unroll
      for (int k = 0; kTogether && k < kAhead; ++k) {
        if (n0 + k >= most) break;  // the same for all lanes
        frame(frames - 1 - (n0 + k), before[k], g_out[k], raw[k], counted[k], std::false_type{});
      }
    } else {
#pragma unroll 1
      for (int n = n0; n < n0 + kAhead && n < most; ++n) {
        const int t = frames - 1 - n, near = t > 0 ? t : 0;
        const bool here = inside && t >= 0;
        const T p = !here ? T(0) : start && t == 0 ? first_p : posterior[(t - 1) * S];
        const T g = here && driven && grad_posterior ? grad_posterior[near * S] : T(0);
        frame(t, p, g, kSummarise ? T(0) : emission[near * S], !mask || mask[near], std::true_type{});
      }
    }
    if (!kSummarise && n0 % kFlushFrames == kFlushFrames - kAhead) {  // kAhead divides kFlushFrames
#pragma unroll
      for (int i = 0; i < L; ++i) flows[i] += double(flow[i]), flow[i] = T(0);
    }
  }
  if (kSummarise) {
    if (job.real && inside) scratch[job.start * S + j] = grad;
    return;
  }
  T grads[L];
  gather<L>(grad, grads);
  if (!job.real || !inside) return;
  double* out = params.workspace + (job.sequence * cut.chunks + job.chunk) * S * S + j;
#pragma unroll
  for (int i = 0; i < L; ++i)
    if (i < S) out[i * S] = flows[i] + double(flow[i]);
  if (job.chunk == 0 && params.grad_initial)  // through log_softmax(initial)
    static_cast<T*>(params.grad_initial)[job.sequence * S + j] = finite_logit_adjoint(
        params.initial ? static_cast<const T*>(params.initial)[job.sequence * params.initial_stride + j]
                       : T(0),
        grad - first_p * sum_of<L>(grads));
}

template <class T, int L>
__global__ void __launch_bounds__(kWarp, 8)
    stage_filter_gradient_chain_kernel(StageFilterBackward params, Cut cut) {
  const int S = params.stages;
  const Job<L> job(params.batch, 1, 1);
  const int j = job.stage;
  const bool inside = j < S;
  T grad =
      inside && params.grad_final ? static_cast<const T*>(params.grad_final)[job.sequence * S + j] : T(0);
  for (int64_t c = cut.chunks - 1; c >= 0; --c) {
    T* const s = summary<T>(params.grad_emission, cut, job.sequence, c, S);
    if (job.real && inside) s[(S + 1) * S + j] = grad;
    T arriving[L];
    gather<L>(grad, arriving);
    grad = inside ? s[S * S + j] : T(0);
#pragma unroll
    for (int i = 0; i < L; ++i)
      if (i < S && inside) grad = fma(s[i * S + j], arriving[i], grad);
  }
}

// grad_transition: a block a row i. Flows of all sequences and chunks in a fixed order, then through log_softmax.
constexpr int kSlices = 16;
template <class T>
__global__ void __launch_bounds__(kSlices* kMaxStages)
    stage_filter_transition_kernel(StageFilterBackward params, int64_t parts) {
  const int S = params.stages, i = int(blockIdx.x), j = int(threadIdx.x) % kMaxStages,
            slice = int(threadIdx.x) / kMaxStages;
  double* flow = shared_memory<double>();  // (kSlices, kMaxStages)
  double sum = 0;
  if (j < S)
    for (int64_t k = slice; k < parts; k += kSlices) sum += params.workspace[(k * S + i) * S + j];
  flow[threadIdx.x] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= S) return;
  const T* row = static_cast<const T*>(params.transition) + i * S;
  double mine = 0, total = 0, peak = kImpossible, mass = 0;
  for (int c = 0; c < S; ++c) {
    double column = 0;
    for (int k = 0; k < kSlices; ++k) column += flow[k * kMaxStages + c];
    total += column;
    if (c == j) mine = column;
    peak = max(peak, double(row[c]));
  }
  for (int c = 0; c < S; ++c) mass += exp(finite_logit(double(row[c])) - peak);
  const double own = exp(finite_logit(double(row[j])) - peak) / mass;
  static_cast<T*>(params.grad_transition)[i * S + j] = finite_logit_adjoint(row[j], T(mine - own * total));
}

// ---------------------------------------------------------------------------------------------------- launchers
Call call_of(const char* op, int64_t batch, int64_t frames, int stages, DType dtype, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of (%lld, %lld, %d) %s", op, (long long)batch, (long long)frames,
           stages, dtype_name(dtype));
  return call;
}

template <int L>
dim3 grid_of(const Call& call, int64_t jobs) {
  return dim3(grid_x(call, (jobs * L + kWarp - 1) / kWarp));
}

template <class T, int L, Pass kPass>
void launch_forward(const StageFilterForward& params, const Cut& cut, const Call& call, int64_t jobs) {
  const size_t shared = (size_t(params.stages) * params.stages + 2 * L * L) * sizeof(T);
  const auto kernel = params.belief && kPass != Pass::summarise ? stage_filter_kernel<T, L, kPass, true>
                                                                : stage_filter_kernel<T, L, kPass, false>;
  launch(call, kernel, grid_of<L>(call, jobs), kWarp, shared, params, cut);
}

template <class T, int L>
void forward_all(const StageFilterForward& params, const Call& call) {
  const Cut cut = {params.frames, stage_cuda_chunks(params.frames)};
  if (cut.chunks == 1) return launch_forward<T, L, Pass::whole>(params, cut, call, params.batch);
  const int64_t jobs = params.batch * cut.chunks;
  launch_forward<T, L, Pass::summarise>(params, cut, call, jobs * params.stages);
  launch(call, stage_filter_chain_kernel<T, L>, grid_of<L>(call, params.batch), kWarp, 0, params, cut);
  launch_forward<T, L, Pass::replay>(params, cut, call, jobs);
}

template <class T, int L>
void backward_all(const StageFilterBackward& params, const Call& call) {
  const int S = params.stages;
  const Cut cut = {params.frames, stage_cuda_chunks(params.frames)};
  const size_t shared = (size_t(S) * S + 2 * L * L) * sizeof(T);
  const int64_t jobs = params.batch * cut.chunks;
  if (cut.chunks == 1) {
    launch(call, stage_filter_gradient_kernel<T, L, Pass::whole>, grid_of<L>(call, params.batch), kWarp,
           shared, params, cut);
  } else {
    launch(call, stage_filter_gradient_kernel<T, L, Pass::summarise>, grid_of<L>(call, jobs * (S + 1)), kWarp,
           shared, params, cut);
    launch(call, stage_filter_gradient_chain_kernel<T, L>, grid_of<L>(call, params.batch), kWarp, 0, params,
           cut);
    launch(call, stage_filter_gradient_kernel<T, L, Pass::replay>, grid_of<L>(call, jobs), kWarp, shared,
           params, cut);
  }
  launch(call, stage_filter_transition_kernel<T>, dim3(unsigned(S)), kSlices * kMaxStages,
         kSlices * kMaxStages * sizeof(double), params, jobs);
}

}  // namespace

void stage_filter_forward(const StageFilterForward& params, Exec exec) {
  if (!params.batch) return;
  const Call call = call_of("stage_filter", params.batch, params.frames, params.stages, params.dtype, exec);
  const DeviceGuard guard(exec.where);
  if (params.dtype == DType::f64) return forward_all<double, 16>(params, call);
  params.stages <= 4 ? forward_all<float, 4>(params, call) : forward_all<float, 16>(params, call);
}

void stage_filter_backward(const StageFilterBackward& params, Exec exec) {
  if (!params.batch) return;
  const Call call =
      call_of("stage_filter backward", params.batch, params.frames, params.stages, params.dtype, exec);
  const DeviceGuard guard(exec.where);
  if (params.dtype == DType::f64) return backward_all<double, 16>(params, call);
  params.stages <= 4 ? backward_all<float, 4>(params, call) : backward_all<float, 16>(params, call);
}

}  // namespace sage::cuda
