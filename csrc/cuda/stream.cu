// One frame of SAGE for many streams in one launch (session.cu plans and launches it, product.cuh multiplies).
//
// A block takes R streams through the whole model: standardise, project, temporal blocks, evidence, stage filter, the experts'
// values, blocks, memory and head on all of them; last they are weighed. That is a loop over a table of phases, each something
// that happens to every row and then products of matrices, so there is one piece of code for all of it: a step runs once through
// whatever it runs through, and code that has to be fetched for that is waited for.
//
// A stream's rings lie in global memory, rows laid out as on the CPU (csrc/stream/model.h). What a step reads of a row's state, it
// reads before anything else, while the inputs are on their way from the host's memory; what passes between phases stays in
// shared memory; the state is written where it has been worked out and never read after that.
//
// Every block reads all matrices once, from L2, and that is what a step waits for: one multiprocessor takes some 64 bytes a
// cycle; barriers with what lies between them, some 0.15 us each, come on top. The inputs are read from, and the estimates
// written to, the host's pinned memory by the kernel itself: one launch, no copies.
#define SAGE_SHORT_CODE  // csrc/math/scalar.h
#include "stream.cuh"
#include "../math/experts.h"
#include "../math/frame.h"
#include "../math/leaky_average.h"
#include "../math/reliability_fusion.h"
#include "../math/stage_filter.h"

namespace sage::cuda {
namespace {

using namespace sage::stream;

constexpr int kNow = 4;   // numbers of a stream that now() has
constexpr int kTaps = 4;  // frames of a ring that a thread asks for at once

// ------------------------------------------------------------------------------------------ global to shared memory
// So many bytes, aligned to as many, on their way: no register is held, and nothing waits until wait_fetched<N>(), for all but
// the last N groups; fetched_here() ends a group.
template <int Bytes>
__device__ __forceinline__ void fetch(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(Bytes) : "memory");
#else
  memcpy(to, from, Bytes);
#endif
}
__device__ __forceinline__ void fetched_here() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Groups>
__device__ __forceinline__ void wait_fetched() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------- one warp's row
struct OneStage {
  float x;
  __device__ __forceinline__ float operator[](int) const { return x; }
};

struct Moments {
  float mean, rstd;
};
// The sums of two numbers over the warp, by one piece of code for all that ask.
struct Two {
  float a, b;
};
[[gnu::noinline]] __device__ Two warp_sums(float a, float b) {
#pragma unroll
  for (int o = 1; o < kWarp; o *= 2) {
    const float x = __shfl_xor_sync(kFull, a, o), y = __shfl_xor_sync(kFull, b, o);
    a += x, b += y;
  }
  return {a, b};
}
__device__ __forceinline__ float warp_sum(float x) { return warp_sums(x, 0.0f).a; }
[[gnu::noinline]] __device__ float warp_max(float x) {
#pragma unroll
  for (int o = 1; o < kWarp; o *= 2) x = max(x, __shfl_xor_sync(kFull, x, o));
  return x;
}

__device__ __forceinline__ Moments moments(const float* x, int dim, int lane) {
  float s = 0, drift = 0, ss = 0;
#pragma unroll 2
  for (int d = lane; d < dim; d += kWarp) s += x[d];
  const float mean = warp_sum(s) / float(dim);
#pragma unroll 2
  for (int d = lane; d < dim; d += kWarp) {
    const float c = x[d] - mean;
    drift += c;
    ss = fma(c, c, ss);
  }
  const Two sums = warp_sums(drift, ss);
  const NormMoments<float> m = norm_moments(mean, sums.a, sums.b, float(dim), float(kNormEps));
  return {m.mean, m.rstd};
}

// An expert a lane: what modality_weights adds up and compares lies in the lanes of a warp.
struct AcrossWarp {
  __device__ __forceinline__ float sum(float x) const { return warp_sum(x); }
  __device__ __forceinline__ float max(float x) const { return warp_max(x); }
};

[[gnu::noinline]] __device__ bool any_of(const int* flags, int count) {
  int found = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) found |= flags[i];
  return found != 0;
}
[[gnu::noinline]] __device__ float stages_sum(float x, int width) {
#pragma unroll 1
  for (int o = 1; o < width; o *= 2) x += __shfl_xor_sync(kFull, x, o);
  return x;
}
[[gnu::noinline]] __device__ float stages_max(float x, int width) {
#pragma unroll 1
  for (int o = 1; o < width; o *= 2) x = max(x, __shfl_xor_sync(kFull, x, o));
  return x;
}
// A stage a lane, `width` (a power of two) neighbouring lanes for an expert's: what reliability() adds up.
struct AcrossStages {
  static constexpr int first = 0, step = 1;
  int width;
  bool inside;  // whether this lane has a stage
  __device__ __forceinline__ int count(int) const { return inside; }
  __device__ __forceinline__ float sum(float x) const { return stages_sum(x, width); }
  __device__ __forceinline__ float max(float x) const { return stages_max(x, width); }
  __device__ __forceinline__ bool any(bool x) const { return __any_sync(kFull, x); }
};

