// One frame of SAGE for up to kGroup rows at a time, whole: standardise, project, temporal blocks, evidence, stage
// filter, the experts' values, fused blocks, memory, heads; last the experts are weighed.
//
// The time is that of bringing the matrices to the registers: each is read once a group, from front to back (1 MB in
// float32 with the default sizes, half in bfloat16), everything else is a few microseconds. A product keeps up to four
// vectors of outputs of up to kRows rows in registers and walks the inputs, so an output is one chain of multiply-adds
// (four interleaved ones where few outputs would leave the units idle), the same whatever rows are beside it.
#include "../stream/model.h"

#include "isa.h"
#include "../math/activation.h"
#include "../math/experts.h"
#include "../math/frame.h"
#include "../math/leaky_average.h"
#include "../math/reliability_fusion.h"
#include "../math/stage_filter.h"

namespace sage::cpu::SAGE_ISA {
namespace {

using namespace sage::stream;
using V = Lanes<float>;
constexpr int W = V::width;
constexpr int kVectors = 4;  // of a panel
#if defined(__AVX512F__)
constexpr int kRows = 6;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 3;  // 12 of 16
#endif
static_assert(kPad % W == 0 && kGroup % kRows == 0, "buffers hold whole vectors, groups whole tiles");

// ------------------------------------------------------------------------------------------------------- products
// NV vectors of weights. In bfloat16 two vectors share words, one in the low and one in the high halves: a shift and a
// mask bring them back.
template <int NV>
SAGE_FN void load_weights(const float* w, V* out) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) out[v] = load(w + v * W);
}
template <int NV>
SAGE_FN void load_weights(const bf16* w, V* out) {
#pragma GCC unroll 2
  for (int v = 0; v + 1 < NV; v += 2) {
    WordBits words;
    std::memcpy(&words, w + v * W, sizeof words);
    out[v] = V((V::Vec)(words << 16));
    out[v + 1] = V((V::Vec)(words & 0xffff0000u));
  }
  if (NV % 2) out[NV - 1] = load(w + (NV - 1) * W);
}

// R rows of x times P panels of NV vectors, into y (added to it, if wished).
template <class T, int NV, int P, int R>
__attribute__((noinline)) void tile(const T* w, int64_t inputs, const float* bias, const float* x,
                                    int64_t x_stride, float* y, int64_t y_stride, bool add) {
  constexpr int kSplit = NV == 1 ? 4 : NV == 2 ? 2 : 1;
  const int64_t panel = inputs * NV * W;
  V acc[R][kSplit][P * NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < kSplit; ++s)
#pragma GCC unroll 8
      for (int v = 0; v < P * NV; ++v) acc[r][s][v] = V(0.0f);

  const auto advance = [&](int64_t k, int s) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      V b[NV];
      load_weights<NV>(w + p * panel + k * NV * W, b);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V input(x[r * x_stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][s][p * NV + v] = fma(b[v], input, acc[r][s][p * NV + v]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kSplit <= inputs; k += kSplit) {
#pragma GCC unroll 4
    for (int s = 0; s < kSplit; ++s) advance(k + s, s);
  }
#pragma GCC unroll 3
  for (int s = 0; s < kSplit - 1; ++s)
    if (k + s < inputs) advance(k + s, s);

#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v) {
      V total = acc[r][0][v];
      if (kSplit == 2) total += acc[r][1][v];
      if (kSplit == 4) total = (total + acc[r][1][v]) + (acc[r][2][v] + acc[r][3][v]);
      total += load(bias + v * W);
      float* to = y + r * y_stride + v * W;
      store(to, add ? load(to) + total : total);
    }
}

template <class T, int NV, int P>
SAGE_FN void tiles(int rows, const T* w, int64_t inputs, const float* bias, const float* x, int64_t x_stride,
                   float* y, int64_t y_stride, bool add) {
#define SAGE_TILE(R) \
  case R:            \
    return tile<T, NV, P, R>(w, inputs, bias, x, x_stride, y, y_stride, add)
  switch (rows) {
    SAGE_TILE(1);
    SAGE_TILE(2);
    SAGE_TILE(3);
#if defined(__AVX512F__)
    SAGE_TILE(4);
    SAGE_TILE(5);
    SAGE_TILE(6);
#endif
  }
#undef SAGE_TILE
}

