// Stage-mixed, calibrated reliability of one modality (docs/math.md, "Reliability-weighted fusion").
//
//   l[s] = reliability[s] exp(-log_temperature[s]) + bias[s]        calibrated logit of each stage
//   r    = sum_s stage[s] sigmoid(l[s])                             confidence
//   n    = sum_s stage[s] sigmoid(-l[s])                            its complement, without cancellation
//   g    = log r - log n                                            log-odds
//
// V is a float, a double or a row of lanes. Where r or n is too small for plain arithmetic the sums are taken
// in log space, relative to their largest term; a derivative in stage[s] is kept under exp(60), as in
// reference.py. l and stage are anything with [s]: an array, or a reader of memory. `Across` says how the
// stages of one modality are spread: over nobody (Alone, the CPU), or over neighbouring CUDA threads that
// each take every step-th stage.
#pragma once
#include "scalar.h"

namespace sage {

struct Alone {
  static constexpr int first = 0, step = 1;
  SAGE_FN int count(int stages) const { return stages; }
  template <class V>
  SAGE_FN V sum(V x) const {
    return x;
  }
  template <class V>
  SAGE_FN V max(V x) const {
    return x;
  }
  template <class Mask>
  SAGE_FN bool any(Mask m) const {
    using sage::any;  // and, by its type, that of lanes
    return any(m);
  }
};

template <class V>
struct SigmoidPair {
  V p, n;  // sigmoid(l), sigmoid(-l)
};

template <class V>
SAGE_FN SigmoidPair<V> sigmoid_pair(V l) {
  using T = typename ScalarOf<V>::Type;
  const V e = exp(-abs(l));
  const V large = V(T(1)) / (V(T(1)) + e), small = e * large;
  const auto positive = l >= V(T(0));
  return {select(positive, large, small), select(positive, small, large)};
}

// log sigmoid(l) = min(l, 0) - log(1 + exp(-|l|))
template <class V>
SAGE_FN V log_sigmoid(V l) {
  using T = typename ScalarOf<V>::Type;
  return min(l, V(T(0))) - log(V(T(1)) + exp(-abs(l)));
}

constexpr double kMaxLogRatio = 60.0;  // reference.MAX_LOG_RATIO
constexpr double kPlainLimit = 1e-26;  // about exp(-60): above it plain sums keep every ratio under exp(60)

// log sum_s stage[s] exp(log_p[s]) = peak + log z for the rare frames that plain sums cannot hold, with
// log_p = log sigmoid(sign * l[s]). The peak is that of the whole terms, stage[s] with it, so z is in 1 .. S.
// Kept for backward: d / d log_p[s] = stage[s] exp(log_p - peak) / z, d / d stage[s] = exp(log_p - peak) / z.
template <class V>
SAGE_FN V log_stage(V stage) {  // finite where the stage is impossible
  using T = typename ScalarOf<V>::Type;
  return select(stage > V(T(0)), log(stage), V(T(-3e38)));
}

template <class V>
struct LogMixture {
  V peak, z;
};

template <class V, class L, class W, class Across = Alone>
SAGE_FN LogMixture<V> log_mixture(int stages, const L& l, const W& stage, int sign,
                                  const Across& across = {}) {
  using T = typename ScalarOf<V>::Type;
  const V lowest(T(-3e38));
  V peak = lowest;
  for (int k = 0, s = across.first; k < across.count(stages); ++k, s += across.step) {
    peak = max(peak, log_sigmoid(sign > 0 ? V(l[s]) : -V(l[s])) + log_stage(V(stage[s])));
  }
  peak = across.max(peak);
  peak = select(peak > lowest, peak, V(T(0)));
  V z(T(0));
  for (int k = 0, s = across.first; k < across.count(stages); ++k, s += across.step) {
    z += exp(log_sigmoid(sign > 0 ? V(l[s]) : -V(l[s])) + log_stage(V(stage[s])) - peak);
  }
  return {peak, across.sum(z)};
}

template <class V>
struct Confidence {
  V r, n;  // and its complement
};

template <class V, class L, class W, class Across>
SAGE_FN Confidence<V> confidence(int stages, const L& l, const W& stage, const Across& across) {
  using T = typename ScalarOf<V>::Type;
  V r(T(0)), n(T(0));
  for (int k = 0, s = across.first; k < across.count(stages); ++k, s += across.step) {
    const SigmoidPair<V> q = sigmoid_pair(V(l[s]));
    r = fma(V(stage[s]), q.p, r);
    n = fma(V(stage[s]), q.n, n);
  }
  return {across.sum(r), across.sum(n)};
}

template <class V>
struct Reliability {
  V confidence, log_odds;
};

template <class V, class L, class W, class Across = Alone>
SAGE_FN Reliability<V> reliability(int stages, const L& l, const W& stage, const Across& across = {}) {
  using T = typename ScalarOf<V>::Type;
  const Confidence<V> c = confidence<V>(stages, l, stage, across);
  V g = log(c.r / c.n);
  const auto extreme = min(c.r, c.n) < V(T(kPlainLimit));
  if (across.any(extreme)) {
    const LogMixture<V> a = log_mixture<V>(stages, l, stage, 1, across),
                        b = log_mixture<V>(stages, l, stage, -1, across);
    g = select(extreme, (a.peak + log(a.z)) - (b.peak + log(b.z)), g);
  }
  return {c.r, g};
}
template <class V>
SAGE_FN Reliability<V> reliability(int stages, const V* l, const V* stage) {
  return reliability<V, const V*, const V*>(stages, l, stage);
}

// The softmax over modalities: weight[m] = exp(score[m] - peak) / total over those that are present, 0 for the
// others, and 0 for all where none is; a score of NaN, or scores that are all -inf, give NaN. A thread or lane has
// `count` of a row's modalities; `across` adds up and compares those that lie elsewhere (Alone: all are here).
template <class V, class Mask, class Across = Alone>
SAGE_FN void modality_weights(int count, const V* score, const Mask* present, V* weight,
                              const Across& across = {}) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0)), lowest(-T(INFINITY));
  V peak = lowest, total = zero;
  for (int m = 0; m < count; ++m) peak = max(peak, select(present[m], score[m], lowest));
  peak = across.max(peak);
  for (int m = 0; m < count; ++m) {
    weight[m] = select(present[m], exp(score[m] - peak), zero);
    total += weight[m];
  }
  total = across.sum(total);
  for (int m = 0; m < count; ++m) weight[m] = select(total <= zero, zero, weight[m] / total);  // NaN stays
}

