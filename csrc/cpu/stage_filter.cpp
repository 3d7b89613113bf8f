// stage_filter on the CPU. A lane is a sequence: `width` sequences advance together, frame by frame, each with its own
// numbers only, so a sequence's bits do not depend on its neighbours. Forward moves 2 B T S numbers (3 B T S with the
// log-belief that backward wants); the time is the serial chain of one frame (S logarithms, S + 1 exponentials, one
// division), not memory.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/stage_filter.h"

namespace sage::cpu::SAGE_ISA {
namespace {

constexpr int kFlushFrames = 64;  // transition gradients: float sums this long, then double

template <class T>
struct Transition {
  T log_a[kMaxStages * kMaxStages], a[kMaxStages * kMaxStages];

  Transition(const T* logits, int stages) {
    for (int i = 0; i < stages; ++i)
      transition_row(stages, logits + i * stages, [&](int j, double l) {
        log_a[i * stages + j] = T(l);
        a[i * stages + j] = T(__builtin_exp(l));
      });
  }
};

// `width` sequences from `first`; lanes past the last sequence repeat it and are never stored.
template <class T>
struct Group {
  using V = Lanes<T>;
  int64_t first;
  int count;

  Group(int64_t first, int64_t batch)
      : first(first), count(int(batch - first < V::width ? batch - first : V::width)) {}
  // x[s] <- base[(first + lane) * stride + offset + s]
  SAGE_FN void gather(const T* base, int64_t stride, int64_t offset, int stages, V* x) const {
    for (int s = 0; s < stages; ++s) {
      T row[V::width];
      store(row, V(base[(first + count - 1) * stride + offset + s]));
      for (int l = 0; l < count - 1; ++l) row[l] = base[(first + l) * stride + offset + s];
      x[s] = load(row);
    }
  }
  SAGE_FN void scatter(T* base, int64_t stride, int64_t offset, int stages, const V* x) const {
    for (int l = 0; l < count; ++l)
      for (int s = 0; s < stages; ++s) base[(first + l) * stride + offset + s] = x[s][l];
  }
  SAGE_FN Bits<T> mask(const uint8_t* mask, int64_t frames, int64_t t) const {
    T seen[V::width];
    store(seen, V(T(mask[(first + count - 1) * frames + t])));
    for (int l = 0; l < count - 1; ++l) seen[l] = mask[(first + l) * frames + t];
    return load(seen) > V(T(0));
  }
};

// log_softmax(initial), and its exponential
template <class T>
SAGE_FN void start(const Group<T>& group, const T* initial, int64_t stride, int stages, Lanes<T>* belief,
                   Lanes<T>* p) {
  using V = Lanes<T>;
  if (initial)
    group.gather(initial, stride, 0, stages, belief);
  else
    for (int s = 0; s < stages; ++s) belief[s] = V(T(0));
  for (int s = 0; s < stages; ++s) belief[s] = finite_logit(belief[s]);
  V peak = belief[0], total(T(0));
  for (int s = 1; s < stages; ++s) peak = max(peak, belief[s]);
  for (int s = 0; s < stages; ++s) {
    belief[s] = belief[s] - peak;
    p[s] = exp(belief[s]);
    total += p[s];
  }
  const V log_total = log(total);
  for (int s = 0; s < stages; ++s) {
    belief[s] = belief[s] - log_total;
    p[s] = p[s] / total;
  }
}

template <class T, int S>
void forward_group(const StageFilterForward& params, const Transition<T>& matrix, int64_t first) {
  using V = Lanes<T>;
  const int stages = S ? S : params.stages;
  const Group<T> group(first, params.batch);
  const int64_t stride = params.frames * stages;
  V belief[kMaxStages], p[kMaxStages], emission[kMaxStages];
  start(group, (const T*)params.initial, params.initial_stride, stages, belief, p);
  for (int64_t t = 0; t < params.frames; ++t) {
    group.gather((const T*)params.emission, stride, t * stages, stages, emission);
    for (int s = 0; s < stages; ++s) emission[s] = finite_logit(emission[s]);
    if (params.mask) {
      const Bits<T> seen = group.mask(params.mask, params.frames, t);
      for (int s = 0; s < stages; ++s) emission[s] = select(seen, emission[s], V(T(0)));
    }
    stage_step(stages, matrix.log_a, matrix.a, emission, belief, p);
    group.scatter((T*)params.posterior, stride, t * stages, stages, p);
    if (params.belief) group.scatter((T*)params.belief, stride, t * stages, stages, belief);
  }
  group.scatter((T*)params.final_belief, stages, 0, stages, belief);
}

template <class T, int S>
void backward_group(const StageFilterBackward& params, const Transition<T>& matrix, int64_t first) {
  using V = Lanes<T>;
  const int stages = S ? S : params.stages;
  const Group<T> group(first, params.batch);
  const int64_t stride = params.frames * stages;
  V belief[kMaxStages], p[kMaxStages], p_now[kMaxStages], grad[kMaxStages], grad_u[kMaxStages], g[kMaxStages];
  V flow[kMaxStages * kMaxStages];
  for (int k = 0; k < stages * stages; ++k) {
    flow[k] = V(T(0));
    for (int l = 0; l < group.count; ++l) params.workspace[(first + l) * stages * stages + k] = 0;
  }
  if (params.grad_final)
    group.gather((const T*)params.grad_final, stages, 0, stages, grad);
  else
    for (int s = 0; s < stages; ++s) grad[s] = V(T(0));

  if (params.frames > 0)
    group.gather((const T*)params.posterior, stride, (params.frames - 1) * stages, stages, p_now);
  for (int64_t t = params.frames - 1; t >= 0; --t) {
    if (params.grad_posterior) {
      group.gather((const T*)params.grad_posterior, stride, t * stages, stages, g);
      for (int s = 0; s < stages; ++s) grad[s] = fma(g[s], p_now[s], grad[s]);
    }
    if (t > 0) {
      group.gather((const T*)params.posterior, stride, (t - 1) * stages, stages, p);
      group.gather((const T*)params.belief, stride, (t - 1) * stages, stages, belief);
    } else {
      start(group, (const T*)params.initial, params.initial_stride, stages, belief, p);
    }
    stage_step_backward(stages, matrix.log_a, matrix.a, belief, p, p_now, grad, grad_u, flow);
    group.gather((const T*)params.emission, stride, t * stages, stages, g);
    for (int s = 0; s < stages; ++s) grad_u[s] = finite_logit_adjoint(g[s], grad_u[s]);
    if (params.mask) {
      const Bits<T> seen = group.mask(params.mask, params.frames, t);
      for (int s = 0; s < stages; ++s) grad_u[s] = select(seen, grad_u[s], V(T(0)));
    }
    group.scatter((T*)params.grad_emission, stride, t * stages, stages, grad_u);
    for (int s = 0; s < stages; ++s) p_now[s] = p[s];
    if (t % kFlushFrames == 0) {
      for (int k = 0; k < stages * stages; ++k) {
        for (int l = 0; l < group.count; ++l)
          params.workspace[(first + l) * stages * stages + k] += flow[k][l];
        flow[k] = V(T(0));
      }
    }
  }
  if (params.grad_initial) {  // through log_softmax(initial)
    if (params.frames == 0) start(group, (const T*)params.initial, params.initial_stride, stages, belief, p);
    V total(T(0));
    for (int s = 0; s < stages; ++s) total += grad[s];
    for (int s = 0; s < stages; ++s) grad[s] = grad[s] - p[s] * total;
    if (params.initial) {
      group.gather((const T*)params.initial, params.initial_stride, 0, stages, g);
      for (int s = 0; s < stages; ++s) grad[s] = finite_logit_adjoint(g[s], grad[s]);
    }
    group.scatter((T*)params.grad_initial, stages, 0, stages, grad);
  }
}

template <class T, int S>
void forward_all(const StageFilterForward& params, int threads) {
  const Transition<T> matrix((const T*)params.transition, params.stages);
  const int64_t groups = (params.batch + Lanes<T>::width - 1) / Lanes<T>::width;
  parallel_for(groups, threads, [&](int64_t i) { forward_group<T, S>(params, matrix, i * Lanes<T>::width); });
}

template <class T, int S>
void backward_all(const StageFilterBackward& params, int threads) {
  const Transition<T> matrix((const T*)params.transition, params.stages);
  const int64_t groups = (params.batch + Lanes<T>::width - 1) / Lanes<T>::width;
  parallel_for(groups, threads,
               [&](int64_t i) { backward_group<T, S>(params, matrix, i * Lanes<T>::width); });
  const int stages = params.stages;
  for (int i = 0; i < stages; ++i) {  // sequences in order, then through log_softmax(transition)
    double flow[kMaxStages] = {}, total = 0;
    for (int64_t b = 0; b < params.batch; ++b)
      for (int j = 0; j < stages; ++j) flow[j] += params.workspace[(b * stages + i) * stages + j];
    for (int j = 0; j < stages; ++j) total += flow[j];
    for (int j = 0; j < stages; ++j)
      ((T*)params.grad_transition)[i * stages + j] =
          finite_logit_adjoint(((const T*)params.transition)[i * stages + j],
                               T(flow[j] - double(matrix.a[i * stages + j]) * total));
  }
}

}  // namespace

void stage_filter_forward(const StageFilterForward& params, Exec exec) {
  if (params.dtype == DType::f64) return forward_all<double, 0>(params, exec.where);
  return params.stages == 4 ? forward_all<float, 4>(params, exec.where)
                            : forward_all<float, 0>(params, exec.where);
}

void stage_filter_backward(const StageFilterBackward& params, Exec exec) {
  if (params.dtype == DType::f64) return backward_all<double, 0>(params, exec.where);
  return params.stages == 4 ? backward_all<float, 4>(params, exec.where)
                            : backward_all<float, 0>(params, exec.where);
}

}  // namespace sage::cpu::SAGE_ISA
