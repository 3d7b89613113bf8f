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

// In memory: six doubles in the order of the fields.
constexpr int kMoments = 6;
SAGE_FN Moments<double> read_moments(const double* from) {
  return {from[0], from[1], from[2], from[3], from[4], from[5]};
}
SAGE_FN void write_moments(double* to, const Moments<double>& m) {
  to[0] = m.count, to[1] = m.mean_p, to[2] = m.mean_t, to[3] = m.m2_p, to[4] = m.m2_t, to[5] = m.c_pt;
}

// `count` frames whose distances to a shift sum up to p and t, their squares to pp and tt, their products to pt. The shift
// is one of the frames, so equal numbers give exact zeros.
SAGE_FN Moments<double> centred(double count, double shift_p, double shift_t, double p, double t, double pp,
                                double tt, double pt) {
  const double inverse = count > 0 ? 1 / count : 0, mean_p = p * inverse, mean_t = t * inverse;
  return {count,
          count > 0 ? shift_p + mean_p : 0,
          count > 0 ? shift_t + mean_t : 0,
          max(0.0, pp - p * mean_p),
          max(0.0, tt - t * mean_t),
          pt - p * mean_t};
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
// as defined: a model that has diverged must not look like one that is uncorrelated. `frames`: how many frames are valid,
// which is m.count where none has decayed.
template <class V>
SAGE_FN MaskOf<V> concordance_defined(V frames, V denominator) {
  using T = typename ScalarOf<V>::Type;
  return (frames >= V(T(2))) & negate(denominator <= V(T(0)));
}

template <class V>
struct Concordance {
  V ccc;
  MaskOf<V> defined;
};
template <class V>
SAGE_FN Concordance<V> concordance(const Moments<V>& m, V frames) {
  using T = typename ScalarOf<V>::Type;
  const V denominator = concordance_denominator(m);
  const auto defined = concordance_defined(frames, denominator);
  return {select(defined, (m.c_pt + m.c_pt) / denominator, V(T(0))), defined};
}

// Adjoint with respect to the data: the gradients of a frame (x, y) that counts, as functions of dx = x - mean_p and
// dy = y - mean_t. Those of frames that do not count are 0.
template <class V>
struct Slopes {
  V offset_p, offset_t, slope_p, slope_t, slope_c;
  SAGE_FN V pred(V dx, V dy) const { return fma(slope_p, dx, fma(slope_c, dy, offset_p)); }
  SAGE_FN V target(V dx, V dy) const { return fma(slope_t, dy, fma(slope_c, dx, offset_t)); }
};

// From the gradients of the six moments; that of the count is none.
template <class V>
SAGE_FN Slopes<V> moments_slopes(V grad_mean_p, V grad_mean_t, V grad_m2_p, V grad_m2_t, V grad_c, V count) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  const V inverse = select(count > zero, V(T(1)) / count, zero);
  return {grad_mean_p * inverse, grad_mean_t * inverse, grad_m2_p + grad_m2_p, grad_m2_t + grad_m2_t, grad_c};
}

// From the gradient of ccc.
template <class V>
SAGE_FN Slopes<V> concordance_slopes(const Moments<V>& m, V frames, V grad) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0));
  const V denominator = concordance_denominator(m);
  const auto defined = concordance_defined(frames, denominator);
  const V scale = select(defined, (grad + grad) / denominator, zero);       // d ccc / d C_pt
  const V down = select(defined, -(scale * (m.c_pt / denominator)), zero);  // d ccc / d denominator
  // d / d mean_p = 2 n gap; the n cancels against d mean / dx = w / n
  const V gap = down * (m.mean_p - m.mean_t);
  return {gap + gap, -(gap + gap), down + down, down + down, scale};
}

// The same functions of the distances to an origin that lies at mean_p - dp, mean_t - dt.
template <class V>
SAGE_FN Slopes<V> about_origin(const Slopes<V>& s, V dp, V dt) {
  return {s.offset_p - s.slope_p * dp - s.slope_c * dt, s.offset_t - s.slope_t * dt - s.slope_c * dp,
          s.slope_p, s.slope_t, s.slope_c};
}

}  // namespace sage