template <class T>
void product_of(const Linear& f, int rows, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                bool add) {
  const T* w = (const T*)f.weight;
  const int64_t K = f.inputs, vectors = (f.outputs + W - 1) / W;
  int64_t v = 0;
  if (rows == 1) {  // two panels at once: a lone row has too few chains to hide a multiply-add's latency
    for (; v + 2 * kVectors <= vectors; v += 2 * kVectors)
      tile<T, kVectors, 2, 1>(w + v * W * K, K, f.bias + v * W, x, x_stride, y + v * W, y_stride, add);
  }
  for (; v < vectors; v += kVectors) {
    const T* panel = w + v * W * K;
    const int wide = int(vectors - v < kVectors ? vectors - v : kVectors);
    for (int r = 0; r < rows; r += kRows) {
      const int some = rows - r < kRows ? rows - r : kRows;
      const float* from = x + r * x_stride;
      float* to = y + r * y_stride + v * W;
      const float* bias = f.bias + v * W;
      if (wide == 4) tiles<T, 4, 1>(some, panel, K, bias, from, x_stride, to, y_stride, add);
      if (wide == 3) tiles<T, 3, 1>(some, panel, K, bias, from, x_stride, to, y_stride, add);
      if (wide == 2) tiles<T, 2, 1>(some, panel, K, bias, from, x_stride, to, y_stride, add);
      if (wide == 1) tiles<T, 1, 1>(some, panel, K, bias, from, x_stride, to, y_stride, add);
    }
  }
}

// y[r] = W x[r] + b, or y[r] += that.
void product(const Model& model, const Linear& f, int rows, const float* x, int64_t x_stride, float* y,
             int64_t y_stride, bool add = false) {
  if (model.shape.bf16) return product_of<bf16>(f, rows, x, x_stride, y, y_stride, add);
  product_of<float>(f, rows, x, x_stride, y, y_stride, add);
}

// ------------------------------------------------------------------------------------------------- rows of numbers
struct Moments {
  V mean, rstd;
};
// Of the first `dim` numbers of a padded row, whose padding is 0.
SAGE_FN Moments moments(const float* x, int64_t dim) {
  V s(0.0f), drift(0.0f), ss(0.0f);
  for (int64_t d = 0; d < dim; d += W) s += load(x + d);
  const V mean(sum(s) / float(dim));
  for_each_vector<W>(dim, [&](int64_t d, auto at) {
    const V c = at.keep(at.read(x + d) - mean);
    drift += c;
    ss = fma(c, c, ss);
  });
  const NormMoments<float> m = norm_moments(mean[0], sum(drift), sum(ss), float(dim), float(kNormEps));
  return {V(m.mean), V(m.rstd)};
}
SAGE_FN V normed(const float* x, const Moments& m, const Norm& norm, int64_t d) {
  return fma((load(x + d) - m.mean) * m.rstd, load(norm.weight + d), load(norm.bias + d));
}
void layer_norm(const Norm& norm, int64_t dim, const float* x, float* y) {
  const Moments m = moments(x, dim);
  for (int64_t d = 0; d < dim; d += W) store(y + d, normed(x, m, norm, d));
}

template <V (*f)(V)>
SAGE_FN void map(const float* x, int64_t n, float* y) {
  for_each_vector<W>(n, [&](int64_t d, auto at) { at.write(y + d, f(at.read(x + d))); });
}

// -------------------------------------------------------------------------------------------------------- a group
struct Group {
  const Model& model;
  const Step& q;
  const int64_t* row;  // `rows` of them
  int rows;
  // Scratch; a row of each starts every `wide`, `joined`... floats.
  float *input, *encoded, *mixed, *tracks, *side, *joint, *hidden, *logits, *emission, *recalled;
  float *components, *rebuilt;
  int64_t input_stride, dim_stride, side_stride, joint_stride, hidden_stride, stage_stride, recalled_stride,
      component_stride;
  float square[kGroup][kEnergies * kMaxModalities] = {};
  float precision[kMaxModalities * kGroup];  // of expert k's frame, row after row
  float log_odds[kGroup][kMaxModalities], confidence[kGroup][kMaxModalities];  // of each expert
  bool present[kGroup][kMaxModalities];

