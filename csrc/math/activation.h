// Activations of the models, of a float or a row of lanes.
#pragma once
#include "scalar.h"

namespace sage {

template <class V>
SAGE_FN V silu(V x) {
  using T = typename ScalarOf<V>::Type;
  return x / (V(T(1)) + exp(-x));
}

template <class V>
SAGE_FN V tanh(V x) {
  using T = typename ScalarOf<V>::Type;
  const V e = exp(V(T(-2)) * abs(x)), t = (V(T(1)) - e) / (V(T(1)) + e);
  return select(x < V(T(0)), -t, t);
}

// x Phi(x), with erfc by Abramowitz and Stegun 7.1.26: its error is under 1.5e-7, so this one's under 1e-7 |x|.
template <class V>
SAGE_FN V gelu(V x) {
  using T = typename ScalarOf<V>::Type;
  const V z = abs(x) * V(T(0.70710678118654752440));
  const V t = V(T(1)) / fma(z, V(T(0.3275911)), V(T(1)));
  V p(T(1.061405429));
  p = fma(p, t, V(T(-1.453152027)));
  p = fma(p, t, V(T(1.421413741)));
  p = fma(p, t, V(T(-0.284496736)));
  p = fma(p, t, V(T(0.254829592)));
  const V tail = V(T(0.5)) * (p * t) * exp(-(z * z));  // Phi(-|x|)
  return x * select(x < V(T(0)), tail, V(T(1)) - tail);
}

}  // namespace sage
