// stage_filter on the GPU.
//
// A sequence is a group of 4 lanes (float32, S <= 4) or 16, a lane a stage; state in registers, emissions loaded some
// frames ahead. Bytes: forward reads S and writes S numbers a frame (2 S with the log-belief), backward reads 3 S and
// writes S. Memory is not the floor: that is the chain of one frame, exchange p, S multiply-adds, total, reciprocal.
// So logarithms stay off the chain; with e the emission of a stage, p its probability and a[i][j] that of going from
// stage i to j,
//   p'[j] = sum_j w[j] / total,  sum_j = sum_i p[i] a[i][j],  w[j] = exp(e[j] - max e),  total = sum_j sum_j w[j]
// Where a sum could have lost terms to underflow (math/stage_filter.h, kSafeSum), or the evidence is so far against the
// prior that total is small, the frame is taken again as stage_step does it, in log space.
//
// Long sequences (by T alone, so a sequence's bits do not depend on the batch) are cut into chunks. Three launches:
//   1  every chunk from every certain start i: its last log-belief and the log-likelihood L_i of its evidence
//   2  each chunk's true start, in order: belief' = log_softmax_j logsumexp_i (belief[i] + L_i + last_i[j])
//   3  every chunk again from its true start, writing posteriors
// The summaries of launch 1 and the starts of launch 2 need no memory of their own: they lie in the output, in the
// place of the chunk's posterior (in backward, of its emission gradient), which launch 3 then writes over them.
// Backward is linear in the gradient that arrives at a chunk's end, so the same three launches serve it.
#include "device.cuh"
#include "../math/stage_filter.h"

