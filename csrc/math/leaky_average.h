// The leaky average (docs/math.md, "Leaky average"): for each half-life, with decay = 0.5^(1 / half-life), frame by frame
//
//   sum'    = decay sum + p x            what was seen, weighed by its precision p
//   weight' = decay weight + p           the precisions
//   count'  = decay count + [p > 0]      the frames
//   average = sum' scale,  scale = 1 / (prior pbar + weight'),  pbar = 1, or, where the prior is relative, weight' / count'
//
// A frame of precision 0 is not read, so it may hold anything, NaN included. The average of nothing is 0.
#pragma once
#include "scalar.h"

namespace sage {

constexpr double kLeastDouble = 2.2250738585072014e-308, kLeastFloat = 1.17549435e-38;  // normal numbers

// A precision that is not above 0 counts as 0; NaN stays.
template <class V>
SAGE_FN V leaky_precision(V precision) {
  const V zero(typename ScalarOf<V>::Type(0));
  return select(precision <= zero, zero, precision);
}
// What a frame adds to the sum.
template <class V>
SAGE_FN V leaky_term(V precision, V x) {
  const V zero(typename ScalarOf<V>::Type(0));
  return select(precision <= zero, zero, precision * x);
}
template <class V>
SAGE_FN V leaky_sum(V decay, V sum, V precision, V x) {
  return fma(decay, sum, leaky_term(precision, x));
}
template <class V>
SAGE_FN V leaky_weight(V decay, V weight, V precision) {
  return fma(decay, weight, leaky_precision(precision));
}
template <class V>
SAGE_FN V leaky_count(V decay, V count, V precision) {
  using T = typename ScalarOf<V>::Type;
  return fma(decay, count, select(precision <= V(T(0)), V(T(0)), V(T(1))));
}

// What turns a sum into an average: `prior` is absolute here, `prior pbar` in the formula above. After a long time of nothing
// the count has run out before the weight: a total whose inverse would overflow counts as nothing.
template <class V>
SAGE_FN V leaky_scale(V prior, V weight) {
  using T = typename ScalarOf<V>::Type;
  const V total = prior + weight;
  return select(total < V(T(sizeof(T) == 8 ? kLeastDouble : kLeastFloat)), V(T(0)), V(T(1)) / total);
}
template <class V>
SAGE_FN V leaky_scale(V prior, V weight, V count, bool relative) {
  using T = typename ScalarOf<V>::Type;
  const V share = select(count <= V(T(0)), V(T(0)), weight / count);
  return leaky_scale(relative ? prior * share : prior, weight);
}

// Gradients of a frame's average with respect to its weight, count and prior. `dot`: the inner product of the average with
// the gradient that reaches it; -dot scale is then the gradient of prior pbar + weight.
template <class V>
struct LeakyScaleGradient {
  V weight, count, prior;
};
template <class V>
SAGE_FN LeakyScaleGradient<V> leaky_scale_gradient(V prior, V weight, V count, V scale, V dot,
                                                   bool relative) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0)), total = -(dot * scale);
  if (!relative) return {total, zero, total};
  const auto none = count <= zero;
  const V share = select(none, zero, weight / count), inverse = select(none, zero, V(T(1)) / count);
  return {fma(total, prior * inverse, total), -(total * prior * share * inverse), total * share};
}

}  // namespace sage