  Group(const Model& model, const Step& q, const int64_t* row, int rows)
      : model(model), q(q), row(row), rows(rows) {}
  SAGE_FN float* state(int i) const { return q.state + row[i] * model.row_floats; }
  SAGE_FN float* encoded_of(int m) const { return encoded + m * kGroup * dim_stride; }
  // Of expert k; `rows` rows each, one track behind the other, so that a product takes them all as rows.
  SAGE_FN float* track(int k) const { return tracks + k * rows * dim_stride; }
  SAGE_FN float* logits_of(int k) const { return logits + k * kGroup * stage_stride; }
  // Of row i: what is learnt from all modalities, then the signs of all.
  SAGE_FN float* learnt(int i, int m) const { return joint + i * joint_stride + m * model.shape.evidence; }
  SAGE_FN float* signs(int i, int m) const {
    return learnt(i, model.shape.modalities) + model.shape.signs_before(m);
  }
  SAGE_FN int experts() const { return model.shape.experts(); }
  // The place of the first modality among the experts.
  SAGE_FN int first() const { return model.shape.joint ? 1 : 0; }
  SAGE_FN bool some(int i) const {
    bool any = false;
    for (int m = 0; m < model.shape.modalities; ++m) any = any || present[i][m];
    return any;
  }
  // Whether expert k's frame says anything.
  SAGE_FN bool says(int i, int k) const { return k < first() ? some(i) : present[i][k - first()]; }
};

// The scratch of a group, cut from one piece; returns its size.
int64_t cut_scratch(const Shape& s, float* base, Group* g) {
  int64_t widest = 0, deepest = 0;
  for (int m = 0; m < s.modalities; ++m) {
    widest = s.in_dim[m] > widest ? s.in_dim[m] : widest;
    deepest = s.components(m) > deepest ? s.components(m) : deepest;
  }
  const int64_t input = padded(widest), dim = padded(s.dim), stages = padded(2 * s.stages);
  const int64_t joint = padded(s.modalities * s.evidence + s.all_signs()), hidden = padded(s.evidence);
  // Small products write whole vectors: the targets of a head go through `hidden` too.
  const int64_t narrow = hidden > padded(s.targets) ? hidden : padded(s.targets);
  int64_t used = 0;
  const auto take = [&](int64_t stride, int64_t rows) {
    float* at = base ? base + used : nullptr;
    used += stride * rows;
    return at;
  };
  const int64_t all = int64_t(s.modalities) * kGroup, tracks = int64_t(s.experts()) * kGroup;
  const int64_t recalled = padded(s.memory * s.dim), components = padded(s.reliability ? deepest : 0);
  const int64_t side = padded(s.joint ? s.modalities * s.dim : 0);
  float* parts[] = {take(input, kGroup),  take(dim, all),           take(dim, tracks),
                    take(dim, tracks),    take(joint, kGroup),      take(narrow, tracks),
                    take(stages, tracks), take(stages, kGroup),     take(recalled, tracks),
                    take(side, kGroup),   take(components, kGroup), take(s.reliability ? input : 0, kGroup)};
  if (g) {
    g->input = parts[0], g->encoded = parts[1], g->mixed = parts[2], g->tracks = parts[3];
    g->joint = parts[4], g->hidden = parts[5], g->logits = parts[6], g->emission = parts[7];
    g->recalled = parts[8], g->recalled_stride = recalled;
    g->side = parts[9], g->side_stride = side;
    g->components = parts[10], g->component_stride = components, g->rebuilt = parts[11];
    g->input_stride = input, g->dim_stride = dim, g->joint_stride = joint, g->hidden_stride = narrow;
    g->stage_stride = stages;
  }
  return used;
}

