// Concordance: moments, their exact merge, Lin's coefficient and its adjoint (docs/math.md, "Concordance").
//
//   moments = (count, mean_p, mean_t, M2_p, M2_t, C_pt), centred sums, so equal numbers give exact zeros
//   ccc     = 2 C_pt / (M2_p + M2_t + count (mean_p - mean_t)^2)      population moments, the 1/n cancelled
#pragma once
#include "scalar.h"

namespace sage {

template <class V>
struct Moments {
  V count, mean_p, mean_t, m2_p, m2_t, c_pt;
};

template <class V>
SAGE_FN Moments<V> no_moments() {
  const V zero(typename ScalarOf<V>::Type(0));
  return {zero, zero, zero, zero, zero, zero};
}

// Chan, Golub & LeVeque 1979. An empty side changes nothing.
template <class V>
SAGE_FN Moments<V> merge(const Moments<V>& a, const Moments<V>& b) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  const V count = a.count + b.count;
  const V share = select(count > zero, b.count / count, zero);
  const auto fresh = a.count <= zero, nothing = b.count <= zero;
  const V dp = select(nothing, zero, b.mean_p - a.mean_p), dt = select(nothing, zero, b.mean_t - a.mean_t);
  const V cross = a.count * share;
  return {count,
          select(fresh, b.mean_p, fma(dp, share, a.mean_p)),
          select(fresh, b.mean_t, fma(dt, share, a.mean_t)),
          a.m2_p + b.m2_p + dp * dp * cross,
          a.m2_t + b.m2_t + dt * dt * cross,
          a.c_pt + b.c_pt + dp * dt * cross};
}

// The same with one more frame (x, y) of weight `valid`, 0 or 1; the past is first scaled by `decay`.
template <class V>
SAGE_FN Moments<V> push(const Moments<V>& a, V decay, V valid, V x, V y) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  const V past = a.count * decay, count = past + valid;
  const V share = select(count > zero, valid / count, zero);
  const auto fresh = past <= zero, seen = valid > zero;
  const V dp = select(seen, x - a.mean_p, zero), dt = select(seen, y - a.mean_t, zero);
  const V cross = past * share;
  const auto first = fresh & seen;
  return {count,
          select(first, x, fma(dp, share, a.mean_p)),
          select(first, y, fma(dt, share, a.mean_t)),
          fma(a.m2_p, decay, dp * dp * cross),
          fma(a.m2_t, decay, dt * dt * cross),
          fma(a.c_pt, decay, dp * dt * cross)};
}

template <class V>
SAGE_FN V concordance_denominator(const Moments<V>& m) {
  const V gap = m.mean_p - m.mean_t;
  return m.m2_p + m.m2_t + m.count * gap * gap;
}

// ccc is defined where two frames count and the denominator is not 0; elsewhere it is 0. A denominator that is NaN counts
// as defined: a model that has diverged must not look like one that is uncorrelated.
template <class V>
SAGE_FN auto concordance_defined(V count, V denominator) {
  using T = typename ScalarOf<V>::Type;
  return (count >= V(T(2))) & negate(denominator <= V(T(0)));
}

template <class V, class Mask>
SAGE_FN V concordance(const Moments<V>& m, Mask defined, V denominator) {
  using T = typename ScalarOf<V>::Type;
  return select(defined, (m.c_pt + m.c_pt) / denominator, V(T(0)));
}

// Adjoint with respect to the data. For a frame (x, y) of weight w:
//   d ccc / dx = w (offset_p + slope_p (x - mean_p) + slope_c (y - mean_t))
//   d ccc / dy = w (offset_t + slope_t (y - mean_t) + slope_c (x - mean_p))
template <class V>
struct Slopes {
  V offset_p, offset_t, slope_p, slope_t, slope_c;
};

template <class V>
SAGE_FN Slopes<V> moments_slopes(V grad_mean_p, V grad_mean_t, V grad_m2_p, V grad_m2_t, V grad_c, V count) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  const V inverse = select(count > zero, V(T(1)) / count, zero);
  return {grad_mean_p * inverse, grad_mean_t * inverse, grad_m2_p + grad_m2_p, grad_m2_t + grad_m2_t, grad_c};
}

template <class V, class Mask>
SAGE_FN Slopes<V> concordance_slopes(const Moments<V>& m, Mask defined, V denominator, V grad) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  const V scale = select(defined, (grad + grad) / denominator, zero);       // d ccc / d C_pt
  const V down = select(defined, -(scale * (m.c_pt / denominator)), zero);  // d ccc / d denominator
  const V gap =
      down * (m.mean_p - m.mean_t);  // d / d mean_p = 2 n gap; the n cancels against d mean / dx = w / n
  return {gap + gap, -(gap + gap), down + down, down + down, scale};
}

}  // namespace sage
