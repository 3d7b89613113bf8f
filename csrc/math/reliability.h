// Stage-mixed, calibrated reliability of one modality (docs/math.md, "Reliability-weighted fusion").
//
//   l[s] = reliability[s] exp(-log_temperature[s]) + bias[s]        calibrated logit of each stage
//   r    = sum_s stage[s] sigmoid(l[s])                             confidence
//   n    = sum_s stage[s] sigmoid(-l[s])                            its complement, without cancellation
//   g    = log r - log n                                            log-odds
//
// V is a float, a double or a row of lanes. Where r or n is too small for plain arithmetic the sums are taken relative to
// the best possible stage (stage[s] > 0), in log space; the largest ratio kept is exp(60), as in reference.py.
#pragma once
#include "scalar.h"

namespace sage {

template <class V> struct SigmoidPair { V p, n; };  // sigmoid(l), sigmoid(-l)

template <class V> SAGE_FN SigmoidPair<V> sigmoid_pair(V l) {
  using T = typename ScalarOf<V>::Type;
  const V e = exp(-abs(l));
  const V large = V(T(1)) / (V(T(1)) + e), small = e * large;
  const auto positive = l >= V(T(0));
  return {select(positive, large, small), select(positive, small, large)};
}

// log sigmoid(l) = min(l, 0) - log(1 + exp(-|l|))
template <class V> SAGE_FN V log_sigmoid(V l) {
  using T = typename ScalarOf<V>::Type;
  return min(l, V(T(0))) - log(V(T(1)) + exp(-abs(l)));
}

constexpr double kMaxLogRatio = 60.0;    // reference.MAX_LOG_RATIO
constexpr double kPlainLimit = 1e-26;    // about exp(-60): above it plain sums keep every ratio under exp(60)

// log sum_s stage[s] exp(log_p(sign * l[s])) by its peak, for the rare frames that plain sums cannot hold.
// peak and z are kept for backward: d g / d stage[s] = exp(min(log_p - peak, 60)) / z.
template <class V> struct LogMixture { V peak, z; };

template <class V> SAGE_FN LogMixture<V> log_mixture(int stages, const V* l, const V* stage, int sign) {
  using T = typename ScalarOf<V>::Type;
  const V lowest(T(-3e38));
  V peak = lowest;
  for (int s = 0; s < stages; ++s) {
    const V log_p = log_sigmoid(sign > 0 ? l[s] : -l[s]);
    peak = max(peak, select(stage[s] > V(T(0)), log_p, lowest));
  }
  peak = select(peak > lowest, peak, V(T(0)));
  V z(T(0));
  for (int s = 0; s < stages; ++s) {
    const V log_p = log_sigmoid(sign > 0 ? l[s] : -l[s]);
    z = fma(stage[s], exp(min(log_p - peak, V(T(kMaxLogRatio)))), z);
  }
  return {peak, z};
}

template <class V> struct Reliability { V confidence, log_odds; };

template <class V> SAGE_FN Reliability<V> reliability(int stages, const V* l, const V* stage) {
  using T = typename ScalarOf<V>::Type;
  V r(T(0)), n(T(0));
  for (int s = 0; s < stages; ++s) {
    const SigmoidPair<V> q = sigmoid_pair(l[s]);
    r = fma(stage[s], q.p, r);
    n = fma(stage[s], q.n, n);
  }
  V g = log(r / n);
  const auto extreme = min(r, n) < V(T(kPlainLimit));
  if (any(extreme)) {
    const LogMixture<V> a = log_mixture(stages, l, stage, 1), b = log_mixture(stages, l, stage, -1);
    g = select(extreme, (a.peak + log(a.z)) - (b.peak + log(b.z)), g);
  }
  return {r, g};
}

// Adjoint: gradients of r and g to those of l[s] and stage[s] (grad_stage is added to).
template <class V>
SAGE_FN void reliability_backward(int stages, const V* l, const V* stage, V grad_r, V grad_g, V* grad_l,
                                  V* grad_stage) {
  using T = typename ScalarOf<V>::Type;
  V r(T(0)), n(T(0));
  for (int s = 0; s < stages; ++s) {
    const SigmoidPair<V> q = sigmoid_pair(l[s]);
    r = fma(stage[s], q.p, r);
    n = fma(stage[s], q.n, n);
  }
  const auto extreme = min(r, n) < V(T(kPlainLimit));
  const V inv_r = V(T(1)) / r, inv_n = V(T(1)) / n;
  LogMixture<V> a = {V(T(0)), V(T(1))}, b = a;
  const bool slow = any(extreme);
  if (slow) {
    a = log_mixture(stages, l, stage, 1);
    b = log_mixture(stages, l, stage, -1);
  }
  for (int s = 0; s < stages; ++s) {
    const SigmoidPair<V> q = sigmoid_pair(l[s]);
    V up = q.p * inv_r, down = q.n * inv_n;  // d log r / d stage[s], d log n / d stage[s]
    if (slow) {
      const V cap = V(T(kMaxLogRatio));
      up = select(extreme, exp(min(log_sigmoid(l[s]) - a.peak, cap)) / a.z, up);
      down = select(extreme, exp(min(log_sigmoid(-l[s]) - b.peak, cap)) / b.z, down);
    }
    grad_l[s] = stage[s] * fma(grad_r, q.p * q.n, grad_g * fma(up, q.n, down * q.p));
    grad_stage[s] += fma(grad_r, q.p, grad_g * (up - down));
  }
}

}  // namespace sage
