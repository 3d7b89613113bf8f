// temporal_ccc on the CPU. A lane is a (sequence, channel); `width` of them advance together. Cost is linear in T:
// the cumulative and half-life modes push a frame into running moments; the window mode merges two stacks, the
// moments of the current block of `window` frames so far and of the tail of the block before, so that nothing is ever
// subtracted and a constant window has variance exactly 0. Backward recomputes the moments, turns each frame's
// gradient into five slopes (math/ccc.h) and sums, for every frame, the slopes of all the frames that saw it: a
// reverse scan with the same decay, or the same two stacks.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/temporal_ccc.h"

namespace sage::cpu::SAGE_ISA {
namespace {

using V = Lanes<double>;
constexpr int W = V::width;
constexpr int kSlopes =
    kTemporalCoefficients + 1;  // vectors of workspace a frame: its slopes, and the decay it applied

struct Frame {
  V x, y, valid;
};  // x = y = 0 where not valid

template <class T>
struct Group {  // lanes of (sequence, channel) from `first`; lanes past the end repeat the last
  int64_t number[W], sequence[W], channel[W];
  int count;

  Group(const TemporalCccForward& params, int64_t first) {
    const int64_t all = params.batch * params.channels;
    count = int(all - first < W ? all - first : W);
    for (int l = 0; l < W; ++l) {
      number[l] = first + (l < count ? l : count - 1);
      sequence[l] = number[l] / params.channels;
      channel[l] = number[l] % params.channels;
    }
  }
  SAGE_FN int64_t at(const TemporalCccForward& params, int l, int64_t t) const {
    return (sequence[l] * params.frames + t) * params.channels + channel[l];
  }
  SAGE_FN Frame frame(const TemporalCccForward& params, int64_t t) const {
    Frame f;
    for (int l = 0; l < W; ++l) {
      const int64_t i = at(params, l, t);
      const bool valid = params.mask_kind == Mask::none ||
                         params.mask[params.mask_kind == Mask::frame ? sequence[l] * params.frames + t : i];
      f.x.v[l] = valid ? double(((const T*)params.pred)[i]) : 0;
      f.y.v[l] = valid ? double(((const T*)params.target)[i]) : 0;
      f.valid.v[l] = valid ? 1 : 0;
    }
    return f;
  }
  // Frame j of history and chunk together.
  SAGE_FN Frame joined(const TemporalCccForward& params, int64_t j) const {
    if (j >= params.history) return frame(params, j - params.history);
    Frame f;
    for (int l = 0; l < W; ++l) {
      const double* s = params.state_in + (number[l] * params.history + j) * 3;
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
SAGE_FN Running<V> start(const TemporalCccForward& params, const Group<T>& g) {
  V s[kTemporalState];
  for (int k = 0; k < kTemporalState; ++k)
    for (int l = 0; l < W; ++l)
      s[k].v[l] = params.state_in ? params.state_in[g.number[l] * kTemporalState + k] : 0;
  return {{s[1], s[2], s[3], s[4], s[5], s[6]}, s[0], s[7]};
}

// Calls visit(t, frame, moments of the frames that t sees, how many of them are valid, decay) for t = 0 .. T - 1.
template <class T, class Visit>
SAGE_FN void scan(const TemporalCccForward& params, const Group<T>& g, double* stack, Visit visit) {
  if (!params.window) {
    Running<V> r = start(params, g);
    const Decay decay = {params.decay, params.decay < 1 ? __builtin_log(params.decay) : 0};
    for (int64_t t = 0; t < params.frames; ++t) {
      const Frame f = g.frame(params, t);
      const V applied = running_step(r, decay, f.valid, f.x, f.y);
      visit(t, f, r.m, r.seen, applied);
    }
    if (params.state_out)
      for (int l = 0; l < g.count; ++l) {
        double* s = params.state_out + g.number[l] * kTemporalState;
        s[0] = r.seen[l], s[1] = r.m.count[l], s[2] = r.m.mean_p[l], s[3] = r.m.mean_t[l];
        s[4] = r.m.m2_p[l], s[5] = r.m.m2_t[l], s[6] = r.m.c_pt[l], s[7] = r.gap[l];
      }
    return;
  }
  const int64_t total = params.history + params.frames, window = params.window;
  const V one(1.0);
  Moments<V> block = no_moments<V>();
  for (int64_t j = 0; j < total; ++j) {
    const int64_t r = j % window;
    const Frame f = g.joined(params, j);
    block = push(r ? block : no_moments<V>(), one, f.valid, f.x, f.y);
    if (j >= params.history) {
      const bool whole = j < window || r == window - 1;
      const Moments<V> m = whole ? block : merge(get(stack + (r + 1) * kMoments * W), block);
      visit(j - params.history, f, m, m.count, one);
    }
    if (r == window - 1 && j + 1 < total) {  // tails of the finished block
      Moments<V> tail = no_moments<V>();
      for (int64_t k = window - 1; k > 0; --k) {
        const Frame e = g.joined(params, j - r + k);
        tail = push(tail, one, e.valid, e.x, e.y);
        put(stack + k * kMoments * W, tail);
      }
    }
  }
  if (params.state_out)
    for (int64_t k = 0; k < params.history_out; ++k) {
      const Frame f = g.joined(params, total - params.history_out + k);
      for (int l = 0; l < g.count; ++l) {
        double* s = params.state_out + (g.number[l] * params.history_out + k) * 3;
        s[0] = f.x[l], s[1] = f.y[l], s[2] = f.valid[l];
      }
    }
}

template <class T>
void forward_group(const TemporalCccForward& params, int64_t first, double* stack) {
  const Group<T> g(params, first);
  scan(params, g, stack, [&](int64_t t, const Frame&, const Moments<V>& m, V seen, V) {
    const auto rho = concordance(m, seen);
    for (int l = 0; l < g.count; ++l) {
      const int64_t i = g.at(params, l, t);
      ((T*)params.rho)[i] = T(rho.ccc[l]);
      params.defined[i] = rho.defined.v[l] ? 1 : 0;
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
void backward_group(const TemporalCccBackward& params, int64_t first, double* stack, double* slopes) {
  const TemporalCccForward& forward = params.forward;
  const Group<T> g(forward, first);
  const V zero(0.0);
  V origin_p(0.0), origin_t(0.0);  // near the data, so that slope * (x - origin) cancels nothing
  Bits<double> placed = {};
  scan(forward, g, stack, [&](int64_t t, const Frame& e, const Moments<V>& m, V seen, V decay) {
    const auto place = (e.valid > zero) & ~placed;
    origin_p = select(place, e.x, origin_p);
    origin_t = select(place, e.y, origin_t);
    placed = placed | place;
    V grad;
    for (int l = 0; l < W; ++l) grad.v[l] = double(((const T*)params.grad_rho)[g.at(forward, l, t)]);
    double* at = slopes + t * kSlopes * W;
    put_slopes(at, about_origin(concordance_slopes(m, seen, grad), m.mean_p - origin_p, m.mean_t - origin_t));
    store(at + kTemporalCoefficients * W, decay);
  });
  // Slopes before the first valid frame are zero (nothing is defined there), so their missing origin is no matter.
  const auto emit = [&](int64_t t, const Slopes<V>& s) {
    const Frame e = g.frame(forward, t);
    const V x = e.x - origin_p, y = e.y - origin_t;
    const V gp = select(e.valid > zero, s.pred(x, y), zero);
    const V gt = select(e.valid > zero, s.target(x, y), zero);
    for (int l = 0; l < g.count; ++l) {
      const int64_t i = g.at(forward, l, t);
      if (params.grad_pred) ((T*)params.grad_pred)[i] = T(gp[l]);
      if (params.grad_target) ((T*)params.grad_target)[i] = T(gt[l]);
    }
  };
  if (!forward.window) {
    Slopes<V> sum = {zero, zero, zero, zero, zero};
    for (int64_t t = forward.frames - 1; t >= 0; --t) {
      const double* at = slopes + t * kSlopes * W;
      sum = sum + get_slopes(at);
      emit(t, sum);
      sum = sum * load(at + kTemporalCoefficients * W);
    }
    return;
  }
  // Frame t was seen by t .. t + window - 1: the rest of its own block and the start of the next, whose
  // slopes have by then been replaced with their running sums.
  const int64_t window = forward.window;
  for (int64_t begin = (forward.frames - 1) / window * window; begin >= 0; begin -= window) {
    const int64_t end = begin + window < forward.frames ? begin + window : forward.frames;
    Slopes<V> rest = {zero, zero, zero, zero, zero};
    for (int64_t t = end - 1; t >= begin; --t) {
      rest = rest + get_slopes(slopes + t * kSlopes * W);
      Slopes<V> sum = rest;
      const int64_t last = t + window - 1 < forward.frames - 1 ? t + window - 1 : forward.frames - 1;
      if (last >= end) sum = sum + get_slopes(slopes + last * kSlopes * W);
      emit(t, sum);
    }
    for (int64_t t = begin + 1; t < end; ++t) {
      double* at = slopes + t * kSlopes * W;
      put_slopes(at, get_slopes(at - kSlopes * W) + get_slopes(at));
    }
  }
}

int64_t groups(const TemporalCccForward& params) { return (params.batch * params.channels + W - 1) / W; }
int64_t stack_doubles(const TemporalCccForward& params) {
  return temporal_ccc_stack(params.frames, params.window, params.history) * kMoments * W;
}

template <class T>
void forward_all(const TemporalCccForward& params, int threads) {
  parallel_for(groups(params), threads, [&](int64_t i) {
    forward_group<T>(params, i * W, params.workspace + i * stack_doubles(params));
  });
}
template <class T>
void backward_all(const TemporalCccBackward& params, int threads) {
  const int64_t stack = stack_doubles(params.forward), slopes = params.forward.frames * kSlopes * W;
  parallel_for(groups(params.forward), threads, [&](int64_t i) {
    double* at = params.forward.workspace + i * (stack + slopes);
    backward_group<T>(params, i * W, at, at + stack);
  });
}

}  // namespace

void temporal_ccc_forward(const TemporalCccForward& params, Exec exec) {
  params.dtype == DType::f64 ? forward_all<double>(params, exec.where)
                             : forward_all<float>(params, exec.where);
}
void temporal_ccc_backward(const TemporalCccBackward& params, Exec exec) {
  params.forward.dtype == DType::f64 ? backward_all<double>(params, exec.where)
                                     : backward_all<float>(params, exec.where);
}

}  // namespace sage::cpu::SAGE_ISA