// --------------------------------------------------------------------------------------------------------- the frame
template <class T, int R>
struct Group {
  const StreamLaunch& q;
  const Model& model;
  float* shared;
  int lane, warp, warps;

  __device__ __forceinline__ Group(const StreamLaunch& launch, const Model& m, float* memory)
      : q(launch),
        model(m),
        shared(memory),
        lane(int(threadIdx.x) % kWarp),
        warp(int(threadIdx.x) / kWarp),
        warps(int(blockDim.x) / kWarp) {}

  // Whether each modality is said to be present; from standardise() on 1 where its frame counts, below 0 where it would but
  // for what it holds. Whether it is taken to be there.
  __device__ __forceinline__ int* given(int r) const {
    return reinterpret_cast<int*>(shared + q.at.given) + r * kMaxModalities;
  }
  __device__ __forceinline__ int* present(int r) const {
    return reinterpret_cast<int*>(shared + q.at.present) + r * kMaxModalities;
  }
  // Of stream r, as begin() finds them: its row (one past the last repeats it), where its state lies, its frames so far, and
  // whether it moves in this call.
  __device__ __forceinline__ int64_t& now(int r, int what) const {
    return reinterpret_cast<int64_t*>(shared + q.at.row)[kNow * r + what];
  }
  __device__ __forceinline__ int64_t place(int r) const {
    const int64_t row = int64_t(blockIdx.x) * R + r;
    return row < q.rows ? row : q.rows - 1;
  }
  __device__ __forceinline__ int64_t row(int r) const { return now(r, 0); }
  __device__ __forceinline__ float* state(int r) const { return q.state + now(r, 1); }
  __device__ __forceinline__ int64_t frame(int r) const { return now(r, 2); }
  // The place of this frame in the ring of each block and, kMaxBlocks, in typicality's window.
  __device__ __forceinline__ int& slot(int r, int ring) const {
    return reinterpret_cast<int*>(shared + q.at.slots)[r * kSlots + ring];
  }
  __device__ __forceinline__ bool live(int r) const { return now(r, 3) != 0; }
  // What was read of the state, behind the rings, by the places that it has there.
  __device__ __forceinline__ const float* kept(int r) const {
    return shared + q.at.rest + r * q.at.rests - q.at.from;
  }
  __device__ __forceinline__ int64_t* counts(int r) const {
    return reinterpret_cast<int64_t*>(shared + q.at.counts) + r * (1 + 2 * q.at.modalities);
  }
  __device__ __forceinline__ float* stages(int at, int r) const { return shared + at + r * kMaxStages; }
  // Of expert k: the logits of its reliability, then those of a frame's log precision.
  __device__ __forceinline__ float* logits(int k, int r) const {
    return shared + q.at.logits + (k * R + r) * 2 * kMaxStages;
  }
  // The place of the first modality among the experts.
  __device__ __forceinline__ int first() const { return model.shape.joint ? 1 : 0; }
  // Whether expert k's frame says anything.
  __device__ __forceinline__ bool says(int r, int k) const {
    return k >= first() ? present(r)[k - first()] != 0 : any_of(present(r), q.at.modalities);
  }