// Standardised input of one modality, zero where it is missing, and two of the mean squares that typicality reads. A frame
// that does not count is missing: nothing downstream can then become NaN.
void standardise(Group& g, int m) {
  const Shape& s = g.model.shape;
  const Modality& from = g.model.modality[m];
  const int64_t n = s.in_dim[m];
  for (int i = 0; i < g.rows; ++i) {
    const int64_t row = g.row[i], flag = row * s.modalities + m;
    const float* raw = g.q.features[m] + row * n;
    float *x = g.input + i * g.input_stride, *last = g.state(i) + g.model.last[m].at;
    const bool given = !g.q.present || g.q.present[flag];
    FrameSums<V> sums = {V(0.0f), V(0.0f), V(0.0f)};
    if (given)
      for_each_vector<W>(n, [&](int64_t d, auto at) {
        const V v = (at.read(raw + d) - load(from.mean + d)) * load(from.scale + d);
        store(x + d, v);
        sums.add(v, load(last + d));
      });
    float* repeats = s.stuck ? g.state(i) + g.model.repeats.at + m : nullptr;
    const FrameVerdict verdict = judge_frame(given, sum(sums.squares), sum(sums.moved),
                                             repeats ? *repeats : 0.0f, g.model.stuck_limit[m]);
    if (repeats) *repeats = verdict.repeats;
    if (!verdict.here) {
      sums = {V(0.0f), V(0.0f), V(0.0f)};
      for (int64_t d = 0; d < n; d += W) {
        sums.add(V(0.0f), load(last + d));
        store(x + d, V(0.0f));
      }
      ++g.q.absent[flag];
      g.q.refused[flag] += given && !verdict.stuck;
    }
    g.square[i][kEnergies * m] = sum(sums.squares) / float(n);
    g.square[i][kEnergies * m + 1] = sum(sums.steps) / float(n);
    g.present[i][m] = verdict.here || s.hide_missing;
    g.q.out.present[flag] = verdict.here;
    // A stuck input stays the last one; typicality counts no motion after a missing frame.
    for (int64_t d = 0; d < n && !verdict.stuck; d += W) store(last + d, load(x + d));
  }
}

// The third mean square: of what is left of the standardised input outside the principal components.
void measure_residual(Group& g, int m) {
  const Shape& s = g.model.shape;
  const Modality& from = g.model.modality[m];
  const int64_t n = s.in_dim[m];
  product(g.model, from.components, g.rows, g.input, g.input_stride, g.components, g.component_stride);
  product(g.model, from.rebuild, g.rows, g.components, g.component_stride, g.rebuilt, g.input_stride);
  for (int i = 0; i < g.rows; ++i) {
    const float *x = g.input + i * g.input_stride, *usual = g.rebuilt + i * g.input_stride;
    V squares(0.0f);
    for_each_vector<W>(n, [&](int64_t d, auto at) {
      const V left = at.keep(at.read(x + d) - at.read(usual + d));
      squares = fma(left, left, squares);
    });
    g.square[i][kEnergies * m + 2] = sum(squares) / float(n);
  }
}

// x += pointwise silu(depthwise LayerNorm(x)), with the normed frame kept in the ring, in the place of the oldest.
// x: a row of each stream, `tracks` times one behind the other.
void temporal_block(Group& g, const Block& block, float* x, int tracks = 1) {
  const Shape& s = g.model.shape;
  const int64_t dim = g.dim_stride;
  for (int r = 0; r < tracks * g.rows; ++r) {
    const int track = r / g.rows, i = r % g.rows;
    const float* row = x + r * dim;
    float *ring = g.state(i) + block.ring + track * block.span * dim, *y = g.mixed + r * dim;
    const int64_t start = block.span ? g.q.frames[g.row[i]] % block.span : 0;
    const Moments m = moments(row, s.dim);
    for (int64_t d = 0; d < dim; d += W) {
      const V h = normed(row, m, block.norm, d);
      V sum = load(block.bias + d);
      int64_t slot = start;
      for (int tap = 0; tap < s.kernel - 1; ++tap) {
        sum = fma(load(ring + slot * dim + d), load(block.taps + tap * dim + d), sum);
        slot += block.dilation;
        slot = slot >= block.span ? slot - block.span : slot;
      }
      sum = fma(h, load(block.taps + (s.kernel - 1) * dim + d), sum);
      if (block.span) store(ring + start * dim + d, h);
      store(y + d, silu(sum));
    }
  }
  product(g.model, block.pointwise, tracks * g.rows, g.mixed, dim, x, dim, true);
}

