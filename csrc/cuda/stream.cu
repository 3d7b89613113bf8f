// One frame of SAGE for many streams in one launch (session.cu launches it, product.cuh multiplies).
//
// A block takes R streams through the whole model: standardise, project, temporal blocks, evidence, stage filter, the experts'
// values, blocks, memory and head on each of them; last the experts are weighed. What passes between layers stays in shared
// memory; a stream's rings lie in global memory, rows laid out as on the CPU (csrc/stream/model.h).
//
// Every block reads all matrices once, from L2, and that is what a step waits for: one multiprocessor takes some 64 bytes a
// cycle; barriers with what lies between them, some 0.15 us each, come on top. The inputs are read from, and the estimates
// written to, the host's pinned memory by the kernel itself: one launch, no copies.
#include "stream.cuh"
#include "../math/activation.h"
#include "../math/experts.h"
#include "../math/frame.h"
#include "../math/leaky_average.h"
#include "../math/reliability_fusion.h"
#include "../math/stage_filter.h"

namespace sage::cuda {
namespace {

using namespace sage::stream;

constexpr int kAhead = 4;  // inputs that a thread has on their way from the host

// ---------------------------------------------------------------------------------------------------- one warp's row
struct Moments {
  float mean, rstd;
};
__device__ __forceinline__ Moments moments(const float* x, int dim, int lane) {
  float s = 0, drift = 0, ss = 0;
  for (int d = lane; d < dim; d += kWarp) s += x[d];
  const float mean = lanes_sum<1, kWarp>(s) / float(dim);
  for (int d = lane; d < dim; d += kWarp) {
    const float c = x[d] - mean;
    drift += c;
    ss = fma(c, c, ss);
  }
  const NormMoments<float> m =
      norm_moments(mean, lanes_sum<1, kWarp>(drift), lanes_sum<1, kWarp>(ss), float(dim), float(kNormEps));
  return {m.mean, m.rstd};
}
__device__ __forceinline__ float normed(float x, const Moments& m, const Norm& norm, int d) {
  return fma((x - m.mean) * m.rstd, norm.weight[d], norm.bias[d]);
}
__device__ __forceinline__ void layer_norm(const Norm& norm, int dim, int lane, float* x) {
  const Moments m = moments(x, dim, lane);
  for (int d = lane; d < dim; d += kWarp) x[d] = normed(x[d], m, norm, d);
}

// A modality a lane: what modality_weights adds up and compares lies in the lanes of a warp.
struct AcrossWarp {
  __device__ __forceinline__ float sum(float x) const { return lanes_sum<1, kWarp>(x); }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) x = sage::max(x, __shfl_xor_sync(kFull, x, o));
    return x;
  }
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

  // Whether each modality is said to be present; and 1 where it is taken to be, with 2 where its frame counts.
  __device__ __forceinline__ int* given(int r) const {
    return reinterpret_cast<int*>(shared + q.at.given) + r * kMaxModalities;
  }
  __device__ __forceinline__ int* present(int r) const {
    return reinterpret_cast<int*>(shared + q.at.present) + r * kMaxModalities;
  }
  // Of stream r: its row (one past the last repeats it), whether it moves in this call, its frames so far.
  __device__ __forceinline__ int64_t row(int r) const {
    const int64_t row = int64_t(blockIdx.x) * R + r;
    return row < q.rows ? row : q.rows - 1;
  }
  __device__ __forceinline__ int64_t* now(int r) const {
    return reinterpret_cast<int64_t*>(shared + q.at.row) + 2 * r;
  }
  __device__ __forceinline__ bool live(int r) const { return now(r)[0] != 0; }
  __device__ __forceinline__ int64_t frame(int r) const { return now(r)[1]; }
  // Whether the modality's frame counts, whatever the fusion is told.
  __device__ __forceinline__ bool counted(int r, int m) const { return (present(r)[m] & 2) != 0; }
  __device__ __forceinline__ float* state(int r) const { return q.state + row(r) * model.row_floats; }
  __device__ __forceinline__ float* stages(int at, int r) const { return shared + at + r * kMaxStages; }
  __device__ __forceinline__ float* logits(int k, int r) const {
    return shared + q.at.logits + (k * R + r) * 2 * kMaxStages;
  }
  // The place of the first modality among the experts, and whether expert k's frame says anything.
  __device__ __forceinline__ int first() const { return model.shape.joint ? 1 : 0; }
  __device__ __forceinline__ bool says(int r, int k) const {
    if (k >= first()) return present(r)[k - first()] != 0;
    bool some = false;
    for (int m = 0; m < model.shape.modalities; ++m) some = some || present(r)[m];
    return some;
  }

