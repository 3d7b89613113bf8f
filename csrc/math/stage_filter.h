// One frame of the causal Bayes filter over interaction stages (docs/math.md, "Stage filter").
//
//   prior[j]  = logsumexp_i(belief[i] + A[i][j])        A = log_softmax(transition)
//   belief'   = log_softmax(prior + emission)
//
// The sum runs over probabilities p = exp(belief), P = exp(A): S*S multiply-adds and S logarithms instead of
// S*S exponentials. Where a sum is so small that terms lost to underflow could matter it is taken again in
// log space.
#pragma once
#include "../ops.h"
#include "scalar.h"

namespace sage {

constexpr double kSafeSum = 1e-25;     // lost terms are under 2^-126 each
constexpr double kImpossible = -1e30;  // log 0, finite: all that is below, -inf too, counts as this

// A logit as it is used; NaN stays.
template <class V>
SAGE_FN V finite_logit(V logit) {
  return max(V(typename ScalarOf<V>::Type(kImpossible)), logit);
}
// Its adjoint: what reaches a logit below the bound is 0.
template <class V>
SAGE_FN V finite_logit_adjoint(V logit, V grad) {
  using T = typename ScalarOf<V>::Type;
  return select(logit < V(T(kImpossible)), V(T(0)), grad);
}

// log sum_i exp(term(i)) over i < count, of which there are Most at the most: a GPU keeps that many in registers; 0: it keeps
// none, and its code is a loop.
template <class V, int Most, class Term>
SAGE_FN V log_sum_exp(int count, Term&& term) {
  using T = typename ScalarOf<V>::Type;
  V peak = max(V(T(-3e38)), term(0)), z(T(0));  // finite where every term is log 0: -inf
  const int most = Most ? Most : count;
#pragma unroll(Most ? Most : 1)
  for (int i = 1; i < most; ++i)
    if (i < count) peak = max(peak, term(i));
#pragma unroll(Most ? Most : 1)
  for (int i = 0; i < most; ++i)
    if (i < count) z += exp(term(i) - peak);
  return peak + log(z);
}

// The prior in log space, for sums that may have lost terms to underflow.
template <class V, class Matrix, int Most = kMaxStages>
SAGE_FN V stage_prior_exact(int stages, const V* belief, const Matrix* log_a, int j) {
  return log_sum_exp<V, Most>(stages, [&](int i) { return belief[i] + V(log_a[i * stages + j]); });
}

// One row of log_softmax(transition), in double: calls emit(j, log probability).
template <class T, class Emit>
SAGE_FN void transition_row(int stages, const T* logits, Emit&& emit) {
  double peak = finite_logit(double(logits[0])), total = 0;
  for (int j = 1; j < stages; ++j) peak = max(peak, finite_logit(double(logits[j])));
  for (int j = 0; j < stages; ++j) total += exp(finite_logit(double(logits[j])) - peak);
  const double log_total = log(total);
  for (int j = 0; j < stages; ++j) emit(j, finite_logit(double(logits[j])) - peak - log_total);
}

// log of P(stage j) before this frame's evidence.
template <int Most = kMaxStages, class V, class Matrix>
SAGE_FN V stage_prior(int stages, const Matrix* log_a, const Matrix* a, const V* belief, const V* p, int j) {
  using T = typename ScalarOf<V>::Type;
  V sum = p[0] * V(a[j]);
#if defined(SAGE_SHORT_CODE)
#pragma unroll 1
#endif
  for (int i = 1; i < stages; ++i) sum = fma(p[i], V(a[i * stages + j]), sum);
  V prior = log(sum);
  const auto lost = sum < V(T(kSafeSum));
  if (any(lost)) prior = select(lost, stage_prior_exact<V, Matrix, Most>(stages, belief, log_a, j), prior);
  return prior;
}

// belief, p: of the last frame in, of this frame out. emission: this frame's evidence (zeros where masked).
template <class V, class Matrix>
SAGE_FN void stage_step(int stages, const Matrix* log_a, const Matrix* a, const V* emission, V* belief,
                        V* p) {
  using T = typename ScalarOf<V>::Type;
  V next[kMaxStages];
  V peak, likeliest = emission[0];  // evidence is relative: log 0 for every stage is none
  for (int j = 1; j < stages; ++j) likeliest = max(likeliest, emission[j]);
  for (int j = 0; j < stages; ++j) {
    next[j] = stage_prior(stages, log_a, a, belief, p, j) + (emission[j] - likeliest);
    peak = j == 0 ? next[0] : max(peak, next[j]);
  }
  V total(T(0));
  for (int j = 0; j < stages; ++j) {
    next[j] = next[j] - peak;
    p[j] = exp(next[j]);
    total += p[j];
  }
  const V log_total = log(total), scale = V(T(1)) / total;
  for (int j = 0; j < stages; ++j) {
    belief[j] = next[j] - log_total;
    p[j] = p[j] * scale;
  }
}

// Adjoint of one frame. In: last frame's belief and p, this frame's p (p_now), and grad_belief of this frame
// (all that reaches its log-belief). Out: grad_u, the gradient of prior + emission (so of the emission where
// the frame counts); grad_belief of the last frame; grad_log_a added to.
template <class V, class Matrix>
SAGE_FN void stage_step_backward(int stages, const Matrix* log_a, const Matrix* a, const V* belief,
                                 const V* p, const V* p_now, V* grad_belief, V* grad_u, V* grad_log_a) {
  using T = typename ScalarOf<V>::Type;
  V total(T(0));
  for (int j = 0; j < stages; ++j) total += grad_belief[j];
  V back[kMaxStages];
  for (int i = 0; i < stages; ++i) back[i] = V(T(0));
  for (int j = 0; j < stages; ++j) {
    const V g = grad_belief[j] - p_now[j] * total;
    grad_u[j] = g;
    V sum = p[0] * V(a[j]);
    for (int i = 1; i < stages; ++i) sum = fma(p[i], V(a[i * stages + j]), sum);
    const auto lost = sum < V(T(kSafeSum));
    const bool slow = any(lost);
    const V prior = slow ? max(V(T(-3e38)), stage_prior_exact(stages, belief, log_a, j)) : V(T(0));
    const V h = g / sum;
    for (int i = 0; i < stages; ++i) {  // w = P(stage i before | stage j now)
      V flow = p[i] * V(a[i * stages + j]) * h;
      if (slow) flow = select(lost, exp(belief[i] + V(log_a[i * stages + j]) - prior) * g, flow);
      back[i] += flow;
      grad_log_a[i * stages + j] += flow;
    }
  }
  for (int i = 0; i < stages; ++i) grad_belief[i] = back[i];
}

}  // namespace sage