// The signs that typicality gives; and its rings move on by a frame. A lane a (modality, energy).
void assess_typicality(Group& g) {
  const Shape& s = g.model.shape;
  const int M = s.modalities, all = kEnergies * M, history = s.window - 1;
  const int64_t line = g.model.energy.line();
  for (int i = 0; i < g.rows; ++i) {
    float *energies = g.state(i) + g.model.energy.at, *counts = g.state(i) + g.model.counted.at;
    const int start = history ? int(g.q.frames[g.row[i]] % history) : 0;
    const float* before = counts + (start ? start - 1 : history - 1) * line;
    float here[kEnergyLanes] = {}, counted[kEnergyLanes] = {}, square[kEnergyLanes] = {};
    for (int c = 0; c < all; ++c) {
      here[c] = counted[c] = g.present[i][c / kEnergies], square[c] = g.square[i][c];
      if (c % kEnergies == 1) counted[c] = here[c] > 0 && history && before[c - 1] > 0;
    }
    float signed_level[kEnergyLanes], level[kEnergyLanes];
    for (int c = 0; c < all; c += W) {
      const V count = load(counted + c);
      const V energy = select(count > V(0.0f), log_energy(load(square + c)), V(0.0f));
      const auto past = [&](int slot) __attribute__((always_inline)) {
        return EnergyWindow<V>{load(energies + slot * line + c), load(counts + slot * line + c)};
      };
      const EnergyWindow<V> window = sum_window(history, start, past, EnergyWindow<V>{energy, count});
      if (history) store(energies + start * line + c, energy), store(counts + start * line + c, count);
      const Typicality<V> found = typicality(window, load(here + c) > V(0.0f), load(g.model.typical_mean + c),
                                             load(g.model.typical_std + c));
      store(signed_level + c, found.signed_level), store(level + c, found.level);
    }
    for (int c = 0; c < all; ++c) {
      float* to = g.signs(i, c / kEnergies) + c % kEnergies;
      to[0] = signed_level[c], to[kEnergies] = level[c];
    }
  }
}

// The signs that quality gives, behind those of typicality; and its averages move on by a frame.
void assess_quality(Group& g) {
  const Shape& s = g.model.shape;
  const int Q = s.qualities();
  for (int i = 0; i < g.rows && Q; ++i) {
    float* sums = g.state(i) + g.model.quality.at;
    const float* given = g.q.quality ? g.q.quality + g.row[i] * Q : nullptr;
    for (int m = 0, q = 0; m < s.modalities; ++m)
      for (int c = 0; c < s.quality_dim[m]; ++c, ++q) {
        const bool told = given && g.q.out.present[g.row[i] * s.modalities + m];
        const QualitySigns found =
            quality_signs(told ? given[q] : 0.0f, told, g.model.quality_mean[q], g.model.quality_scale[q],
                          g.model.quality_decay, sums + 3 * q);
        float* to = g.signs(i, m) + kTypicality + kQuality * c;
        to[0] = found.now, to[1] = found.average, to[2] = found.known;
      }
  }
}

// Linear, GELU, Linear of the evidence.
void perceive(Group& g, const Linear (&layers)[2], const float* from, float* to) {
  product(g.model, layers[0], g.rows, from, g.joint_stride, g.hidden, g.hidden_stride);
  for (int i = 0; i < g.rows; ++i) {
    float* x = g.hidden + i * g.hidden_stride;
    map<gelu>(x, g.model.shape.evidence, x);
  }
  product(g.model, layers[1], g.rows, g.hidden, g.hidden_stride, to, g.stage_stride);
}

// Logits of reliability and of a frame's precision, and stage emissions, from the encoded modalities.
void assess(Group& g) {
  const Shape& s = g.model.shape;
  assess_typicality(g);
  assess_quality(g);
  for (int m = 0; m < s.modalities; ++m) {
    product(g.model, g.model.modality[m].evidence, g.rows, g.encoded_of(m), g.dim_stride, g.hidden,
            g.hidden_stride);
    for (int i = 0; i < g.rows; ++i) {
      float *evidence = g.learnt(i, m), *signs = g.signs(i, m);
      if (g.present[i][m]) {
        map<gelu>(g.hidden + i * g.hidden_stride, s.evidence, evidence);
        continue;
      }
      for (int64_t d = 0; d < s.evidence; ++d) evidence[d] = 0;
      for (int d = 0; d < s.signs(m); ++d) signs[d] = 0;
    }
  }
  for (int k = 0; k < g.experts(); ++k)
    perceive(g, g.model.head_of[k], k < g.first() ? g.signs(0, 0) : g.signs(0, k - g.first()),
             g.logits_of(k));
  perceive(g, g.model.emission, g.joint, g.emission);
}