  // Inputs as they come, padded with zeros, kAhead a thread. They may lie in the host's memory, a microsecond away, so all
  // threads ask at once.
  __device__ __forceinline__ void ask(int begin, float (&x)[kAhead]) const {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = begin + k * int(blockDim.x);
      x[k] = 0;
      if (i >= q.at.encoded) continue;
      int m = 0;
      while (m + 1 < q.at.modalities && i >= q.at.input[m + 1]) ++m;
      const int n = q.at.in_dim[m], wide = tiled(n), r = (i - q.at.input[m]) / wide,
                d = (i - q.at.input[m]) % wide;
      if (d < n) x[k] = q.frame.features[m][row(r) * n + d];
    }
  }
  __device__ __forceinline__ void put(int begin, const float (&x)[kAhead]) const {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (begin + k * int(blockDim.x) < q.at.encoded) shared[begin + k * int(blockDim.x)] = x[k];
  }

  // The model, the inputs and the flags into shared memory; zeros elsewhere.
  __device__ __forceinline__ void begin() const {
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    float x[kAhead];
    ask(thread, x);
    if (thread < R * kMaxModalities && thread % kMaxModalities < q.at.modalities) {
      const int64_t flag = row(thread / kMaxModalities) * q.at.modalities + thread % kMaxModalities;
      given(0)[thread] = !q.frame.present || q.frame.present[flag];
    }
    if (thread < R) {
      const int64_t at = row(thread);
      now(thread)[0] = int64_t(blockIdx.x) * R + thread == at && (!q.frame.active || q.frame.active[at]);
      now(thread)[1] = q.frames[at];
    }
    for (int i = thread; i < int(sizeof(Model) / sizeof(uint4)); i += threads)
      reinterpret_cast<uint4*>(shared_memory<unsigned char>())[i] =
          reinterpret_cast<const uint4*>(q.model)[i];
    for (int i = q.at.encoded + thread; i < q.at.zeroed; i += threads) shared[i] = 0;
    put(thread, x);
    for (int at = thread + kAhead * threads; at < q.at.encoded; at += kAhead * threads)
      ask(at, x), put(at, x);
  }

  // Standardised input of each modality, zero where it is missing, and two of the mean squares that typicality reads; as the
  // CPU has it. A warp a (modality, stream).
  __device__ __forceinline__ void standardise() const {
    const Shape& s = model.shape;
    for (int i = warp; i < s.modalities * R; i += warps) {
      const int m = i / R, r = i % R;
      const Modality& from = model.modality[m];
      const int n = int(s.in_dim[m]);
      const int64_t at = row(r);
      float *x = shared + q.at.input[m] + r * tiled(n), *last = state(r) + model.last[m].at;
      const bool told = live(r) && given(r)[m];
      const float repeats = s.stuck ? state(r)[model.repeats.at + m] : 0.0f;
      FrameSums<float> sums = {0, 0, 0};
      float blank = 0;  // the step's squares if the frame turns out not to count
#pragma unroll 8
      for (int d = lane; d < n; d += kWarp) {
        const float before = last[d], v = told ? (x[d] - from.mean[d]) * from.scale[d] : 0.0f;
        sums.add(v, before);
        blank = fma(before, before, blank);
        x[d] = v;
      }
      sums = {lanes_sum<1, kWarp>(sums.squares), lanes_sum<1, kWarp>(sums.steps),
              lanes_sum<1, kWarp>(sums.moved)};
      blank = lanes_sum<1, kWarp>(blank);
      const FrameVerdict verdict = judge_frame(told, sums.squares, sums.moved, repeats, model.stuck_limit[m]);
      if (!verdict.here)
        for (int d = lane; d < n; d += kWarp) x[d] = 0;
      if (live(r) && !verdict.stuck)
        for (int d = lane; d < n; d += kWarp) last[d] = x[d];
      if (lane == 0) {
        float* square = shared + q.at.square + r * kEnergies * kMaxModalities + kEnergies * m;
        square[0] = verdict.here ? sums.squares / float(n) : 0.0f;
        square[1] = (verdict.here ? sums.steps : blank) / float(n);
        present(r)[m] = verdict.here ? 3 : s.hide_missing ? 1 : 0;
        if (live(r)) {
          if (s.stuck) state(r)[model.repeats.at + m] = verdict.repeats;
          q.out.present[at * s.modalities + m] = verdict.here;
        }
        if (live(r) && !verdict.here) {
          int64_t* counts = q.counts + at * (1 + 2 * s.modalities);
          ++counts[1 + m];
          counts[1 + s.modalities + m] += told && !verdict.stuck;
        }
      }
    }
  }

  // mixed = silu(depthwise LayerNorm(x)) of `rows` rows, R streams each of some modalities or tracks, with the normed frame
  // kept in the ring in the place of the oldest. Some warps a row, each with some of the channels.
  template <class BlockOf>
  __device__ __forceinline__ void convolve(const float* from, int rows, int tracks,
                                           const BlockOf& block_of) const {
    const Shape& s = model.shape;
    const int dim = int(s.dim), stride = q.at.dim, taps = s.kernel - 1;
    const int share = rows < warps ? warps / rows : 1;
    for (int i = warp; i < rows * share; i += warps) {
      const int at = i / share, r = at % R;
      const Block& block = block_of(at / R);
      const float* x = from + at * stride;
      float* y = shared + q.at.mixed + at * stride;
      const int64_t line = padded(dim);
      float* ring = state(r) + block.ring + (tracks ? at / R : 0) * block.span * line;
      const int64_t start = block.span ? frame(r) % block.span : 0;
      const auto past = [&](int d) {  // of the sum over taps
        float sum = block.bias[d];
        int64_t slot = start;
#pragma unroll 4
        for (int tap = 0; tap < taps; ++tap) {
          sum = fma(ring[slot * line + d], block.taps[tap * line + d], sum);
          slot += block.dilation;
          slot = slot >= block.span ? slot - block.span : slot;
        }
        return sum;
      };
      int d = i % share * kWarp + lane;
      float sum = d < dim ? past(d) : 0.0f;  // on its way while the moments are taken
      const Moments m = moments(x, dim, lane);
      while (d < dim) {
        const float h = normed(x[d], m, block.norm, d);
        y[d] = silu(fma(h, block.taps[taps * line + d], sum));
        if (block.span && live(r)) ring[start * line + d] = h;
        d += share * kWarp;
        if (d < dim) sum = past(d);
      }
    }
  }

  // The third mean square: of what is left of the standardised input outside the principal components. A warp a (modality,
  // stream).
  __device__ __forceinline__ void measure_residual(int i) const {
    const int m = i / R, r = i % R, n = q.at.in_dim[m];
    const float *x = shared + q.at.input[m] + r * tiled(n), *usual = shared + q.at.rebuilt[m] + r * tiled(n);
    float squares = 0;
    for (int d = lane; d < n; d += kWarp) {
      const float left = x[d] - usual[d];
      squares = fma(left, left, squares);
    }
    squares = lanes_sum<1, kWarp>(squares);
    if (lane == 0)
      shared[q.at.square + r * kEnergies * kMaxModalities + kEnergies * m + 2] = squares / float(n);
  }

  // The signs that typicality gives; and its ring moves on by a frame. A lane a (modality, energy).
  __device__ __forceinline__ void assess_typicality(int r) const {
    const Shape& s = model.shape;
    const int all = kEnergies * s.modalities, m = lane / kEnergies, kind = lane % kEnergies;
    const int history = s.window - 1;
    if (lane >= all) return;
    float *energies = state(r) + model.energy.at + lane, *counts = state(r) + model.counted.at;
    const int start = history ? int(frame(r) % history) : 0, line = int(model.energy.line());
    const bool here = present(r)[m] != 0;
    bool counted = here;
    if (kind == 1)
      counted = here && history && counts[(start ? start - 1 : history - 1) * line + kEnergies * m] > 0;
    counts += lane;
    float energy = 0;
    if (counted) energy = log_energy(shared[q.at.square + r * kEnergies * kMaxModalities + lane]);
    const auto past = [&](int slot) {
      return EnergyWindow<float>{energies[slot * line], counts[slot * line]};
    };
    const EnergyWindow<float> window =
        sum_window(history, start, past, EnergyWindow<float>{energy, counted ? 1.0f : 0.0f});
    if (history && live(r)) energies[start * line] = energy, counts[start * line] = counted;
    const Typicality<float> found =
        typicality(window, here, model.typical_mean[lane], model.typical_std[lane]);
    put_sign(r, m, kind, found.signed_level);
    put_sign(r, m, kEnergies + kind, found.level);
  }

  // The signs that quality gives, behind those of typicality; and its averages move on by a frame. A lane a column.
  __device__ __forceinline__ void assess_quality(int r) const {
    const Shape& s = model.shape;
    const int Q = s.qualities();
    for (int i = lane; i < Q; i += kWarp) {
      int m = 0;
      while (i >= s.quality_before(m + 1)) ++m;
      const bool told = q.frame.quality && counted(r, m);
      float* kept = state(r) + model.quality.at + 3 * i;
      float sums[3] = {kept[0], kept[1], kept[2]};
      const QualitySigns found =
          quality_signs(told ? q.frame.quality[row(r) * Q + i] : 0.0f, told, model.quality_mean[i],
                        model.quality_scale[i], model.quality_decay, sums);
      if (live(r)) kept[0] = sums[0], kept[1] = sums[1], kept[2] = sums[2];
      const int at = kTypicality + kQuality * (i - s.quality_before(m));
      const bool here = present(r)[m] != 0;
      put_sign(r, m, at, here ? found.now : 0.0f), put_sign(r, m, at + 1, here ? found.average : 0.0f);
      put_sign(r, m, at + 2, here ? found.known : 0.0f);
    }
  }
  // A sign lies in rows of one modality, of all together, and behind what is learnt.
  __device__ __forceinline__ void put_sign(int r, int m, int n, float x) const {
    const Shape& s = model.shape;
    const int at = s.signs_before(m) + n;
    shared[q.at.signs + (m * R + r) * q.at.width + n] = x;
    shared[q.at.all_signs + r * q.at.spread + at] = x;
    shared[q.at.joint + r * q.at.joined + s.modalities * int(s.evidence) + at] = x;
  }

  // Stage filter of one stream, a lane a stage; then confidences and precisions, a lane an expert.
  __device__ __forceinline__ void gate(int r) const {
    const Shape& s = model.shape;
    const int M = s.modalities, K = s.experts(), S = s.stages;
    const bool mine = lane < K, speaks = mine && says(r, lane);
    const bool some = __ballot_sync(kFull, lane < M && present(r)[lane < M ? lane : 0]) != 0;
    float *now = stages(q.at.now, r), log_odds = 0, confidence = 0.5f, precision = 1;
    if (s.reliability) {
      float *belief = stages(q.at.belief, r), *prior = stages(q.at.prior, r);
      float* kept = state(r) + model.belief.at;
      const bool inside = lane < S;
      if (inside) belief[lane] = kept[lane], prior[lane] = exp(kept[lane]);
      __syncwarp();
      float next = -3e38f;
      if (inside) {
        const float evidence = some ? stages(q.at.emission, r)[lane] : 0.0f;
        next = stage_prior(S, model.log_a, model.a, belief, prior, lane) + evidence;
      }
      const float peak = AcrossWarp{}.max(next);
      const float e = inside ? exp(next - peak) : 0.0f, total = lanes_sum<1, kWarp>(e);
      if (inside) {
        now[lane] = e / total;
        if (live(r)) kept[lane] = next - peak - log(total);
      }
      __syncwarp();
      if (mine) {
        const float* raw = logits(lane, r);
        const Reliability<float> found = reliability(S, raw, static_cast<const float*>(now));
        confidence = found.confidence, log_odds = found.log_odds;
        float log_precision = 0;
        for (int j = 0; j < S; ++j) log_precision = fma(now[j], raw[S + j], log_precision);
        precision = frame_precision(log_precision);
      }
    } else if (lane == 0) {
      now[0] = 1.0f;
    }
    if (mine) {
      shared[q.at.log_odds + lane * R + r] = log_odds;
      shared[q.at.confidence + lane * R + r] = confidence;
      shared[q.at.precision + lane * R + r] = speaks ? precision : 0.0f;
    }
    if (live(r) && lane < S) q.out.stage[row(r) * S + lane] = now[lane];
  }

  // The value of one expert of a stream, normed, or zeros where it has nothing to say.
  __device__ __forceinline__ void value(int i) const {
    const Shape& s = model.shape;
    const int k = i / R, r = i % R, dim = int(s.dim);
    float* x = shared + q.at.tracks + i * q.at.dim;
    if (!says(r, k)) {
      for (int d = lane; d < dim; d += kWarp) x[d] = 0;
    } else if (s.value_norm) {
      const int64_t line = padded(dim);
      layer_norm({model.value_norm.weight + k * line, model.value_norm.bias + k * line}, dim, lane, x);
    }
  }

  // The experts' estimates of one stream, weighed. One thread.
  __device__ __forceinline__ void weigh(int r) const {
    const Shape& s = model.shape;
    const int M = s.modalities, K = s.experts(), C = s.targets;
    const int64_t at = row(r);
    const float* said = shared + q.at.said + r * q.at.saying;
    const int stride = R * q.at.saying;
    bool there[kMaxModalities];
    float odds[kMaxModalities], sure[kMaxModalities];
    for (int k = 0; k < K; ++k) {
      there[k] = k < first() || present(r)[k - first()];
      odds[k] = shared[q.at.log_odds + k * R + r], sure[k] = shared[q.at.confidence + k * R + r];
    }
    if (s.foreign) {
      float belief[kMaxStages], p[kMaxStages], *scaled = shared + q.at.scaled + r * tiled(M * C);
      float* kept = state(r) + model.foreign.at;
      for (int h = 0; h <= M; ++h) belief[h] = kept[h];
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < C; ++c)
          scaled[m * C + c] =
              model.own_gain[m * C + c] * said[(first() + m) * stride + c] + model.own_shift[m * C + c];
      foreign_step(M, C, scaled, sure + first(), there + first(), model.foreign_pace, model.foreign_log_a,
                   model.foreign_a, belief, p);
      for (int h = 0; h <= M && live(r); ++h) kept[h] = belief[h];
      for (int k = 0; k < K; ++k) {
        const Reliability<float> found = doubted(odds[k], k < first() ? 1 - p[0] : p[1 + k - first()]);
        sure[k] = found.confidence, odds[k] = found.log_odds;
      }
    }
    if (!live(r)) return;
    mix_experts(K, M, C, model.sharpness, said, stride, odds, there, q.out.prediction + at * C,
                q.out.weights + at * M);
    for (int m = 0; m < M; ++m) {
      q.out.confidence[at * M + m] = there[first() + m] ? sure[first() + m] : 0.0f;
      for (int c = 0; c < C; ++c) q.out.unimodal[(at * M + m) * C + c] = said[(first() + m) * stride + c];
    }
  }

  // Row i of the tracks goes into its memory; the memory's averages side by side.
  __device__ __forceinline__ void remember(int i) const {
    const Shape& s = model.shape;
    const int r = i % R, dim = int(s.dim), line = int(model.memory.line());
    float* sums = state(r) + model.memory.array(i / R * s.memory);  // of expert i / R
    const float precision = shared[q.at.precision + i], *x = shared + q.at.tracks + i * q.at.dim;
    float* to = shared + q.at.recalled + i * q.at.recall;
    for (int h = 0; h < s.memory; ++h) {
      float* kept = sums + h * line;  // the weighted sum, and behind it the sum of the weights and the count
      const float decay = model.decay[h], weight = leaky_weight(decay, kept[dim], precision);
      const float count = leaky_count(decay, kept[dim + 1], precision);
      const float scale = leaky_scale(model.prior[h], weight, count, true);
      for (int d = lane; d < dim; d += kWarp) {
        const float sum = leaky_sum(decay, kept[d], precision, x[d]);
        if (live(r)) kept[d] = sum;
        to[h * dim + d] = sum * scale;
      }
      __syncwarp();
      if (lane == 0 && live(r)) kept[dim] = weight, kept[dim + 1] = count;
    }
  }

  __device__ __forceinline__ void step() const {
    const Shape& s = model.shape;
    const int M = s.modalities, K = s.experts(), dim = int(s.dim), stride = q.at.dim, first = this->first();
    const int narrow = q.at.narrow, assessed = s.reliability ? M : 0, joint = s.joint ? 1 : 0;
    float *part = shared + q.at.part, *encoded = shared + q.at.encoded, *mixed = shared + q.at.mixed;
    float *tracks = shared + q.at.tracks, *hidden = shared + q.at.hidden;
    const auto encoded_of = [&](const Linear& f, int m) { return Job{&f, encoded + m * R * stride, stride}; };

    standardise();
    __syncthreads();
    product<T, R>(
        part, M + assessed, R,
        [&](int j) {
          const int m = j % M;
          return Job{j < M ? &model.modality[m].project : &model.modality[m].components,
                     shared + q.at.input[m], tiled(s.in_dim[m])};
        },
        [&](int j, int r, int n, float y) {
          if (j < M)
            encoded[(j * R + r) * stride + n] = y;
          else
            shared[q.at.components + ((j - M) * R + r) * q.at.component + n] = y;
        });
    for (int b = 0; b < s.own_blocks; ++b) {
      convolve(encoded, M * R, 0, [&](int m) -> const Block& { return model.modality[m].block[b]; });
      __syncthreads();
      product<T, R>(
          part, M, R,
          [&](int m) { return Job{&model.modality[m].block[b].pointwise, mixed + m * R * stride, stride}; },
          [&](int m, int r, int n, float y) { encoded[(m * R + r) * stride + n] += y; });
    }
    for (int i = warp; i < M * R; i += warps) {
      const int m = i / R, r = i % R;
      layer_norm(model.modality[m].norm, dim, lane, encoded + i * stride);
      if (joint)
        for (int d = lane; d < dim; d += kWarp)
          shared[q.at.side + r * q.at.beside + m * dim + d] = present(r)[m] ? encoded[i * stride + d] : 0.0f;
    }
    __syncthreads();

    // What is learnt of each modality, its usual part rebuilt, its value, and the joint expert's first layer.
    product<T, R>(
        part, 2 * assessed + M + joint, R,
        [&](int j) {
          if (j < assessed) return encoded_of(model.modality[j].evidence, j);
          const int m = j - assessed;
          if (m < assessed)
            return Job{&model.modality[m].rebuild, shared + q.at.components + m * R * q.at.component,
                       q.at.component};
          const int k = m - assessed;
          if (k < M) return encoded_of(model.modality[k].value, k);
          return Job{&model.joint[0], shared + q.at.side, q.at.beside};
        },
        [&](int j, int r, int n, float y) {
          const int m = j - assessed, k = m - assessed;
          if (j < assessed)
            shared[q.at.joint + r * q.at.joined + j * int(s.evidence) + n] = present(r)[j] ? gelu(y) : 0.0f;
          else if (m < assessed)
            shared[q.at.rebuilt[m] + r * tiled(s.in_dim[m]) + n] = y;
          else if (k < M)
            tracks[((first + k) * R + r) * stride + n] = y;
          else
            mixed[r * stride + n] = silu(y);
        });
    if (s.reliability) {
      for (int i = warp; i < M * R; i += warps) measure_residual(i);
      __syncthreads();
      for (int r = warp; r < R; r += warps) assess_typicality(r), assess_quality(r);
      __syncthreads();
    }
    const int heads = s.reliability ? K + 1 : 0;
    product<T, R>(
        part, heads + joint, R,
        [&](int j) {
          if (j >= heads) return Job{&model.joint[1], mixed, stride};
          if (j == K) return Job{&model.emission[0], shared + q.at.joint, q.at.joined};
          if (j < first) return Job{&model.head_of[j][0], shared + q.at.all_signs, q.at.spread};
          return Job{&model.head_of[j][0], shared + q.at.signs + (j - first) * R * q.at.width, q.at.width};
        },
        [&](int j, int r, int n, float y) {
          if (j >= heads)
            tracks[r * stride + n] = y;
          else
            hidden[(j * R + r) * narrow + n] = gelu(y);
        });
    if (s.reliability)
      product<T, R>(
          part, K + 1, R,
          [&](int k) {
            return Job{k < K ? &model.head_of[k][1] : &model.emission[1], hidden + k * R * narrow, narrow};
          },
          [&](int k, int r, int n, float y) {
            if (k == K)
              stages(q.at.emission, r)[n] = y;
            else
              logits(k, r)[n] = n < s.stages ? fma(y, model.logit_scale[k * s.stages + n],
                                                   model.logit_bias[k * s.stages + n])
                                             : y;
          });
    for (int i = warp; i < R + K * R; i += warps) {
      if (i < R)
        gate(i);
      else
        value(i - R);
    }
    __syncthreads();
    for (int b = 0; b < s.fused_blocks; ++b) {
      convolve(tracks, K * R, 1, [&](int) -> const Block& { return model.fused[b]; });
      __syncthreads();
      product<T, track_rows(R)>(
          part, 1, K * R, [&](int) { return Job{&model.fused[b].pointwise, mixed, stride}; },
          [&](int, int i, int n, float y) { tracks[i * stride + n] += y; });
    }
    if (s.memory) {
      for (int i = warp; i < K * R; i += warps) remember(i);
      __syncthreads();
      product<T, track_rows(R)>(
          part, 1, K * R, [&](int) { return Job{&model.recall, shared + q.at.recalled, q.at.recall}; },
          [&](int, int i, int n, float y) { tracks[i * stride + n] += y; });
    }
    for (int i = warp; i < K * R; i += warps) layer_norm(model.norm, dim, lane, tracks + i * stride);
    __syncthreads();
    product<T, track_rows(R)>(
        part, 1, K * R, [&](int) { return Job{&model.head[0], tracks, stride}; },
        [&](int, int i, int n, float y) { mixed[i * stride + n] = silu(y); });
    product<T, track_rows(R)>(
        part, 1, K * R, [&](int) { return Job{&model.head[1], mixed, stride}; },
        [&](int, int i, int n, float y) { shared[q.at.said + i * q.at.saying + n] = tanh(y); });
    if (int(threadIdx.x) < R) weigh(int(threadIdx.x));
  }
};

template <class T, int R>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    stream_kernel(const __grid_constant__ StreamLaunch q) {
  unsigned char* memory = shared_memory<unsigned char>();
  const int thread = int(threadIdx.x);
  const Group<T, R> group(q, *reinterpret_cast<const Model*>(memory),
                          reinterpret_cast<float*>(memory + sizeof(Model)));
  group.begin();
  __syncthreads();
  group.step();
  if (thread < R && group.live(thread)) {
    const int64_t row = group.row(thread);
    ++q.frames[row];
    ++q.counts[row * (1 + 2 * group.model.shape.modalities)];
  }
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