  // Inputs as they come, padded with zeros.
  __device__ __forceinline__ void ask() const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < q.at.encoded; i += int(blockDim.x)) {
      int m = 0, r = 0;
#pragma unroll 1
      while (m + 1 < q.at.modalities && i >= q.at.input[m + 1]) ++m;
      const int n = q.at.in_dim[m], wide = tiled(n);
      int d = i - q.at.input[m];
#pragma unroll 1
      for (; d >= wide; d -= wide) ++r;
      if (d < n)
        fetch<4>(shared + i, q.frame.features[m] + place(r) * n + d);
      else
        shared[i] = 0;
    }
  }

  // The plan, the inputs and flags, and what is read of the state into shared memory; zeros elsewhere. The inputs may lie in
  // the host's memory, a microsecond away: all are asked for before any is waited for.
  __device__ __forceinline__ void begin() const {
    const int thread = int(threadIdx.x), threads = int(blockDim.x), M = q.at.modalities, counters = 1 + 2 * M;
    unsigned char* memory = shared_memory<unsigned char>();
#pragma unroll 1
    for (int i = thread * 16; i < q.plan_bytes; i += threads * 16)
      fetch<16>(memory + i, static_cast<const char*>(q.plan) + i);
    fetched_here();
    ask();
    const int of = thread / kMaxModalities, m = thread % kMaxModalities;
    uint8_t here = 1, active = 1;
    int64_t frame = 0;
    if (of < R && m < M && q.frame.present) here = q.frame.present[place(of) * M + m];
    if (thread < R && q.frame.active) active = q.frame.active[place(thread)];
    if (thread < R * kSlots) frame = q.frames[place(thread / kSlots)];
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      const int64_t row = place(r);
#pragma unroll 1
      for (int i = thread * 4; i < q.at.rests; i += threads * 4)
        fetch<16>(shared + q.at.rest + r * q.at.rests + i, q.state + row * q.row_floats + q.at.from + i);
#pragma unroll 1
      for (int i = thread; q.frame.quality && i < q.at.qualities; i += threads)
        fetch<4>(shared + q.at.quality + r * q.at.qualities + i, q.frame.quality + row * q.at.qualities + i);
      if (thread < counters) fetch<8>(counts(r) + thread, q.counts + row * counters + thread);
    }
    fetched_here();