// Stage filter, confidences and precisions of rows [first, first + W): a lane a row; lanes past the last repeat it.
template <int S>
void gate_lanes(Group& g, int first) {
  const Shape& s = g.model.shape;
  const int stages = S ? S : s.stages;
  const int lanes = g.rows - first < W ? g.rows - first : W;
  const auto gather = [&](auto&& number) {
    if (lanes == 1) return V(number(first));  // the same, without a detour through memory
    float x[W];
    for (int l = 0; l < W; ++l) x[l] = number(first + (l < lanes ? l : lanes - 1));
    return load(x);
  };
  const V zero(0.0f);
  const Bits<float> some = gather([&](int i) { return float(g.some(i)); }) > zero;
  V belief[kMaxStages], p[kMaxStages], emission[kMaxStages], logit[kMaxStages];
  for (int j = 0; j < stages; ++j) {
    belief[j] = gather([&](int i) { return g.state(i)[g.model.belief.at + j]; });
    p[j] = exp(belief[j]);
    emission[j] = select(some, gather([&](int i) { return g.emission[i * g.stage_stride + j]; }), zero);
  }
  stage_step(stages, g.model.log_a, g.model.a, emission, belief, p);
  for (int l = 0; l < lanes; ++l)
    for (int j = 0; j < stages; ++j) {
      g.state(first + l)[g.model.belief.at + j] = belief[j][l];
      g.q.out.stage[g.row[first + l] * stages + j] = p[j][l];
    }

  for (int k = 0; k < g.experts(); ++k) {
    const float *scale = g.model.logit_scale + k * stages, *bias = g.model.logit_bias + k * stages;
    V log_precision = zero;
    for (int j = 0; j < stages; ++j) {
      const float* raw = g.logits_of(k) + j;
      logit[j] = fma(gather([&](int i) { return raw[i * g.stage_stride]; }), V(scale[j]), V(bias[j]));
      log_precision =
          fma(p[j], gather([&](int i) { return raw[i * g.stage_stride + stages]; }), log_precision);
    }
    const Reliability<V> r = reliability(stages, logit, p);
    const V precision = frame_precision(log_precision);
    for (int l = 0; l < lanes; ++l) {
      const int i = first + l;
      g.log_odds[i][k] = r.log_odds[l], g.confidence[i][k] = r.confidence[l];
      g.precision[k * g.rows + i] = g.says(i, k) ? precision[l] : 0.0f;
    }
  }
}

void gate(Group& g) {
  const Shape& s = g.model.shape;
  if (s.reliability) {
    assess(g);
    for (int first = 0; first < g.rows; first += W)
      if (s.stages == 4)
        gate_lanes<4>(g, first);
      else
        gate_lanes<0>(g, first);
    return;
  }
  for (int i = 0; i < g.rows; ++i) {
    for (int k = 0; k < g.experts(); ++k) {
      g.log_odds[i][k] = 0, g.confidence[i][k] = 0.5f;
      g.precision[k * g.rows + i] = g.says(i, k) ? 1.0f : 0.0f;
    }
    g.q.out.stage[g.row[i]] = 1.0f;
  }
}

// The experts' values, normed, 0 where they have nothing to say.
void value(Group& g) {
  const Shape& s = g.model.shape;
  const int64_t dim = g.dim_stride;
  for (int m = 0; m < s.modalities; ++m)
    product(g.model, g.model.modality[m].value, g.rows, g.encoded_of(m), dim, g.track(g.first() + m), dim);
  if (s.joint) {
    for (int i = 0; i < g.rows; ++i) {
      float* to = g.side + i * g.side_stride;
      for (int m = 0; m < s.modalities; ++m) {
        const float* x = g.encoded_of(m) + i * dim;
        for (int64_t d = 0; d < s.dim; ++d) to[m * s.dim + d] = g.present[i][m] ? x[d] : 0.0f;
      }
    }
    product(g.model, g.model.joint[0], g.rows, g.side, g.side_stride, g.mixed, dim);
    for (int i = 0; i < g.rows; ++i) map<silu>(g.mixed + i * dim, s.dim, g.mixed + i * dim);
    product(g.model, g.model.joint[1], g.rows, g.mixed, dim, g.track(0), dim);
  }
  for (int k = 0; k < g.experts(); ++k)
    for (int i = 0; i < g.rows; ++i) {
      float* x = g.track(k) + i * dim;
      if (!g.says(i, k))
        for (int64_t d = 0; d < dim; d += W) store(x + d, V(0.0f));
      else if (s.value_norm)
        layer_norm({g.model.value_norm.weight + k * dim, g.model.value_norm.bias + k * dim}, s.dim, x, x);
    }
}