namespace sage::cuda {
namespace {

// Frames in flight: what registers allow.
template <class T, int L>
constexpr int kFramesAhead = L == 4 ? 8 : 8 / int(sizeof(T));
constexpr int kFlushFrames = 64;  // transition gradients: sums this long, then double
constexpr double kLikely = 1e-6;  // a total below this: the evidence contradicts the prior

// ------------------------------------------------------------------------------- one job: a chunk from one start
struct Cut {  // how a sequence is cut
  int64_t frames, chunks;
  __host__ __device__ __forceinline__ int64_t begin(int64_t chunk) const { return chunk * kStageChunkFrames; }
  __host__ __device__ __forceinline__ int64_t end(int64_t chunk) const {
    return chunk + 1 < chunks ? (chunk + 1) * kStageChunkFrames : frames;
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

template <class T, int L>
__global__ void __launch_bounds__(kWarp, 8)
    stage_filter_kernel(StageFilterForward params, Cut cut, Pass pass) {
  constexpr int kAhead = kFramesAhead<T, L>;
  const int S = params.stages;
  T *log_a = shared_memory<T>(), *columns = log_a + S * S, *lines = columns + L * L;
  read_transition<T, L>(static_cast<const T*>(params.transition), S, log_a, columns, lines);
  const Job<L> job(params.batch * cut.chunks * (pass == Pass::summarise ? S : 1), cut.chunks,
                   pass == Pass::summarise ? S : 1);
  const int j = job.stage;
  const bool inside = j < S;
  const Row<T, L> a(columns, j);  // into this stage

  const int64_t begin = cut.begin(job.chunk), end = cut.end(job.chunk);
  T* const scratch =
      pass == Pass::whole ? nullptr : summary<T>(params.posterior, cut, job.sequence, job.chunk, S);
  T belief, mine;
  double likelihood = 0;
  if (pass == Pass::whole) {
    initial_belief<L>(static_cast<const T*>(params.initial), params.initial_stride, job.sequence, j, S,
                      belief, mine);
  } else if (pass == Pass::summarise) {
    belief = j == job.start ? T(0) : nothing<T>();
    mine = j == job.start ? T(1) : T(0);
  } else {
    belief = inside ? scratch[S * (S + 2) + j] : nothing<T>();
    mine = inside ? exp(belief) : T(0);
    // The first posterior overwrites it only after a shuffle of every lane's number: all have been read by then.
  }
  T p[L];
  gather<L>(mine, p);
  T inverse = T(1);  // p is to be multiplied by this

  const int64_t row = (job.sequence * params.frames) * S + j;
  const T* emission = static_cast<const T*>(params.emission) + row;
  const uint8_t* mask = params.mask ? params.mask + job.sequence * params.frames : nullptr;
  const auto read = [&](int64_t t) {
    return inside && t < end && (!mask || mask[t]) ? finite_logit(emission[t * S]) : T(0);
  };
  // Frames of this chunk and the longest one's: groups of a warp go through as many (only the last chunk is longer).
  int64_t most = end - begin;
  if (pass != Pass::whole) most = cut.end(cut.chunks - 1) - cut.begin(cut.chunks - 1);
  T next[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) next[k] = read(begin + k);
  for (int64_t t0 = begin; t0 < begin + most; t0 += kAhead) {
    T e[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) e[k] = next[k];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) next[k] = read(t0 + kAhead + k);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t t = t0 + k;
      if (t >= begin + most) break;  // the same for all lanes
      const bool live = t < end;
      T peak = inside ? e[k] : nothing<T>();
#pragma unroll
      for (int o = 1; o < L; o *= 2) peak = max(peak, __shfl_xor_sync(kFull, peak, o));
      const T distance = e[k] - peak, w = inside ? exp(distance) : T(0);
      T sum(0);
#pragma unroll
      for (int i = 0; i < L; ++i) sum = fma(p[i], a[i], sum);
      sum *= inverse;
      const bool lost = inside && !(sum >= T(kSafeSum));
      T unscaled[L];
      gather<L>(lost ? T(-1) : sum * w, unscaled);
      T total = sum_of<L>(unscaled);
      bool hard = !(total >= T(kLikely));
#pragma unroll
      for (int i = 0; i < L; ++i) hard = hard || unscaled[i] < T(0);
      T now = log(sum) + distance - log(total), step = peak + log(total);
      if (__any_sync(kFull, hard)) {  // as math/stage_filter.h's stage_step, a lane a stage
        T all[L];
        gather<L>(belief, all);
        const T prior = lost ? stage_prior_exact<T, T, L>(S, all, log_a, j) : log(sum);
        const T score = inside ? prior + e[k] : nothing<T>();
        T scores[L];
        gather<L>(score, scores);
        const T best = max_of<L>(scores);
        T exact(0), mass[L];
#pragma unroll
        for (int i = 0; i < L; ++i) {
          mass[i] = i < S ? exp(scores[i] - best) : T(0);
          exact += mass[i];
        }
        if (hard) {
          now = score - best - log(exact);
          step = best + log(exact);
          total = exact;
#pragma unroll
          for (int i = 0; i < L; ++i) unscaled[i] = mass[i];
        }
      }
      if (live) {
        belief = now;
        inverse = T(1) / total;
        if (pass == Pass::summarise) likelihood += double(step);
#pragma unroll
        for (int i = 0; i < L; ++i) p[i] = unscaled[i];
        if (pass != Pass::summarise && job.real && inside) {
          T own(0);
#pragma unroll
          for (int i = 0; i < L; ++i) own = i == j ? unscaled[i] : own;
          static_cast<T*>(params.posterior)[row + t * S] = own * inverse;
          if (params.belief) static_cast<T*>(params.belief)[row + t * S] = now;
        }
      }
    }
  }
  if (!job.real || !inside) return;
  if (pass == Pass::summarise) {
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
template <class T, int L>
__global__ void __launch_bounds__(kWarp, 8)
    stage_filter_gradient_kernel(StageFilterBackward params, Cut cut, Pass pass) {
  constexpr int kAhead = kFramesAhead<T, L>;
  const int S = params.stages;
  T *log_a = shared_memory<T>(), *columns = log_a + S * S, *lines = columns + L * L;
  read_transition<T, L>(static_cast<const T*>(params.transition), S, log_a, columns, lines);
  const int starts = pass == Pass::summarise ? S + 1 : 1;
  const Job<L> job(params.batch * cut.chunks * starts, cut.chunks, starts);
  const int j = job.stage;
  const bool inside = j < S;
  const Row<T, L> column(columns, j), line(lines, j);  // into this stage, and out of it
  const int64_t begin = cut.begin(job.chunk), end = cut.end(job.chunk);
  T* const scratch =
      pass == Pass::whole ? nullptr : summary<T>(params.grad_emission, cut, job.sequence, job.chunk, S);
  const bool driven = pass != Pass::summarise || job.start == S;  // do the outputs' gradients enter?
  T grad(0);
  if (pass == Pass::whole) {
    if (params.grad_final && inside) grad = static_cast<const T*>(params.grad_final)[job.sequence * S + j];
  } else if (pass == Pass::summarise) {
    grad = j == job.start && inside ? T(1) : T(0);
  } else {
    grad = inside ? scratch[(S + 1) * S + j] : T(0);
    // The first gradient overwrites it only after a shuffle of every lane's number: all have been read by then.
  }
  const int64_t row = job.sequence * params.frames * S + j;
  const T *posterior = static_cast<const T*>(params.posterior) + row,
          *beliefs = static_cast<const T*>(params.belief) + row;
  const T* grad_posterior =
      params.grad_posterior && driven ? static_cast<const T*>(params.grad_posterior) + row : nullptr;
  const uint8_t* mask = params.mask ? params.mask + job.sequence * params.frames : nullptr;
  T first_belief, first_p;
  initial_belief<L>(static_cast<const T*>(params.initial), params.initial_stride, job.sequence, j, S,
                    first_belief, first_p);
  const auto read_p = [&](int64_t t) {
    return !inside ? T(0) : t < 0 ? first_p : t >= begin - 1 ? posterior[t * S] : T(0);
  };
  const auto read_g = [&](int64_t t) {
    return inside && grad_posterior && t >= begin ? grad_posterior[t * S] : T(0);
  };

  T flow[L];
  double flows[L];
#pragma unroll
  for (int i = 0; i < L; ++i) flow[i] = T(0), flows[i] = 0;
  int64_t most = end - begin;
  if (pass != Pass::whole) most = cut.end(cut.chunks - 1) - cut.begin(cut.chunks - 1);
  T p_now = most > 0 && end > begin ? read_p(end - 1) : T(0);
  T next_p[kAhead], next_g[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) next_p[k] = read_p(end - 2 - k), next_g[k] = read_g(end - 1 - k);
  for (int64_t n0 = 0; n0 < most; n0 += kAhead) {  // n frames from the chunk's end
    T p_ahead[kAhead], g_ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) p_ahead[k] = next_p[k], g_ahead[k] = next_g[k];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t t = end - 1 - (n0 + kAhead + k);
      next_p[k] = t >= begin ? read_p(t - 1) : T(0);
      next_g[k] = read_g(t);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (n0 + k >= most) break;  // the same for all lanes
      const int64_t t = end - 1 - (n0 + k);
      const bool live = t >= begin;
      T p[L], grads[L], share[L];
      gather<L>(p_ahead[k], p);
      T sum(0);
#pragma unroll
      for (int i = 0; i < L; ++i) sum = fma(p[i], column[i], sum);
      const T inverse = T(1) / sum;
      const bool lost = live && inside && !(sum >= T(kSafeSum));
      const T arriving = fma(g_ahead[k], p_now, grad);
      gather<L>(arriving, grads);
      const T g = inside ? arriving - p_now * sum_of<L>(grads) : T(0);
      const T h = lost || !inside ? T(0) : g * inverse;
      gather<L>(h, share);
      T back(0);
#pragma unroll
      for (int i = 0; i < L; ++i) back = fma(line[i], share[i], back);
      back *= p_ahead[k];
      if (__any_sync(kFull, lost)) {
        const T last = inside && live ? (t > 0 ? beliefs[(t - 1) * S] : first_belief) : nothing<T>();
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
      if (live) {
#pragma unroll
        for (int i = 0; i < L; ++i) flow[i] = fma(p[i] * column[i], h, flow[i]);
        if (pass != Pass::summarise && job.real && inside)
          static_cast<T*>(params.grad_emission)[row + t * S] =
              !mask || mask[t] ? finite_logit_adjoint(static_cast<const T*>(params.emission)[row + t * S], g)
                               : T(0);
        grad = back;
        p_now = p_ahead[k];
      }
    }
    if (pass != Pass::summarise &&
        n0 % kFlushFrames == kFlushFrames - kAhead) {  // kAhead divides kFlushFrames
#pragma unroll
      for (int i = 0; i < L; ++i) flows[i] += double(flow[i]), flow[i] = T(0);
    }
  }
  if (pass == Pass::summarise) {
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

template <class T, int L>
void forward_all(const StageFilterForward& params, const Call& call) {
  const int S = params.stages;
  const Cut cut = {params.frames, stage_cuda_chunks(params.frames)};
  const size_t shared = (size_t(S) * S + 2 * L * L) * sizeof(T);
  if (cut.chunks == 1)
    return launch(call, stage_filter_kernel<T, L>, grid_of<L>(call, params.batch), kWarp, shared, params, cut,
                  Pass::whole);
  const int64_t jobs = params.batch * cut.chunks;
  launch(call, stage_filter_kernel<T, L>, grid_of<L>(call, jobs * S), kWarp, shared, params, cut,
         Pass::summarise);
  launch(call, stage_filter_chain_kernel<T, L>, grid_of<L>(call, params.batch), kWarp, 0, params, cut);
  launch(call, stage_filter_kernel<T, L>, grid_of<L>(call, jobs), kWarp, shared, params, cut, Pass::replay);
}

template <class T, int L>
void backward_all(const StageFilterBackward& params, const Call& call) {
  const int S = params.stages;
  const Cut cut = {params.frames, stage_cuda_chunks(params.frames)};
  const size_t shared = (size_t(S) * S + 2 * L * L) * sizeof(T);
  const int64_t jobs = params.batch * cut.chunks;
  if (cut.chunks == 1) {
    launch(call, stage_filter_gradient_kernel<T, L>, grid_of<L>(call, params.batch), kWarp, shared, params,
           cut, Pass::whole);
  } else {
    launch(call, stage_filter_gradient_kernel<T, L>, grid_of<L>(call, jobs * (S + 1)), kWarp, shared, params,
           cut, Pass::summarise);
    launch(call, stage_filter_gradient_chain_kernel<T, L>, grid_of<L>(call, params.batch), kWarp, 0, params,
           cut);
    launch(call, stage_filter_gradient_kernel<T, L>, grid_of<L>(call, jobs), kWarp, shared, params, cut,
           Pass::replay);
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
