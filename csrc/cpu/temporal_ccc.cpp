// temporal_ccc on the CPU. A lane is a (sequence, channel); `width` of them advance together. Cost is linear
// in T: the cumulative and half-life modes push a frame into running moments; the window mode merges two
// stacks, the moments of the current block of `window` frames so far and of the tail of the block before, so
// that nothing is ever subtracted and a constant window has variance exactly 0. Backward recomputes the
// moments, turns each frame's gradient into five slopes (math/ccc.h) and sums, for every frame, the
// slopes of all the frames that saw it: a reverse scan with the same decay, or the same two stacks.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/temporal_ccc.h"

namespace sage::cpu::SAGE_ISA {
namespace {

using V = Lanes<double>;
constexpr int W = V::width;
constexpr int kSlopes = kTemporalCoefficients + 1;  // and the decay that a valid frame applied

struct Frame {
  V x, y, valid;
};  // x = y = 0 where not valid

template <class T>
struct Group {  // lanes of (sequence, channel) from `first`; lanes past the end repeat the last
  int64_t number[W], sequence[W], channel[W];
  int count;

  Group(const TemporalCccForward& q, int64_t first) {
    const int64_t all = q.batch * q.channels;
    count = int(all - first < W ? all - first : W);
    for (int l = 0; l < W; ++l) {
      number[l] = first + (l < count ? l : count - 1);
      sequence[l] = number[l] / q.channels;
      channel[l] = number[l] % q.channels;
    }
  }
  SAGE_FN int64_t at(const TemporalCccForward& q, int l, int64_t t) const {
    return (sequence[l] * q.frames + t) * q.channels + channel[l];
  }
  SAGE_FN Frame frame(const TemporalCccForward& q, int64_t t) const {
    Frame f;
    for (int l = 0; l < W; ++l) {
      const int64_t i = at(q, l, t);
      const bool valid =
          q.mask_kind == Mask::none || q.mask[q.mask_kind == Mask::frame ? sequence[l] * q.frames + t : i];
      f.x.v[l] = valid ? double(((const T*)q.pred)[i]) : 0;
      f.y.v[l] = valid ? double(((const T*)q.target)[i]) : 0;
      f.valid.v[l] = valid ? 1 : 0;
    }
    return f;
  }
  // Frame j of history and chunk together.
  SAGE_FN Frame joined(const TemporalCccForward& q, int64_t j) const {
    if (j >= q.history) return frame(q, j - q.history);
    Frame f;
    for (int l = 0; l < W; ++l) {
      const double* s = q.state_in + (number[l] * q.history + j) * 3;
      f.x.v[l] = s[0], f.y.v[l] = s[1], f.valid.v[l] = s[2];
    }
    return f;
  }
};

SAGE_FN void put(double* at, const Moments<V>& m) {
  store(at, m.count), store(at + W, m.mean_p), store(at + 2 * W, m.mean_t);
  store(at + 3 * W, m.m2_p), store(at + 4 * W, m.m2_t), store(at + 5 * W, m.c_pt);
}
SAGE_FN Moments<V> get(const double* at) {
  return {load(at), load(at + W), load(at + 2 * W), load(at + 3 * W), load(at + 4 * W), load(at + 5 * W)};
}

template <class T>
SAGE_FN Running<V> start(const TemporalCccForward& q, const Group<T>& g) {
  V s[kTemporalState];
  for (int k = 0; k < kTemporalState; ++k)
    for (int l = 0; l < W; ++l) s[k].v[l] = q.state_in ? q.state_in[g.number[l] * kTemporalState + k] : 0;
  return {{s[1], s[2], s[3], s[4], s[5], s[6]}, s[0], s[7]};
}

// Calls visit(t, frame, moments of the frames that t sees, how many of them are valid, decay) for t = 0 .. T
// - 1.
template <class T, class Visit>
SAGE_FN void scan(const TemporalCccForward& q, const Group<T>& g, double* stack, Visit visit) {
  if (!q.window) {
    Running<V> r = start(q, g);
    const Decay decay = {q.decay, q.decay < 1 ? __builtin_log(q.decay) : 0};
    for (int64_t t = 0; t < q.frames; ++t) {
      const Frame f = g.frame(q, t);
      const V applied = running_step(r, decay, f.valid, f.x, f.y);
      visit(t, f, r.m, r.seen, applied);
    }
    if (q.state_out)
      for (int l = 0; l < g.count; ++l) {
        double* s = q.state_out + g.number[l] * kTemporalState;
        s[0] = r.seen[l], s[1] = r.m.count[l], s[2] = r.m.mean_p[l], s[3] = r.m.mean_t[l];
        s[4] = r.m.m2_p[l], s[5] = r.m.m2_t[l], s[6] = r.m.c_pt[l], s[7] = r.gap[l];
      }
    return;
  }
  const int64_t total = q.history + q.frames, window = q.window;
  const V one(1.0);
  Moments<V> block = no_moments<V>();
  for (int64_t j = 0; j < total; ++j) {
    const int64_t r = j % window;
    const Frame f = g.joined(q, j);
    block = push(r ? block : no_moments<V>(), one, f.valid, f.x, f.y);
    if (j >= q.history) {
      const bool whole = j < window || r == window - 1;
      const Moments<V> m = whole ? block : merge(get(stack + (r + 1) * kMoments * W), block);
      visit(j - q.history, f, m, m.count, one);
    }
    if (r == window - 1 && j + 1 < total) {  // tails of the finished block
      Moments<V> tail = no_moments<V>();
      for (int64_t k = window - 1; k > 0; --k) {
        const Frame e = g.joined(q, j - r + k);
        tail = push(tail, one, e.valid, e.x, e.y);
        put(stack + k * kMoments * W, tail);
      }
    }
  }
  if (q.state_out)
    for (int64_t k = 0; k < q.history_out; ++k) {
      const Frame f = g.joined(q, total - q.history_out + k);
      for (int l = 0; l < g.count; ++l) {
        double* s = q.state_out + (g.number[l] * q.history_out + k) * 3;
        s[0] = f.x[l], s[1] = f.y[l], s[2] = f.valid[l];
      }
    }
}

template <class T>
void forward_group(const TemporalCccForward& q, int64_t first, double* stack) {
  const Group<T> g(q, first);
  scan(q, g, stack, [&](int64_t t, const Frame&, const Moments<V>& m, V seen, V) {
    const auto rho = concordance(m, seen);
    for (int l = 0; l < g.count; ++l) {
      const int64_t i = g.at(q, l, t);
      ((T*)q.rho)[i] = T(rho.ccc[l]);
      q.defined[i] = rho.defined.v[l] ? 1 : 0;
    }
  });
}

// Slopes about the lane's origin, in memory: kTemporalCoefficients vectors.
SAGE_FN Slopes<V> get_slopes(const double* at) {
  return {load(at), load(at + W), load(at + 2 * W), load(at + 3 * W), load(at + 4 * W)};
}
SAGE_FN void put_slopes(double* at, const Slopes<V>& s) {
  store(at, s.offset_p), store(at + W, s.offset_t);
  store(at + 2 * W, s.slope_p), store(at + 3 * W, s.slope_t), store(at + 4 * W, s.slope_c);
}
SAGE_FN Slopes<V> operator+(const Slopes<V>& a, const Slopes<V>& b) {
  return {a.offset_p + b.offset_p, a.offset_t + b.offset_t, a.slope_p + b.slope_p, a.slope_t + b.slope_t,
          a.slope_c + b.slope_c};
}
SAGE_FN Slopes<V> operator*(const Slopes<V>& a, V by) {
  return {a.offset_p * by, a.offset_t * by, a.slope_p * by, a.slope_t * by, a.slope_c * by};
}

template <class T>
void backward_group(const TemporalCccBackward& q, int64_t first, double* stack, double* slopes) {
  const TemporalCccForward& f = q.forward;
  const Group<T> g(f, first);
  const V zero(0.0);
  V origin_p(0.0), origin_t(0.0);  // near the data, so that slope * (x - origin) cancels nothing
  Bits<double> placed = {};
  scan(f, g, stack, [&](int64_t t, const Frame& e, const Moments<V>& m, V seen, V decay) {
    const auto place = (e.valid > zero) & ~placed;
    origin_p = select(place, e.x, origin_p);
    origin_t = select(place, e.y, origin_t);
    placed = placed | place;
    V grad;
    for (int l = 0; l < W; ++l) grad.v[l] = double(((const T*)q.grad_rho)[g.at(f, l, t)]);
    double* at = slopes + t * kSlopes * W;
    put_slopes(at, about_origin(concordance_slopes(m, seen, grad), m.mean_p - origin_p, m.mean_t - origin_t));
    store(at + kTemporalCoefficients * W, decay);
  });
  // Slopes before the first valid frame are zero (nothing is defined there), so their missing origin is no
  // matter.
  const auto emit = [&](int64_t t, const Slopes<V>& s) {
    const Frame e = g.frame(f, t);
    const V x = e.x - origin_p, y = e.y - origin_t;
    const V gp = select(e.valid > zero, s.pred(x, y), zero);
    const V gt = select(e.valid > zero, s.target(x, y), zero);
    for (int l = 0; l < g.count; ++l) {
      const int64_t i = g.at(f, l, t);
      if (q.grad_pred) ((T*)q.grad_pred)[i] = T(gp[l]);
      if (q.grad_target) ((T*)q.grad_target)[i] = T(gt[l]);
    }
  };
  if (!f.window) {
    Slopes<V> sum = {zero, zero, zero, zero, zero};
    for (int64_t t = f.frames - 1; t >= 0; --t) {
      const double* at = slopes + t * kSlopes * W;
      sum = sum + get_slopes(at);
      emit(t, sum);
      sum = sum * load(at + kTemporalCoefficients * W);
    }
    return;
  }
  // Frame t was seen by t .. t + window - 1: the rest of its own block and the start of the next, whose
  // slopes have by then been replaced with their running sums.
  const int64_t window = f.window;
  for (int64_t begin = (f.frames - 1) / window * window; begin >= 0; begin -= window) {
    const int64_t end = begin + window < f.frames ? begin + window : f.frames;
    Slopes<V> rest = {zero, zero, zero, zero, zero};
    for (int64_t t = end - 1; t >= begin; --t) {
      rest = rest + get_slopes(slopes + t * kSlopes * W);
      Slopes<V> sum = rest;
      const int64_t last = t + window - 1 < f.frames - 1 ? t + window - 1 : f.frames - 1;
      if (last >= end) sum = sum + get_slopes(slopes + last * kSlopes * W);
      emit(t, sum);
    }
    for (int64_t t = begin + 1; t < end; ++t) {
      double* at = slopes + t * kSlopes * W;
      put_slopes(at, get_slopes(at - kSlopes * W) + get_slopes(at));
    }
  }
}

int64_t groups(const TemporalCccForward& q) { return (q.batch * q.channels + W - 1) / W; }
int64_t stack_doubles(const TemporalCccForward& q) {
  return temporal_ccc_stack(q.frames, q.window, q.history) * kMoments * W;
}

template <class T>
void forward_all(const TemporalCccForward& q, int threads) {
  parallel_for(groups(q), threads,
               [&](int64_t i) { forward_group<T>(q, i * W, q.workspace + i * stack_doubles(q)); });
}
template <class T>
void backward_all(const TemporalCccBackward& q, int threads) {
  const int64_t stack = stack_doubles(q.forward), slopes = q.forward.frames * kSlopes * W;
  parallel_for(groups(q.forward), threads, [&](int64_t i) {
    double* at = q.forward.workspace + i * (stack + slopes);
    backward_group<T>(q, i * W, at, at + stack);
  });
}

}  // namespace

void temporal_ccc_forward(const TemporalCccForward& q, Exec exec) {
  q.dtype == DType::f64 ? forward_all<double>(q, exec.where) : forward_all<float>(q, exec.where);
}
void temporal_ccc_backward(const TemporalCccBackward& q, Exec exec) {
  q.forward.dtype == DType::f64 ? backward_all<double>(q, exec.where) : backward_all<float>(q, exec.where);
}

}  // namespace sage::cpu::SAGE_ISA