// x += recall of the memory's averages, once this frame is in them.
void remember(Group& g) {
  const Model& model = g.model;
  const Shape& s = model.shape;
  const int64_t dim = g.dim_stride;
  const int rows = g.experts() * g.rows;
  for (int r = 0; r < rows; ++r) {
    float* sums = g.state(r % g.rows) + model.memory.array(r / g.rows * s.memory);
    const V precision(g.precision[r]);
    const float* x = g.tracks + r * dim;
    float* to = g.recalled + r * g.recalled_stride;
    for (int h = 0; h < s.memory; ++h) {
      float* sum = sums + h * model.memory.line();
      const V decay(model.decay[h]), weight = leaky_weight(decay, V(sum[s.dim]), precision);
      const V count = leaky_count(decay, V(sum[s.dim + 1]), precision);
      const V scale = leaky_scale(V(model.prior[h]), weight, count, true);
      for_each_vector<W>(s.dim, [&](int64_t d, auto at) {
        const V next = leaky_sum(decay, at.read(sum + d), precision, at.read(x + d));
        at.write(sum + d, next);
        at.write(to + h * s.dim + d, next * scale);
      });
      sum[s.dim] = weight[0], sum[s.dim + 1] = count[0];
    }
  }
  product(model, model.recall, rows, g.recalled, g.recalled_stride, g.tracks, dim, true);
}

// Row i's estimates, one of each expert `stride` apart, are weighed.
void weigh(Group& g, int i, const float* estimates, int64_t stride) {
  const Model& model = g.model;
  const Shape& s = model.shape;
  const int M = s.modalities, first = g.first();
  const int64_t row = g.row[i];
  bool counts[kMaxModalities];
  for (int k = 0; k < g.experts(); ++k) counts[k] = k < first || g.present[i][k - first];
  if (s.foreign) {
    float p[kMaxStages], *belief = g.state(i) + model.foreign.at, *scaled = g.mixed;
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < s.targets; ++c) {
        const int at = m * s.targets + c;
        scaled[at] = model.own_gain[at] * estimates[(first + m) * stride + c] + model.own_shift[at];
      }
    foreign_step(M, s.targets, scaled, g.confidence[i] + first, counts + first, model.foreign_pace,
                 model.foreign_log_a, model.foreign_a, belief, p);
    for (int k = 0; k < g.experts(); ++k) {
      const Reliability<float> r = doubted(g.log_odds[i][k], k < first ? 1 - p[0] : p[1 + k - first]);
      g.confidence[i][k] = r.confidence, g.log_odds[i][k] = r.log_odds;
    }
  }
  mix_experts(g.experts(), M, s.targets, model.sharpness, estimates, stride, g.log_odds[i], counts,
              g.q.out.prediction + row * s.targets, g.q.out.weights + row * M);
  for (int m = 0; m < M; ++m)
    g.q.out.confidence[row * M + m] = counts[first + m] ? g.confidence[i][first + m] : 0.0f;
}

// Blocks after the fusion, memory and head, on all tracks; then the experts are weighed.
void predict(Group& g) {
  const Model& model = g.model;
  const Shape& s = model.shape;
  const int64_t dim = g.dim_stride, narrow = g.hidden_stride;
  const int tracks = g.experts(), rows = tracks * g.rows;
  for (int b = 0; b < s.fused_blocks; ++b) temporal_block(g, model.fused[b], g.tracks, tracks);
  if (s.memory) remember(g);
  for (int r = 0; r < rows; ++r) layer_norm(model.norm, s.dim, g.tracks + r * dim, g.tracks + r * dim);
  product(model, model.head[0], rows, g.tracks, dim, g.mixed, dim);
  for (int r = 0; r < rows; ++r) map<silu>(g.mixed + r * dim, s.dim, g.mixed + r * dim);
  product(model, model.head[1], rows, g.mixed, dim, g.hidden, narrow);
  for (int r = 0; r < rows; ++r) map<tanh>(g.hidden + r * narrow, s.targets, g.hidden + r * narrow);
  for (int i = 0; i < g.rows; ++i) {
    for (int m = 0; m < s.modalities; ++m)
      for (int c = 0; c < s.targets; ++c)
        g.q.out.unimodal[(g.row[i] * s.modalities + m) * s.targets + c] =
            g.hidden[((g.first() + m) * g.rows + i) * narrow + c];
    weigh(g, i, g.hidden + i * narrow, g.rows * narrow);
  }
}