// Its adjoint, in place: grad[m] comes as the gradient of weight[m] and leaves as that of score[m].
template <class V, class Mask, class Across = Alone>
SAGE_FN void modality_weights_adjoint(int count, const V* weight, const Mask* present, V* grad,
                                      const Across& across = {}) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  V mean = zero;
  for (int m = 0; m < count; ++m) {
    grad[m] = select(present[m], grad[m], zero);
    mean = fma(weight[m], grad[m], mean);
  }
  mean = across.sum(mean);
  for (int m = 0; m < count; ++m) grad[m] = select(present[m], weight[m] * (grad[m] - mean), zero);
}

// LayerNorm statistics of a row of `dim` numbers x from sums over x - near, where `near` is any number close to the mean:
// taken about 0 the variance would be the small difference of two large numbers, and the mean's own rounding would show
// in rows that hardly vary.
template <class A>
struct NormMoments {
  A mean, rstd;
};
template <class A>
SAGE_FN NormMoments<A> norm_moments(A near, A sum_of_distances, A sum_of_squares, A dim, A eps) {
  const A offset = sum_of_distances / dim, variance = fma(-offset, offset, sum_of_squares / dim);
  return {near + offset, A(1) / sqrt(max(variance, A(0)) + eps)};
}

// Adjoint of a modality's LayerNorm where it is mixed, fused = sum_m weight (xhat gamma + beta). With
// u = d fused gamma,
//   d weight = sum u xhat + sum d fused beta
//   d x      = weight rstd (u - mean(u) - xhat mean(u xhat)) = u by_u + xhat by_xhat + constant
template <class A>
struct NormAdjoint {
  A by_u, by_xhat, constant;
};
template <class A>
SAGE_FN NormAdjoint<A> norm_adjoint(A weight, A rstd, A sum_u, A sum_u_xhat, A dim) {
  const A scale = weight * rstd;
  return {scale, -scale * sum_u_xhat / dim, -scale * sum_u / dim};
}

// Adjoint of reliability(): from the gradients of r and g those of l[s] and stage[s], handed to
// emit(s, grad of l[s], grad of stage[s]).
template <class V, class L, class W, class Across, class Emit>
SAGE_FN void reliability_adjoint(int stages, const L& l, const W& stage, V grad_r, V grad_g,
                                 const Across& across, Emit&& emit) {
  using T = typename ScalarOf<V>::Type;
  const Confidence<V> c = confidence<V>(stages, l, stage, across);
  const auto extreme = min(c.r, c.n) < V(T(kPlainLimit));
  const V inv_r = V(T(1)) / c.r, inv_n = V(T(1)) / c.n;
  LogMixture<V> a = {V(T(0)), V(T(1))}, b = a;
  const bool slow = across.any(extreme);
  if (slow) {
    a = log_mixture<V>(stages, l, stage, 1, across);
    b = log_mixture<V>(stages, l, stage, -1, across);
  }
  for (int k = 0, s = across.first; k < across.count(stages); ++k, s += across.step) {
    const V logit(l[s]), w(stage[s]);
    const SigmoidPair<V> q = sigmoid_pair(logit);
    V up = q.p * inv_r, down = q.n * inv_n;      // d log r / d stage[s], d log n / d stage[s]
    V share_up = w * up, share_down = w * down;  // d log r / d log p[s], d log n / d log n[s]
    if (slow) {
      const V cap = V(T(kMaxLogRatio)), log_w = log_stage(w);
      const V log_up = log_sigmoid(logit) - a.peak, log_down = log_sigmoid(-logit) - b.peak;
      up = select(extreme, exp(min(log_up, cap)) / a.z, up);
      down = select(extreme, exp(min(log_down, cap)) / b.z, down);
      share_up = select(extreme, exp(log_up + log_w) / a.z, share_up);
      share_down = select(extreme, exp(log_down + log_w) / b.z, share_down);
    }
    emit(s, fma(w * grad_r, q.p * q.n, grad_g * fma(share_up, q.n, share_down * q.p)),
         fma(grad_r, q.p, grad_g * (up - down)));
  }
}

// The same into arrays; grad_stage is added to.
template <class V>
SAGE_FN void reliability_backward(int stages, const V* l, const V* stage, V grad_r, V grad_g, V* grad_l,
                                  V* grad_stage) {
  reliability_adjoint<V>(stages, l, stage, grad_r, grad_g, Alone{}, [&](int s, V to_l, V to_stage) {
    grad_l[s] = to_l;
    grad_stage[s] += to_stage;
  });
}

}  // namespace sage
