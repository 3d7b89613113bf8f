// stage_filter on the CPU. A lane is a sequence: `width` sequences advance together, frame by frame, each
// with its own numbers only, so a sequence's bits do not depend on its neighbours. Forward moves 2 B T S
// numbers (3 with the log-belief that backward wants); the time is the serial chain of one frame (S log, S +
// 1 exp, one division), not memory.
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
  int64_t sequence[V::width];
  int count;

  Group(int64_t first, int64_t batch) {
    count = int(batch - first < V::width ? batch - first : V::width);
    for (int l = 0; l < V::width; ++l) sequence[l] = first + (l < count ? l : count - 1);
  }
  // x[s] <- base[sequence * stride + offset + s]
  SAGE_FN void gather(const T* base, int64_t stride, int64_t offset, int stages, V* x) const {
    for (int s = 0; s < stages; ++s) {
      T row[V::width];
      for (int l = 0; l < V::width; ++l) row[l] = base[sequence[l] * stride + offset + s];
      x[s] = load(row);
    }
  }
  SAGE_FN void scatter(T* base, int64_t stride, int64_t offset, int stages, const V* x) const {
    for (int l = 0; l < count; ++l)
      for (int s = 0; s < stages; ++s) base[sequence[l] * stride + offset + s] = x[s][l];
  }
  SAGE_FN Bits<T> mask(const uint8_t* mask, int64_t frames, int64_t t) const {
    T seen[V::width];
    for (int l = 0; l < V::width; ++l) seen[l] = mask[sequence[l] * frames + t];
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
void forward_group(const StageFilterForward& q, const Transition<T>& matrix, int64_t first) {
  using V = Lanes<T>;
  const int stages = S ? S : q.stages;
  const Group<T> group(first, q.batch);
  const int64_t stride = q.frames * stages;
  V belief[kMaxStages], p[kMaxStages], emission[kMaxStages];
  start(group, (const T*)q.initial, q.initial_stride, stages, belief, p);
  for (int64_t t = 0; t < q.frames; ++t) {
    group.gather((const T*)q.emission, stride, t * stages, stages, emission);
    if (q.mask) {
      const Bits<T> seen = group.mask(q.mask, q.frames, t);
      for (int s = 0; s < stages; ++s) emission[s] = select(seen, emission[s], V(T(0)));
    }
    stage_step(stages, matrix.log_a, matrix.a, emission, belief, p);
    group.scatter((T*)q.posterior, stride, t * stages, stages, p);
    if (q.belief) group.scatter((T*)q.belief, stride, t * stages, stages, belief);
  }
  group.scatter((T*)q.final_belief, stages, 0, stages, belief);
}

template <class T, int S>
void backward_group(const StageFilterBackward& q, const Transition<T>& matrix, int64_t first) {
  using V = Lanes<T>;
  const int stages = S ? S : q.stages;
  const Group<T> group(first, q.batch);
  const int64_t stride = q.frames * stages;
  V belief[kMaxStages], p[kMaxStages], p_now[kMaxStages], grad[kMaxStages], grad_u[kMaxStages], g[kMaxStages];
  V flow[kMaxStages * kMaxStages];
  for (int k = 0; k < stages * stages; ++k) {
    flow[k] = V(T(0));
    for (int l = 0; l < group.count; ++l) q.workspace[group.sequence[l] * stages * stages + k] = 0;
  }
  if (q.grad_final)
    group.gather((const T*)q.grad_final, stages, 0, stages, grad);
  else
    for (int s = 0; s < stages; ++s) grad[s] = V(T(0));

  if (q.frames > 0) group.gather((const T*)q.posterior, stride, (q.frames - 1) * stages, stages, p_now);
  for (int64_t t = q.frames - 1; t >= 0; --t) {
    if (q.grad_posterior) {
      group.gather((const T*)q.grad_posterior, stride, t * stages, stages, g);
      for (int s = 0; s < stages; ++s) grad[s] = fma(g[s], p_now[s], grad[s]);
    }
    if (t > 0) {
      group.gather((const T*)q.posterior, stride, (t - 1) * stages, stages, p);
      group.gather((const T*)q.belief, stride, (t - 1) * stages, stages, belief);
    } else {
      start(group, (const T*)q.initial, q.initial_stride, stages, belief, p);
    }
    stage_step_backward(stages, matrix.log_a, matrix.a, belief, p, p_now, grad, grad_u, flow);
    if (q.mask) {
      const Bits<T> seen = group.mask(q.mask, q.frames, t);
      for (int s = 0; s < stages; ++s) grad_u[s] = select(seen, grad_u[s], V(T(0)));
    }
    group.scatter((T*)q.grad_emission, stride, t * stages, stages, grad_u);
    for (int s = 0; s < stages; ++s) p_now[s] = p[s];
    if (t % kFlushFrames == 0) {
      for (int k = 0; k < stages * stages; ++k) {
        for (int l = 0; l < group.count; ++l)
          q.workspace[group.sequence[l] * stages * stages + k] += flow[k][l];
        flow[k] = V(T(0));
      }
    }
  }
  if (q.grad_initial) {  // through log_softmax(initial)
    if (q.frames == 0) start(group, (const T*)q.initial, q.initial_stride, stages, belief, p);
    V total(T(0));
    for (int s = 0; s < stages; ++s) total += grad[s];
    for (int s = 0; s < stages; ++s) grad[s] = grad[s] - p[s] * total;
    group.scatter((T*)q.grad_initial, stages, 0, stages, grad);
  }
}

template <class T, int S>
void forward_all(const StageFilterForward& q, int threads) {
  const Transition<T> matrix((const T*)q.transition, q.stages);
  const int64_t groups = (q.batch + Lanes<T>::width - 1) / Lanes<T>::width;
  parallel_for(groups, threads, [&](int64_t i) { forward_group<T, S>(q, matrix, i * Lanes<T>::width); });
}

template <class T, int S>
void backward_all(const StageFilterBackward& q, int threads) {
  const Transition<T> matrix((const T*)q.transition, q.stages);
  const int64_t groups = (q.batch + Lanes<T>::width - 1) / Lanes<T>::width;
  parallel_for(groups, threads, [&](int64_t i) { backward_group<T, S>(q, matrix, i * Lanes<T>::width); });
  const int stages = q.stages;
  for (int i = 0; i < stages; ++i) {  // sequences in order, then through log_softmax(transition)
    double flow[kMaxStages] = {}, total = 0;
    for (int64_t b = 0; b < q.batch; ++b)
      for (int j = 0; j < stages; ++j) flow[j] += q.workspace[(b * stages + i) * stages + j];
    for (int j = 0; j < stages; ++j) total += flow[j];
    for (int j = 0; j < stages; ++j)
      ((T*)q.grad_transition)[i * stages + j] = T(flow[j] - double(matrix.a[i * stages + j]) * total);
  }
}

}  // namespace

void stage_filter_forward(const StageFilterForward& q, Exec exec) {
  if (q.dtype == DType::f64) return forward_all<double, 0>(q, exec.where);
  return q.stages == 4 ? forward_all<float, 4>(q, exec.where) : forward_all<float, 0>(q, exec.where);
}

void stage_filter_backward(const StageFilterBackward& q, Exec exec) {
  if (q.dtype == DType::f64) return backward_all<double, 0>(q, exec.where);
  return q.stages == 4 ? backward_all<float, 4>(q, exec.where) : backward_all<float, 0>(q, exec.where);
}

}  // namespace sage::cpu::SAGE_ISA
