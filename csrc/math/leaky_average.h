// One frame of the leaky average (docs/math.md, "Leaky average"): for each half-life, with decay = 0.5^(1 / half-life),
//
//   sum'    = decay sum + p x          what was seen, weighed by its precision p
//   weight' = decay weight + p         the precisions
//   count'  = decay count + [p > 0]    the frames
//   average = sum' / (prior pbar + weight'),   pbar = 1, or where the prior is relative weight' / count'
//
// A frame of precision 0 is not read, so it may hold anything, NaN included; an average of nothing is 0.
#pragma once
#include "scalar.h"

namespace sage {

template <class V>
SAGE_FN V leaky_sum(V decay, V sum, V precision, V x) {
  using T = typename ScalarOf<V>::Type;
  return fma(decay, sum, select(precision > V(T(0)), precision * x, V(T(0))));
}
template <class V>
SAGE_FN V leaky_weight(V decay, V weight, V precision) {
  return fma(decay, weight, precision);
}
// What turns a sum into an average.
template <class V>
SAGE_FN V leaky_scale(V prior, V weight) {
  using T = typename ScalarOf<V>::Type;
  const V total = prior + weight;
  return select(total > V(T(0)), V(T(1)) / total, V(T(0)));
}

}  // namespace sage