#pragma unroll 1
    for (int i = q.at.encoded + thread; i < q.at.zeroed; i += threads) shared[i] = 0;
    if (thread < R * kSlots) {
      const int r = thread / kSlots, ring = thread % kSlots;
      if (ring <= kMaxBlocks) slot(r, ring) = q.rings[ring].slot(frame);
      if (ring == 0) now(r, 0) = place(r), now(r, 1) = place(r) * q.row_floats, now(r, 2) = frame;
    }
    wait_fetched<1>();
    __syncthreads();
    recall_frames();
    if (of < R && m < M) given(of)[m] = here;
    if (thread < R) now(thread, 3) = int64_t(blockIdx.x) * R + thread == place(thread) && active;
    wait_fetched<0>();
    __syncthreads();
  }

  // What the convolutions' taps say of the frames before this one: all taps but the last.
  __device__ __forceinline__ void recall_frames() const {
    const Shape& s = model.shape;
    const int taps = s.kernel - 1, dim = int(s.dim), own = s.own_blocks;
    const int line = int(padded(dim));
    float* to = shared + q.at.past;
    int i = warp;
#pragma unroll 1
    for (int b = 0; b < own + s.fused_blocks; ++b) {
      const int rows = (b < own ? s.modalities : s.experts()) * R;
#pragma unroll 1
      for (; i < rows << q.at.past_bits; i += warps) {
        const int at = i >> q.at.past_bits, k = at / R, r = at % R;
        const Block& block = b < own ? model.modality[k].block[b] : model.fused[b - own];
        const float* ring = state(r) + int(block.ring) + (b < own ? 0 : k) * int(block.span) * line;
        const int span = int(block.span), dilation = int(block.dilation), start = slot(r, b);
        const int stride = kWarp << q.at.past_bits;
#pragma unroll 1
        for (int d = (i & ((1 << q.at.past_bits) - 1)) * kWarp + lane; d < dim; d += stride) {
          float sum = in_global(block.bias)[d];
          int slot = start;
#pragma unroll 1
          for (int tap = 0; tap < taps; tap += kTaps) {
            float frames[kTaps], weights[kTaps];
#pragma unroll
            for (int n = 0; n < kTaps; ++n) {
              frames[n] = weights[n] = 0;
              if (tap + n < taps)
                frames[n] = ring[slot * line + d], weights[n] = in_global(block.taps)[(tap + n) * line + d];
              slot += dilation;
              slot = slot >= span ? slot - span : slot;
            }
#pragma unroll
            for (int n = 0; n < kTaps; ++n)
              if (tap + n < taps) sum = fma(frames[n], weights[n], sum);
          }
          to[at * q.at.dim + d] = sum;
        }
      }
      i -= rows << q.at.past_bits;
      to += rows * q.at.dim;
    }
  }

  // Standardised input of each modality, zero where it is missing, and two of the mean squares that typicality reads; as
  // the CPU has it. A warp a (modality, stream).
  __device__ __forceinline__ void standardise() const {
    const Shape& s = model.shape;
    for (int i = warp; i < s.modalities * R; i += warps) {
      const int m = i / R, r = i % R;
      const Modality& from = model.modality[m];
      const int n = int(s.in_dim[m]);
      float* x = shared + q.at.input[m] + r * tiled(n);
      const bool moves = live(r);
      const float* last = kept(r) + int(model.last[m].at);
      const bool told = moves && given(r)[m];
      const float repeats = s.stuck ? kept(r)[int(model.repeats.at) + m] : 0.0f;
      FrameSums<float> sums = {0, 0, 0};
      float blank = 0;  // the step's squares if the frame turns out not to count
      // Means and scales of as many features at a time as there is room for, where the products' sums will lie.
      float *mean = shared + q.at.part + i * 2 * q.at.ahead, *scale = mean + q.at.ahead;
#pragma unroll 1
      for (int begin = 0; begin < n; begin += q.at.ahead) {
        const int end = begin + q.at.ahead < n ? begin + q.at.ahead : n;
#pragma unroll 1
        for (int d = begin + lane; d < end; d += kWarp)
          fetch<4>(mean + d - begin, from.mean + d), fetch<4>(scale + d - begin, from.scale + d);
        fetched_here();
        wait_fetched<0>();
#pragma unroll 2
        for (int d = begin + lane; d < end; d += kWarp) {
          const float before = last[d], v = told ? (x[d] - mean[d - begin]) * scale[d - begin] : 0.0f;
          sums.add(v, before);
          blank = fma(before, before, blank);
          x[d] = v;
        }
      }
      const Two energies = warp_sums(sums.squares, sums.steps), others = warp_sums(sums.moved, blank);
      sums = {energies.a, energies.b, others.a};
      blank = others.b;
      const FrameVerdict verdict = judge_frame(told, sums.squares, sums.moved, repeats, model.stuck_limit[m]);
      const bool keep = moves && !verdict.stuck;
#pragma unroll 1
      for (int d = lane; d < n; d += kWarp) {
        const float v = verdict.here ? x[d] : 0.0f;
        if (keep) state(r)[int(model.last[m].at) + d] = v;
        x[d] = v;
      }
      __syncwarp();  // orders memory: all lanes have read given(r)[m]
      if (lane == 0) {
        float* square = shared + q.at.square + (r * kMaxModalities + m) * kEnergies;
        square[0] = verdict.here ? sums.squares / float(n) : 0.0f;
        square[1] = (verdict.here ? sums.steps : blank) / float(n);
        given(r)[m] = verdict.here ? 1 : told && !verdict.stuck ? -1 : 0;
        present(r)[m] = verdict.here || s.hide_missing;
        if (moves && s.stuck) state(r)[int(model.repeats.at) + m] = verdict.repeats;
      }
    }
  }

  // LayerNorm of every row of the modalities or the experts, and what is particular to each of its places:
  // - before a block, mixed = silu(depthwise LayerNorm(x)), and the normed frame goes into the ring in the place of the oldest;
  //   some warps a row, each with some of the channels. Elsewhere x itself is normed, a warp a row;
  // - the encoded modalities besides go side by side, zeros for a missing one;
  // - the value of an expert that has nothing to say is zeros.
  // From the item `first` on, an item a warp.
  __device__ __forceinline__ void norm_rows(const Phase& phase, int first_item) const {
    const Shape& s = model.shape;
    const Before why = phase.before;
    const bool fused = why == Before::fused_block, blocks = fused || why == Before::own_block;
    const bool of_modalities = why == Before::own_block || why == Before::encode;
    const int dim = int(s.dim), taps = s.kernel - 1, M = s.modalities, K = s.experts(), b = phase.index;
    const int share = fused ? q.at.fused_bits : blocks ? q.at.own_bits : 0;
    const int line = int(padded(dim)), rows = (of_modalities ? M : K) * R;
    const float* past =
        shared + q.at.past + ((fused ? s.own_blocks * M : 0) + b * (of_modalities ? M : K)) * R * q.at.dim;
    const int ring_of = fused ? s.own_blocks + b : b;
#pragma unroll 1
    for (int i = first_item; i < rows << share; i += warps) {
      const int at = i >> share, k = at / R, r = at % R, step = kWarp << share;
      const Block& block = fused ? model.fused[b] : model.modality[of_modalities ? k : 0].block[b];
      float* x = shared + (of_modalities ? q.at.encoded : q.at.tracks) + at * q.at.dim;
      int d = (i & ((1 << share) - 1)) * kWarp + lane;
      Norm norm = blocks ? block.norm : of_modalities ? model.modality[k].norm : model.norm;
      if (why == Before::gate) {
        if (!says(r, k)) {
          for (; d < dim; d += step) x[d] = 0;
          continue;
        }
        if (!s.value_norm) continue;
        norm = {model.value_norm.weight + k * line, model.value_norm.bias + k * line};
      }
      const bool here = of_modalities && present(r)[k];
      float* y = blocks ? shared + q.at.mixed + at * q.at.dim : x;
      float* aside =
          why == Before::encode && s.joint ? shared + q.at.side + r * q.at.sided + k * dim : nullptr;
      float* ring =
          blocks && block.span && live(r)
              ? state(r) + int(block.ring) + ((fused ? k : 0) * int(block.span) + slot(r, ring_of)) * line
              : nullptr;
      // Weights come while the moments are taken, to where the products' sums will lie.
      float *weight = shared + q.at.part + at * kNormRows * q.at.dim, *bias = weight + q.at.dim,
            *tap = bias + q.at.dim;
#pragma unroll 1
      for (int c = d; c < dim; c += step) {
        fetch<4>(weight + c, norm.weight + c), fetch<4>(bias + c, norm.bias + c);
        if (blocks) fetch<4>(tap + c, block.taps + taps * line + c);
      }
      fetched_here();
      const Moments m = moments(x, dim, lane);
      wait_fetched<0>();
#pragma unroll 1
      for (; d < dim; d += step) {
        float h = fma((x[d] - m.mean) * m.rstd, weight[d], bias[d]);
        if (ring) ring[d] = h;
        if (aside) aside[d] = here ? h : 0.0f;
        if (blocks) h = silu(fma(h, tap[d], past[at * q.at.dim + d]));
        y[d] = h;
      }
    }
  }

  // The signs that typicality and quality give, and their parts of the state move on by a frame. Typicality: a lane a
  // (modality, energy); the inputs are by now what is left of them outside the principal components. Quality: a lane a column.
  __device__ __forceinline__ void assess(int r) const {
    const Shape& s = model.shape;
    const int m = lane / kEnergies, kind = lane % kEnergies, history = s.window - 1;
    const bool mine = lane < kEnergies * s.modalities;
    float square = mine ? shared[q.at.square + r * kEnergies * kMaxModalities + lane] : 0.0f;
    for (int i = 0; i < s.modalities; ++i) {
      const int n = int(s.in_dim[i]);
      const float* left = shared + q.at.input[i] + r * tiled(n);
      float sum = 0;
#pragma unroll 2
      for (int d = lane; d < n; d += kWarp) sum = fma(left[d], left[d], sum);
      sum = warp_sum(sum);
      if (i == m && kind == 2) square = sum / float(n);
    }
    if (mine) {
      const float *energies = kept(r) + int(model.energy.at) + lane,
                  *counts = kept(r) + int(model.counted.at);
      const int start = history ? slot(r, kMaxBlocks) : 0, line = int(model.energy.line());
      const bool here = present(r)[m] != 0;
      bool counted = here;
      if (kind == 1)
        counted = here && history && counts[(start ? start - 1 : history - 1) * line + kEnergies * m] > 0;
      counts += lane;
      const float energy = counted ? log_energy(square) : 0.0f;
      const auto past = [&](int slot) {
        return EnergyWindow<float>{energies[slot * line], counts[slot * line]};
      };
      const EnergyWindow<float> window =
          sum_window(history, start, past, EnergyWindow<float>{energy, counted ? 1.0f : 0.0f});
      const Typicality<float> found =
          typicality(window, here, model.typical_mean[lane], model.typical_std[lane]);
      put_sign(r, m, kind, found.signed_level), put_sign(r, m, kEnergies + kind, found.level);
      if (history && live(r)) {
        state(r)[int(model.energy.at) + start * line + lane] = energy;
        state(r)[int(model.counted.at) + start * line + lane] = counted;
      }
    }
#pragma unroll 1
    for (int c = lane; c < q.at.qualities; c += kWarp) {
      int of = 0;
#pragma unroll 1
      while (of + 1 < s.modalities && c >= q.at.quality_before[of + 1]) ++of;
      const int at_sums = int(model.quality.at) + 3 * c;
      float sums[3] = {kept(r)[at_sums], kept(r)[at_sums + 1], kept(r)[at_sums + 2]};
      const bool told = q.frame.quality && given(r)[of] > 0;
      const QualitySigns found =
          quality_signs(told ? shared[q.at.quality + r * q.at.qualities + c] : 0.0f, told,
                        model.quality_mean[c], model.quality_scale[c], model.quality_decay, sums);
#pragma unroll
      for (int n = 0; n < 3; ++n)
        if (live(r)) state(r)[at_sums + n] = sums[n];
      const int at = kTypicality + kQuality * (c - q.at.quality_before[of]);
      put_sign(r, of, at, found.now), put_sign(r, of, at + 1, found.average);
      put_sign(r, of, at + 2, found.known);
    }
  }
  // Signs lie in a row of their modality, in one of all modalities for the joint expert, and behind what is learnt.
  __device__ __forceinline__ void put_sign(int r, int m, int n, float x) const {
    const float sign = present(r)[m] ? x : 0.0f;
    const int among_all = q.at.signs_before[m] + n;
    shared[q.at.signs + (m * R + r) * q.at.told + n] = sign;
    shared[q.at.learnt + r * q.at.joined + among_all] = sign;
    if (q.at.all_told) shared[q.at.all_signs + r * q.at.all_told + among_all] = sign;
  }

  // One frame of a filter over S states, a lane each: the probabilities move on by this frame's evidence, into at.now, and the
  // log-belief at `part` of the state.
  __device__ __forceinline__ void filter(int r, int S, const float* log_a, const float* a, int part,
                                         float evidence) const {
    const float* belief = kept(r) + part;
    float* prior = stages(q.at.prior, r);
    const bool inside = lane < S;
    if (inside) prior[lane] = exp(belief[lane]);
    __syncwarp();
    const float next = inside ? stage_prior<0>(S, log_a, a, belief, prior, lane) + evidence : -3e38f;
    const float peak = AcrossWarp{}.max(next);
    const float e = inside ? exp(next - peak) : 0.0f, total = warp_sum(e);
    if (inside) {
      stages(q.at.now, r)[lane] = e / total;
      if (live(r)) state(r)[part + lane] = next - peak - log(total);
    }
    __syncwarp();
  }

  // Confidence, its log-odds and the precision of the experts of a stream, from what the filter over stages says: as many lanes
  // an expert as there are stages, or a few more, so that one warp has several experts at a time.
  __device__ __forceinline__ void rate(int r) const {
    const Shape& s = model.shape;
    const int S = s.stages, K = s.experts(), bits = q.at.stage_bits, j = lane & ((1 << bits) - 1);
    const AcrossStages stages_of = {1 << bits, j < S};
    const float p = j < S ? stages(q.at.now, r)[j] : 0.0f;
#pragma unroll 1
    for (int first_expert = 0; first_expert < K; first_expert += kWarp >> bits) {
      const int k = first_expert + (lane >> bits);
      float logit = 0, log_precision = 0;
      if (s.reliability && k < K && j < S) {
        const float* raw = logits(k, r);
        logit = fma(raw[j], model.logit_scale[k * S + j], model.logit_bias[k * S + j]);
        log_precision = p * raw[S + j];
      }
      Reliability<float> found = {0.5f, 0.0f};
      if (s.reliability) found = reliability<float>(S, OneStage{logit}, OneStage{p}, stages_of);
      log_precision = stages_of.sum(log_precision);
      if (k >= K || j) continue;
      shared[q.at.log_odds + r * kMaxModalities + k] = found.log_odds;
      shared[q.at.confidence + r * kMaxModalities + k] = found.confidence;
      shared[q.at.precision + k * R + r] = says(r, k) ? frame_precision(log_precision) : 0.0f;
    }
  }
  // The two filters of a stream. First that over stages, from which come confidence and precision of its experts; at the end,
  // over whose streams they are, and the estimates are weighed.
  __device__ __forceinline__ void judge(int r, bool last) const {
    const Shape& s = model.shape;
    const int M = s.modalities, S = s.stages, K = s.experts(), C = s.targets, m = lane - first();
    const bool inside = lane < K, moves = live(r);
    const auto estimate = [&](int k, int c) {
      return shared[q.at.estimates + (k * R + r) * q.at.targets + c];
    };
    float confidence = 0, log_odds = 0, evidence = 0;
    if (last) {
      confidence = inside ? shared[q.at.confidence + r * kMaxModalities + lane] : 0.0f;
      log_odds = inside ? shared[q.at.log_odds + r * kMaxModalities + lane] : 0.0f;
      if (s.foreign) {
        // Put to scale, in standard deviations of the targets.
        const auto scaled = [&](int i, int c) {
          return model.own_gain[i * C + c] * estimate(first() + i, c) + model.own_shift[i * C + c];
        };
        const auto trusted = [&](int i) {
          return within_doubt(shared[q.at.confidence + r * kMaxModalities + first() + i]);
        };
        const int own = lane - 1;  // a lane a hypothesis: that all are mine, then that a modality is foreign
#pragma unroll 1
        for (int i = 0; i < M; ++i)
          if (own >= 0 && own < M && own != i && present(r)[own] && present(r)[i])
            evidence += foreign_evidence(trusted(own), trusted(i), C,
                                         [&](int c) { return scaled(own, c) - scaled(i, c); });
        evidence = evidence / model.foreign_pace;
      }
    } else {
      const bool some = __ballot_sync(kFull, lane < M && present(r)[lane < M ? lane : 0]) != 0;
      if (some && lane < S && s.reliability) evidence = stages(q.at.emission, r)[lane];
    }
    if (last ? s.foreign : s.reliability)
      filter(r, last ? 1 + M : S, last ? model.foreign_log_a : model.log_a, last ? model.foreign_a : model.a,
             int(last ? model.foreign.at : model.belief.at), evidence);

    float* p = stages(q.at.now, r);
    if (!last) {
      if (!s.reliability && lane == 0) p[0] = 1.0f;
      __syncwarp();  // orders memory: rate() reads it
      rate(r);
      if (lane < S && moves) q.out.stage[row(r) * S + lane] = s.reliability ? p[lane] : 1.0f;
      return;
    }
    if (s.foreign && inside) {
      const Reliability<float> found = doubted(log_odds, m < 0 ? 1 - p[0] : p[1 + m]);
      confidence = found.confidence, log_odds = found.log_odds;
    }
    const bool speaks = inside && (m < 0 || present(r)[m < 0 ? 0 : m]);
    float score = log_odds * model.sharpness, share = 0;
    modality_weights(1, &score, &speaks, &share, AcrossWarp{});
    const float all = warp_sum(inside && m >= 0 ? share : 0.0f);
    const int64_t at = row(r);
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
      const float sum = warp_sum(inside ? share * estimate(lane, c) : 0.0f);
      if (lane == 0 && moves) q.out.prediction[at * C + c] = sum;
    }
    if (!inside || m < 0 || !moves) return;
    q.out.weights[at * M + m] = share_among(share, all);
    q.out.confidence[at * M + m] = speaks ? confidence : 0.0f;
