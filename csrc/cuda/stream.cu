// One frame of SAGE for many streams in one launch (session.cu launches it, product.cuh multiplies).
//
// A block takes R streams through the whole model: standardise, project, temporal blocks, evidence, stage filter, the experts'
// values, blocks, memory and head on all of them; last they are weighed. What passes between layers stays in shared memory; a
// stream's rings lie in global memory, rows laid out as on the CPU (csrc/stream/model.h).
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

// An expert a lane: what modality_weights adds up and compares lies in the lanes of a warp.
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

  // Whether each modality is said to be present, from standardise() on whether its frame counts; whether it is taken to be there.
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
  __device__ __forceinline__ float* state(int r) const { return q.state + row(r) * model.row_floats; }
  __device__ __forceinline__ float* stages(int at, int r) const { return shared + at + r * kMaxStages; }
  // Of expert k: the logits of its reliability, then those of a frame's log precision.
  __device__ __forceinline__ float* logits(int k, int r) const {
    return shared + q.at.logits + (k * R + r) * 2 * kMaxStages;
  }
  // The place of the first modality among the experts.
  __device__ __forceinline__ int first() const { return model.shape.joint ? 1 : 0; }
  // Whether expert k's frame says anything.
  __device__ __forceinline__ bool says(int r, int k) const {
    if (k >= first()) return present(r)[k - first()];
    bool any = false;
    for (int m = 0; m < q.at.modalities; ++m) any = any || present(r)[m];
    return any;
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
    for (int i = thread; q.frame.quality && i < R * q.at.qualities; i += threads)
      shared[q.at.quality + i] =
          q.frame.quality[row(i / q.at.qualities) * q.at.qualities + i % q.at.qualities];
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

  // Standardised input of each modality, zero where it is missing, and two of the mean squares that typicality reads; as
  // the CPU has it. A warp a (modality, stream).
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
        float* square = shared + q.at.square + (r * kMaxModalities + m) * kEnergies;
        square[0] = verdict.here ? sums.squares / float(n) : 0.0f;
        square[1] = (verdict.here ? sums.steps : blank) / float(n);
        given(r)[m] = verdict.here, present(r)[m] = verdict.here || s.hide_missing;
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

  // mixed = silu(depthwise LayerNorm(x)) of `rows` rows, R streams each of some modalities or experts, with the normed frame
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
#pragma unroll 4
      for (int d = lane; d < n; d += kWarp) sum = fma(left[d], left[d], sum);
      sum = lanes_sum<1, kWarp>(sum);
      if (i == m && kind == 2) square = sum / float(n);
    }
    if (mine) {
      float *energies = state(r) + model.energy.at + lane, *counts = state(r) + model.counted.at;
      const int start = history ? int(frame(r) % history) : 0, line = int(model.energy.line());
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
      if (history && live(r)) energies[start * line] = energy, counts[start * line] = counted;
    }
    for (int c = lane; c < q.at.qualities; c += kWarp) {
      int of = 0;
      while (c >= s.quality_before(of + 1)) ++of;
      float *kept = state(r) + model.quality.at + 3 * c, sums[3] = {kept[0], kept[1], kept[2]};
      const bool told = q.frame.quality && given(r)[of];
      const QualitySigns found =
          quality_signs(told ? shared[q.at.quality + r * q.at.qualities + c] : 0.0f, told,
                        model.quality_mean[c], model.quality_scale[c], model.quality_decay, sums);
      if (live(r)) kept[0] = sums[0], kept[1] = sums[1], kept[2] = sums[2];
      const int at = kTypicality + kQuality * (c - s.quality_before(of));
      put_sign(r, of, at, found.now), put_sign(r, of, at + 1, found.average);
      put_sign(r, of, at + 2, found.known);
    }
  }
  // Signs lie in a row of their modality, in one of all modalities for the joint expert, and behind what is learnt.
  __device__ __forceinline__ void put_sign(int r, int m, int n, float x) const {
    const Shape& s = model.shape;
    const float sign = present(r)[m] ? x : 0.0f;
    const int among_all = s.signs_before(m) + n;
    shared[q.at.signs + (m * R + r) * q.at.told + n] = sign;
    shared[q.at.joint + r * q.at.joined + s.modalities * int(s.evidence) + among_all] = sign;
    if (s.joint) shared[q.at.all_signs + r * q.at.all_told + among_all] = sign;
  }

  // One frame of a filter over S states, a lane each: the probabilities move on by this frame's evidence, into now(), and the
  // log-belief in `kept`, a part of the state.
  __device__ __forceinline__ void filter(int r, int S, const float* log_a, const float* a, float* kept,
                                         float evidence) const {
    float *belief = stages(q.at.belief, r), *prior = stages(q.at.prior, r);
    const bool inside = lane < S;
    if (inside) belief[lane] = kept[lane], prior[lane] = exp(kept[lane]);
    __syncwarp();
    const float next = inside ? stage_prior(S, log_a, a, belief, prior, lane) + evidence : -3e38f;
    const float peak = AcrossWarp{}.max(next);
    const float e = inside ? exp(next - peak) : 0.0f, total = lanes_sum<1, kWarp>(e);
    if (inside) {
      stages(q.at.now, r)[lane] = e / total;
      if (live(r)) kept[lane] = next - peak - log(total);
    }
    __syncwarp();
  }

  // Stage filter of one stream, confidence and precision of its experts: a lane a stage, then a lane an expert.
  __device__ __forceinline__ void gate(int r) const {
    const Shape& s = model.shape;
    const int M = s.modalities, S = s.stages, K = s.experts();
    const bool some = __ballot_sync(kFull, lane < M && present(r)[lane < M ? lane : 0]) != 0;
    const bool tells = lane < first() ? some : lane < K && present(r)[lane < K ? lane - first() : 0];
    float *now = stages(q.at.now, r), confidence = 0.5f, log_odds = 0, log_precision = 0;
    if (s.reliability) {
      filter(r, S, model.log_a, model.a, state(r) + model.belief.at,
             some && lane < S ? stages(q.at.emission, r)[lane] : 0.0f);
      if (lane < K) {
        const float* raw = logits(lane, r);
        const Reliability<float> found = reliability(S, raw, static_cast<const float*>(now));
        confidence = found.confidence, log_odds = found.log_odds;
        for (int j = 0; j < S; ++j) log_precision = fma(now[j], raw[S + j], log_precision);
      }
    } else if (lane == 0) {
      now[0] = 1.0f;
    }
    if (lane < K) {
      shared[q.at.log_odds + r * kMaxModalities + lane] = log_odds;
      shared[q.at.confidence + r * kMaxModalities + lane] = confidence;
      shared[q.at.precision + lane * R + r] = tells ? frame_precision(log_precision) : 0.0f;
    }
    if (lane < S && live(r)) q.out.stage[row(r) * S + lane] = now[lane];
  }

  // One stream's estimates are weighed: a lane an expert.
  __device__ __forceinline__ void weigh(int r) const {
    const Shape& s = model.shape;
    const int M = s.modalities, C = s.targets, K = s.experts(), m = lane - first();
    const bool inside = lane < K, counts = inside && (m < 0 || present(r)[m < 0 ? 0 : m]);
    const int64_t at = row(r);
    const auto estimate = [&](int k, int c) {
      return shared[q.at.estimates + (k * R + r) * q.at.targets + c];
    };
    float confidence = inside ? shared[q.at.confidence + r * kMaxModalities + lane] : 0.0f;
    float log_odds = inside ? shared[q.at.log_odds + r * kMaxModalities + lane] : 0.0f;
    if (s.foreign) {
      // Put to scale, in standard deviations of the targets.
      const auto scaled = [&](int i, int c) {
        return model.own_gain[i * C + c] * estimate(first() + i, c) + model.own_shift[i * C + c];
      };
      const auto trusted = [&](int i) {
        return within_doubt(shared[q.at.confidence + r * kMaxModalities + first() + i]);
      };
      const int own = lane - 1;  // a lane a hypothesis: that all are mine, then that a modality is foreign
      float evidence = 0;
      for (int i = 0; i < M; ++i)
        if (own >= 0 && own < M && own != i && present(r)[own] && present(r)[i])
          evidence += foreign_evidence(trusted(own), trusted(i), C,
                                       [&](int c) { return scaled(own, c) - scaled(i, c); });
      filter(r, 1 + M, model.foreign_log_a, model.foreign_a, state(r) + model.foreign.at,
             evidence / model.foreign_pace);
      if (inside) {
        const float* p = stages(q.at.now, r);
        const Reliability<float> found = doubted(log_odds, m < 0 ? 1 - p[0] : p[1 + m]);
        confidence = found.confidence, log_odds = found.log_odds;
      }
    }
    float score = log_odds * model.sharpness, share = 0;
    modality_weights(1, &score, &counts, &share, AcrossWarp{});
    const float all = lanes_sum<1, kWarp>(inside && m >= 0 ? share : 0.0f);
    if (inside && m >= 0 && live(r)) {
      q.out.weights[at * M + m] = share_among(share, all);
      q.out.confidence[at * M + m] = counts ? confidence : 0.0f;
    }
    for (int c = 0; c < C; ++c) {
      const float sum = lanes_sum<1, kWarp>(inside ? share * estimate(lane, c) : 0.0f);
      if (lane == 0 && live(r)) q.out.prediction[at * C + c] = sum;
    }
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

  // Row i of the encoded modalities, normed; and its place beside the others, 0 where it is missing.
  __device__ __forceinline__ void encode(int i) const {
    const int m = i / R, r = i % R, dim = int(model.shape.dim);
    float* x = shared + q.at.encoded + i * q.at.dim;
    layer_norm(model.modality[m].norm, dim, lane, x);
    if (!model.shape.joint) return;
    float* to = shared + q.at.side + r * q.at.sided + m * dim;
    for (int d = lane; d < dim; d += kWarp) to[d] = present(r)[m] ? x[d] : 0.0f;
  }

  // Row i of the tracks goes into its memory; the memory's averages side by side.
  __device__ __forceinline__ void remember(int i) const {
    const Shape& s = model.shape;
    const int r = i % R, dim = int(s.dim), line = int(model.memory.line());
    float* sums = state(r) + model.memory.array(i / R * s.memory);
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
    const int M = s.modalities, K = s.experts(), dim = int(s.dim), stride = q.at.dim;
    const int narrow = q.at.narrow, assessed = s.reliability ? M : 0, heads = s.reliability ? K : 0;
    const int joint = s.joint ? 1 : 0;
    float *part = shared + q.at.part, *encoded = shared + q.at.encoded, *mixed = shared + q.at.mixed;
    float *tracks = shared + q.at.tracks, *hidden = shared + q.at.hidden;
    const auto encoded_of = [&](const Linear& f, int m) { return Job{&f, encoded + m * R * stride, stride}; };

    standardise();
    __syncthreads();
    product<T, R>(
        part, M + assessed, R,
        [&](int j) {
          const int m = j < M ? j : j - M;
          return Job{j < M ? &model.modality[m].project : &model.modality[m].components,
                     shared + q.at.input[m], tiled(s.in_dim[m])};
        },
        [&](int j, int r, int n, float y) {
          if (j < M)
            encoded[(j * R + r) * stride + n] = y;
          else
            shared[q.at.components + ((j - M) * R + r) * q.at.deep + n] = y;
        });
    for (int b = 0; b < s.own_blocks; ++b) {
      convolve(encoded, M * R, 0, [&](int m) -> const Block& { return model.modality[m].block[b]; });
      __syncthreads();
      product<T, R>(
          part, M, R,
          [&](int m) { return Job{&model.modality[m].block[b].pointwise, mixed + m * R * stride, stride}; },
          [&](int m, int r, int n, float y) { encoded[(m * R + r) * stride + n] += y; });
    }
    for (int i = warp; i < M * R; i += warps) encode(i);
    __syncthreads();

    // Values; the joint expert's first layer; evidence, and what is left of the inputs outside their principal components.
    product<T, R>(
        part, M + joint + 2 * assessed, R,
        [&](int j) {
          if (j < M) return encoded_of(model.modality[j].value, j);
          if ((j -= M) < joint) return Job{&model.joint[0], shared + q.at.side, q.at.sided};
          if ((j -= joint) < assessed) return encoded_of(model.modality[j].evidence, j);
          j -= assessed;
          return Job{&model.modality[j].rebuild, shared + q.at.components + j * R * q.at.deep, q.at.deep};
        },
        [&](int j, int r, int n, float y) {
          if (j < M)
            tracks[((first() + j) * R + r) * stride + n] = y;
          else if ((j -= M) < joint)
            mixed[r * stride + n] = silu(y);
          else if ((j -= joint) < assessed)
            shared[q.at.joint + r * q.at.joined + j * int(s.evidence) + n] = present(r)[j] ? gelu(y) : 0.0f;
          else
            shared[q.at.input[j - assessed] + r * tiled(s.in_dim[j - assessed]) + n] -= y;
        });
    if (s.reliability) {
      for (int r = warp; r < R; r += warps) assess(r);
      __syncthreads();
    }
    const int perceived = s.reliability ? K + 1 : 0;  // the heads, and the stages' emissions
    product<T, R>(
        part, perceived + joint, R,
        [&](int j) {
          if (j >= perceived) return Job{&model.joint[1], mixed, stride};
          if (j == heads) return Job{&model.emission[0], shared + q.at.joint, q.at.joined};
          const int m = j - first();
          return m < 0 ? Job{&model.head_of[j][0], shared + q.at.all_signs, q.at.all_told}
                       : Job{&model.head_of[j][0], shared + q.at.signs + m * R * q.at.told, q.at.told};
        },
        [&](int j, int r, int n, float y) {
          if (j < perceived)
            hidden[(j * R + r) * narrow + n] = gelu(y);
          else
            tracks[r * stride + n] = y;
        });
    if (s.reliability)
      product<T, R>(
          part, perceived, R,
          [&](int j) {
            return Job{j < heads ? &model.head_of[j][1] : &model.emission[1], hidden + j * R * narrow,
                       narrow};
          },
          [&](int j, int r, int n, float y) {
            if (j == heads)
              stages(q.at.emission, r)[n] = y;
            else if (n < s.stages)
              logits(j, r)[n] =
                  fma(y, model.logit_scale[j * s.stages + n], model.logit_bias[j * s.stages + n]);
            else
              logits(j, r)[n] = y;
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
        [&](int, int i, int n, float y) {
          const int r = i % R, m = i / R - first();
          const float estimate = tanh(y);
          shared[q.at.estimates + i * q.at.targets + n] = estimate;
          if (m >= 0 && live(r)) q.out.unimodal[(row(r) * M + m) * s.targets + n] = estimate;
        });
    for (int r = warp; r < R; r += warps) weigh(r);
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