void step_group(Group& g) {
  const Model& model = g.model;
  const Shape& s = model.shape;
  const int64_t dim = g.dim_stride;
  for (int m = 0; m < s.modalities; ++m) {
    const Modality& of = model.modality[m];
    float* x = g.encoded_of(m);
    standardise(g, m);
    if (s.reliability) measure_residual(g, m);
    product(model, of.project, g.rows, g.input, g.input_stride, x, dim);
    for (int b = 0; b < s.own_blocks; ++b) temporal_block(g, of.block[b], x);
    for (int i = 0; i < g.rows; ++i) layer_norm(of.norm, s.dim, x + i * dim, x + i * dim);
  }
  gate(g);
  value(g);
  predict(g);
  for (int i = 0; i < g.rows; ++i) ++g.q.frames[g.row[i]];
}

// --------------------------------------------------------------------------------------------------------- packing
// A matrix as panels of up to kVectors vectors of outputs, input after input.
template <class T>
struct Panels {
  static size_t bytes(int64_t inputs, int64_t outputs) {
    return size_t((outputs + W - 1) / W * W * inputs) * sizeof(T);
  }
  static void write(const float* from, int64_t inputs, int64_t outputs, void* memory) {
    T* to = (T*)memory;
    const int64_t vectors = (outputs + W - 1) / W;
    for (int64_t v = 0; v < vectors; v += kVectors) {
      const int wide = int(vectors - v < kVectors ? vectors - v : kVectors);
      for (int64_t k = 0; k < inputs; ++k) {
        float x[kVectors * W];
        for (int c = 0; c < wide * W; ++c) {
          const int64_t n = v * W + c;
          x[c] = n < outputs ? from[n * inputs + k] : 0.0f;
        }
        put(x, wide, to + v * W * inputs + k * wide * W);
      }
    }
  }
  static void put(const float* x, int wide, float* to) {
    for (int v = 0; v < wide; ++v) store(to + v * W, load(x + v * W));
  }
  static void put(const float* x, int wide, bf16* to) {
    bf16 half[kVectors * W];
    for (int v = 0; v < wide; ++v) store(half + v * W, load(x + v * W));
    for (int v = 0; v < wide; v += 2)
      for (int l = 0; l < W; ++l) {
        if (v + 1 == wide) {
          to[v * W + l] = half[v * W + l];
        } else {
          const uint32_t word = uint32_t(half[(v + 1) * W + l].bits) << 16 | half[v * W + l].bits;
          std::memcpy((char*)(to + v * W) + 4 * l, &word, 4);
        }
      }
  }
};

}  // namespace

size_t stream_matrix_bytes(bool half, int64_t inputs, int64_t outputs) {
  return half ? Panels<bf16>::bytes(inputs, outputs) : Panels<float>::bytes(inputs, outputs);
}
void stream_matrix_write(bool half, const float* from, int64_t inputs, int64_t outputs, void* to) {
  half ? Panels<bf16>::write(from, inputs, outputs, to) : Panels<float>::write(from, inputs, outputs, to);
}
int64_t stream_scratch(const Shape& shape) { return cut_scratch(shape, nullptr, nullptr); }

void stream_step(const Model& model, const Step& q) {
  for (int64_t i = 0; i < q.count; i += kGroup) {
    const int rows = int(q.count - i < kGroup ? q.count - i : kGroup);
    Group g(model, q, q.order + q.first + i, rows);
    cut_scratch(model.shape, q.scratch, &g);
    step_group(g);
  }
}

}  // namespace sage::cpu::SAGE_ISA