#pragma unroll 1
    for (int c = 0; c < C; ++c) q.out.unimodal[(at * M + m) * C + c] = estimate(lane, c);
    const bool here = given(r)[m] > 0;
    q.out.present[at * M + m] = here;
    int64_t* count = q.counts + at * (1 + 2 * M);
    if (!here) count[1 + m] = counts(r)[1 + m] + 1;
    if (given(r)[m] < 0) count[1 + M + m] = counts(r)[1 + M + m] + 1;
    if (m == 0) count[0] = counts(r)[0] + 1, q.frames[at] = frame(r) + 1;
  }

  // Row i of the tracks goes into its memory; the memory's averages side by side.
  __device__ __forceinline__ void remember(int i) const {
    const Shape& s = model.shape;
    const int r = i % R, dim = int(s.dim), line = int(model.memory.line());
    const int sums = int(model.memory.at) + i / R * s.memory * line;
    const float precision = shared[q.at.precision + i], *x = shared + q.at.tracks + i * q.at.dim;
    float* to = shared + q.at.recalled + i * q.at.recall;
#pragma unroll 1
    for (int h = 0; h < s.memory; ++h) {
      // The weighted sum, and behind it the sum of the weights and the count.
      const float* before = kept(r) + sums + h * line;
      float* after = state(r) + sums + h * line;
      const float decay = model.decay[h], weight = leaky_weight(decay, before[dim], precision);
      const float count = leaky_count(decay, before[dim + 1], precision);
      const float scale = leaky_scale(model.prior[h], weight, count, true);
#pragma unroll 2
      for (int d = lane; d < dim; d += kWarp) {
        const float sum = leaky_sum(decay, before[d], precision, x[d]);
        if (live(r)) after[d] = sum;
        to[h * dim + d] = sum * scale;
      }
      if (lane == 0 && live(r)) after[dim] = weight, after[dim + 1] = count;
    }
  }

  // What comes before a phase's products.
  __device__ __forceinline__ void prepare(const Phase& phase) const {
    int item = warp;
    switch (phase.before) {
      case Before::nothing:
        return;
      case Before::standardise:
        standardise();
        break;
      case Before::assess:
        for (int r = warp; r < R; r += warps) assess(r);
        break;
      case Before::remember:
        for (int i = warp; i < model.shape.experts() * R; i += warps) remember(i);
        break;
      case Before::gate:
      case Before::weigh:
        for (; item < R; item += warps) judge(item, phase.before == Before::weigh);
        item -= R;
        if (phase.before == Before::weigh) break;
        [[fallthrough]];
      default:
        norm_rows(phase, item);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void step(const Phase* phases) const {
    float* part = shared + q.at.part;
    const Job* jobs = reinterpret_cast<const Job*>(phases + q.phases);
#pragma unroll 1
    for (int p = 0; p < q.phases; ++p) {
      const Phase phase = phases[p];
      prepare(phase);
      if (!phase.jobs) continue;
      const int rows = (phase.tracks ? model.shape.experts() : 1) * R;
      const int Q = phase.tracks ? track_rows(R) : R;
#pragma unroll 1
      for (int first = 0; first < rows; first += Q) {
        if (phase.tracks)
          multiply<T, track_rows(R)>(shared, part, jobs, phase.jobs, first, rows);
        else
          multiply<T, R>(shared, part, jobs, phase.jobs, first, rows);
        __syncthreads();
        finish(shared, part, jobs, phase.jobs, Q, first, rows);
        __syncthreads();
      }
      jobs += phase.jobs;
    }
  }
};

template <class T, int R>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    stream_kernel(const __grid_constant__ StreamLaunch q) {
  unsigned char* memory = shared_memory<unsigned char>();
  const Group<T, R> group(q, *reinterpret_cast<const Model*>(memory),
                          reinterpret_cast<float*>(memory + q.plan_bytes));
  group.begin();
  group.step(reinterpret_cast<const Phase*>(memory + sizeof(Model)));
}

template <class T>
void launch_blocks(const Call& call, const StreamLaunch& q, const StreamBlocks& blocks) {
  void (*const kernel)(StreamLaunch) = blocks.streams == 1   ? stream_kernel<T, 1>
                                       : blocks.streams == 2 ? stream_kernel<T, 2>
                                                             : stream_kernel<T, 4>;
  const unsigned grid = grid_x(call, (q.rows + blocks.streams - 1) / blocks.streams);
  launch(call, kernel, dim3(grid), blocks.warps * kWarp, blocks.shared, q);
}

}  // namespace

void launch_stream(const Call& call, const StreamLaunch& q, bool bf16, const StreamBlocks& blocks) {
  if (bf16)
    launch_blocks<__nv_bfloat16>(call, q, blocks);
  else
    launch_blocks<float>(call, q, blocks);
}

}  // namespace sage::cuda
