// ccc and its moments on the CPU. One pass over pred, target and mask forward, one backward: 8 bytes a
// float32 pair in, 4 or 8 out. Each group is cut into chunks of kCccChunkFrames; a chunk sums, in double,
// powers of the distance to its first valid frame (so a constant gives exact zeros), and the chunks' centred
// moments are merged in order.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/ccc.h"

namespace sage::cpu::SAGE_ISA {
namespace {

using V = Lanes<double>;
constexpr int W = V::width;
constexpr int64_t kSerialNumbers = 32768;  // a smaller problem stays on one thread

template <class T>
struct Data {  // pred, target and mask of one chunk, and how its frames are addressed
  const T *pred, *target;
  const uint8_t* mask;  // of the chunk's first frame
  Mask kind;
  int channels;
  SAGE_FN bool valid(int64_t frame, int c) const {
    return kind == Mask::none || mask[kind == Mask::frame ? frame : frame * channels + c];
  }
};

SAGE_FN Bits<double> nonzero(uint64_t bytes) {  // byte l of `bytes` -> lane l
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  typedef int64_t Wide __attribute__((vector_size(W * 8)));
  Bytes b;
  std::memcpy(&b, &bytes, sizeof b);
  return {__builtin_convertvector(b, Wide) != 0};
}

// Flat numbers i .. i + n of a chunk, C channels interleaved (C divides W, i is a multiple of W): the lanes'
// validity.
template <int C, class T>
SAGE_FN Bits<double> flat_mask(const Data<T>& x, int64_t i, int n) {
  uint64_t bytes = 0;
  if (x.kind == Mask::none) return first<double>(n);
  if (x.kind == Mask::element || C == 1) {
    std::memcpy(&bytes, x.mask + i, size_t(n));
  } else {
    std::memcpy(&bytes, x.mask + i / C, size_t((n + C - 1) / C));
    if (C == 2) {  // abcd -> aabbccdd
      bytes = (bytes | bytes << 16) & 0x0000ffff0000ffff;
      bytes = (bytes | bytes << 8) & 0x00ff00ff00ff00ff;
      bytes |= bytes << 8;
    } else {
      uint64_t spread = 0;
      for (int l = 0; l < W; ++l) spread |= (bytes >> (8 * (l / C)) & 0xff) << (8 * l);
      bytes = spread;
    }
  }
  return nonzero(bytes) & first<double>(n);
}
template <class T>
SAGE_FN V load_some(const T* p, int n) {
  if (n == W) return load_double(p);
  T x[W] = {};
  std::memcpy(x, p, size_t(n) * sizeof(T));
  return load_double(x);
}
template <class T>
SAGE_FN void store_some(T* p, V v, int n) {
  if (n == W) return store_double(p, v);
  T x[W];
  store_double(x, v);
  std::memcpy(p, x, size_t(n) * sizeof(T));
}

struct Sums {
  V n, p, t, pp, tt, pt;
  SAGE_FN void add(Bits<double> valid, V x, V y) {  // x, y: distances to the shift
    const V zero(0.0);
    x = select(valid, x, zero);
    y = select(valid, y, zero);
    n += select(valid, V(1.0), zero);
    p += x;
    t += y;
    pp = fma(x, x, pp);
    tt = fma(y, y, tt);
    pt = fma(x, y, pt);
  }
};

// Lanes l = c, c + step, ... of the sums -> centred moments of channel c.
inline void finish(const Sums& s, int c, int step, double shift_p, double shift_t, double* out) {
  double n = 0, p = 0, t = 0, pp = 0, tt = 0, pt = 0;
  for (int l = c; l < W; l += step)
    n += s.n[l], p += s.p[l], t += s.t[l], pp += s.pp[l], tt += s.tt[l], pt += s.pt[l];
  write_moments(out, centred(n, shift_p, shift_t, p, t, pp, tt, pt));
}

template <class T>
void shifts(const Data<T>& x, int64_t frames, double* p, double* t) {
  for (int c = 0; c < x.channels; ++c) {
    int64_t f = 0;
    while (f < frames && !x.valid(f, c)) ++f;
    p[c] = f < frames ? double(x.pred[f * x.channels + c]) : 0;
    t[c] = f < frames ? double(x.target[f * x.channels + c]) : 0;
  }
}

template <int C, class T>
void flat_moments(const Data<T>& x, int64_t frames, double* out) {
  double p0[C], t0[C];
  shifts(x, frames, p0, t0);
  V shift_p, shift_t;
  for (int l = 0; l < W; ++l) shift_p.v[l] = p0[l % C], shift_t.v[l] = t0[l % C];
  Sums s = {};
  const int64_t numbers = frames * C, full = numbers / W * W;
  if (x.kind == Mask::none) {
    const Bits<double> all = first<double>(W);
    for (int64_t i = 0; i < full; i += W)
      s.add(all, load_double(x.pred + i) - shift_p, load_double(x.target + i) - shift_t);
  } else {
    for (int64_t i = 0; i < full; i += W)
      s.add(flat_mask<C>(x, i, W), load_double(x.pred + i) - shift_p, load_double(x.target + i) - shift_t);
  }
  if (const int n = int(numbers - full))
    s.add(flat_mask<C>(x, full, n), load_some(x.pred + full, n) - shift_p,
          load_some(x.target + full, n) - shift_t);
  for (int c = 0; c < C; ++c) finish(s, c, C, p0[c], t0[c], out + c * kMoments);
}

// Any number of channels: one at a time, lanes along the frames.
template <class T>
void strided_moments(const Data<T>& x, int64_t frames, double* out) {
  for (int c = 0; c < x.channels; ++c) {
    int64_t f0 = 0;
    while (f0 < frames && !x.valid(f0, c)) ++f0;
    const double p0 = f0 < frames ? double(x.pred[f0 * x.channels + c]) : 0;
    const double t0 = f0 < frames ? double(x.target[f0 * x.channels + c]) : 0;
    Sums s = {};
    for (int64_t f = f0; f < frames; f += W) {
      V p(0.0), t(0.0);
      Bits<double> valid = {};
      for (int l = 0; l < W && f + l < frames; ++l) {
        p.v[l] = double(x.pred[(f + l) * x.channels + c]);
        t.v[l] = double(x.target[(f + l) * x.channels + c]);
        valid.v[l] = x.valid(f + l, c) ? -1 : 0;
      }
      s.add(valid, p - V(p0), t - V(t0));
    }
    finish(s, 0, 1, p0, t0, out + c * kMoments);
  }
}

template <class T>
Data<T> chunk(const CccForward& q, int64_t group, int64_t frame) {
  const int64_t at = group * q.frames + frame;
  const int C = q.channels;
  return {(const T*)q.pred + at * C, (const T*)q.target + at * C,
          q.mask ? q.mask + (q.mask_kind == Mask::frame ? at : at * C) : nullptr, q.mask_kind, C};
}

template <class T>
void forward_all(const CccForward& q, int threads) {
  const int C = q.channels;
  const int64_t chunks = ccc_chunks(q.frames);
  const bool serial = q.groups * q.frames * C < kSerialNumbers;
  parallel_for(q.groups * chunks, serial ? 1 : threads, [&](int64_t i) {
    const int64_t begin = i % chunks * kCccChunkFrames;
    const int64_t frames = q.frames - begin < kCccChunkFrames ? q.frames - begin : kCccChunkFrames;
    const Data<T> x = chunk<T>(q, i / chunks, begin);
    double* out = q.workspace + i * C * kMoments;
    if (C == 1)
      flat_moments<1>(x, frames, out);
    else if (C == 2)
      flat_moments<2>(x, frames, out);
    else
      strided_moments(x, frames, out);
  });
  for (int64_t g = 0; g < q.groups; ++g) {
    for (int c = 0; c < C; ++c) {
      Moments<double> m = no_moments<double>();
      for (int64_t k = 0; k < chunks; ++k)
        m = merge(m, read_moments(q.workspace + ((g * chunks + k) * C + c) * kMoments));
      write_moments(q.moments + (g * C + c) * kMoments, m);
      if (q.ccc) ((T*)q.ccc)[g * C + c] = T(concordance(m, m.count).ccc);
    }
  }
}

struct Line {  // the gradients of one (group, channel)
  double mean_p, mean_t;
  Slopes<double> slopes;
};

template <class T>
SAGE_FN Line line(const CccBackward& q, int64_t at) {
  const Moments<double> m = read_moments(q.forward.moments + at * kMoments);
  if (!q.grad_moments)
    return {m.mean_p, m.mean_t, concordance_slopes(m, m.count, double(((const T*)q.grad_ccc)[at]))};
  const double* g = q.grad_moments + at * kMoments;
  return {m.mean_p, m.mean_t, moments_slopes(g[1], g[2], g[3], g[4], g[5], m.count)};
}

template <int C, class T>
void flat_gradient(const Data<T>& x, int64_t frames, const Line* lines, T* grad_pred, T* grad_target) {
  V mean_p, mean_t;
  Slopes<V> slopes;
  for (int l = 0; l < W; ++l) {
    const Line& a = lines[l % C];
    mean_p.v[l] = a.mean_p, mean_t.v[l] = a.mean_t;
    slopes.offset_p.v[l] = a.slopes.offset_p, slopes.offset_t.v[l] = a.slopes.offset_t;
    slopes.slope_p.v[l] = a.slopes.slope_p, slopes.slope_t.v[l] = a.slopes.slope_t;
    slopes.slope_c.v[l] = a.slopes.slope_c;
  }
  const V zero(0.0);
  const int64_t numbers = frames * C;
  const auto step = [&](int64_t i, int n) __attribute__((always_inline)) {
    const V p = load_some(x.pred + i, n) - mean_p, t = load_some(x.target + i, n) - mean_t;
    V gp = slopes.pred(p, t), gt = slopes.target(p, t);
    if (x.kind != Mask::none) {
      const Bits<double> valid = flat_mask<C>(x, i, n);
      gp = select(valid, gp, zero);
      gt = select(valid, gt, zero);
    }
    if (grad_pred) store_some(grad_pred + i, gp, n);
    if (grad_target) store_some(grad_target + i, gt, n);
  };
  const int64_t full = numbers / W * W;
  for (int64_t i = 0; i < full; i += W) step(i, W);
  if (full < numbers) step(full, int(numbers - full));
}

template <class T>
void strided_gradient(const Data<T>& x, int64_t frames, const Line* lines, T* grad_pred, T* grad_target,
                      int c) {
  const Line& a = *lines;
  for (int64_t f = 0; f < frames; ++f) {
    const int64_t i = f * x.channels + c;
    const bool valid = x.valid(f, c);
    const double p = valid ? double(x.pred[i]) - a.mean_p : 0, t = valid ? double(x.target[i]) - a.mean_t : 0;
    if (grad_pred)
      grad_pred[i] = valid ? T(a.slopes.offset_p + a.slopes.slope_p * p + a.slopes.slope_c * t) : T(0);
    if (grad_target)
      grad_target[i] = valid ? T(a.slopes.offset_t + a.slopes.slope_t * t + a.slopes.slope_c * p) : T(0);
  }
}

template <class T>
void backward_all(const CccBackward& q, int threads) {
  const CccForward& f = q.forward;
  const int C = f.channels;
  const int64_t chunks = ccc_chunks(f.frames);
  const bool serial = f.groups * f.frames * C < kSerialNumbers;
  parallel_for(f.groups * chunks, serial ? 1 : threads, [&](int64_t i) {
    const int64_t group = i / chunks, begin = i % chunks * kCccChunkFrames;
    const int64_t frames = f.frames - begin < kCccChunkFrames ? f.frames - begin : kCccChunkFrames;
    const Data<T> x = chunk<T>(f, group, begin);
    const int64_t at = (group * f.frames + begin) * C;
    T* grad_pred = q.grad_pred ? (T*)q.grad_pred + at : nullptr;
    T* grad_target = q.grad_target ? (T*)q.grad_target + at : nullptr;
    if (C <= 2) {
      Line lines[2];
      for (int c = 0; c < C; ++c) lines[c] = line<T>(q, group * C + c);
      if (C == 1)
        flat_gradient<1>(x, frames, lines, grad_pred, grad_target);
      else
        flat_gradient<2>(x, frames, lines, grad_pred, grad_target);
    } else {
      for (int c = 0; c < C; ++c) {
        const Line a = line<T>(q, group * C + c);
        strided_gradient(x, frames, &a, grad_pred, grad_target, c);
      }
    }
  });
}

}  // namespace

void ccc_forward(const CccForward& q, Exec exec) {
  q.dtype == DType::f64 ? forward_all<double>(q, exec.where) : forward_all<float>(q, exec.where);
}
void ccc_backward(const CccBackward& q, Exec exec) {
  q.forward.dtype == DType::f64 ? backward_all<double>(q, exec.where) : backward_all<float>(q, exec.where);
}

}  // namespace sage::cpu::SAGE_ISA
