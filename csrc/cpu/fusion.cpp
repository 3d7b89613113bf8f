// reliability_fusion on the CPU.
//
// A block is `width` rows. Its gate (M*S sigmoids and M logarithms a row) runs with a lane a row; its
// features run with lanes along D, a few rows at a time so that the LayerNorm's affine is loaded once for all
// of them. Bytes from the contract: forward reads M D and writes D numbers a row, backward reads (M + 1) D
// and writes M D; the floor is the time to copy those. Statistics are two passes over a row that the first
// pass brought into L1.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/reliability.h"

namespace sage::cpu::SAGE_ISA {
namespace {

#if SAGE_VECTOR_BYTES == 64
constexpr int kTile = 4;  // rows that share one load of the affine: bounded by 32 registers ...
#else
constexpr int kTile = 2;  // ... or 16
#endif
constexpr int64_t kFlushRows = 256;  // parameter gradients: float sums this long, then double
constexpr int64_t kSerialRows = 96;  // fewer stay on one thread
constexpr int64_t kTaskRows = 64;

template <class A>
struct Calibration {  // per (m, s)
  A scale[kMaxModalities * kMaxStages], bias[kMaxModalities * kMaxStages], sharpness[kMaxModalities];

  explicit Calibration(const FusionForward& q) {
    for (int i = 0; i < q.modalities * q.stages; ++i) {
      scale[i] = q.log_temperature ? A(__builtin_exp(-double(((const A*)q.log_temperature)[i]))) : A(1);
      bias[i] = q.bias ? ((const A*)q.bias)[i] : A(0);
    }
    for (int m = 0; m < q.modalities; ++m) sharpness[m] = q.sharpness ? ((const A*)q.sharpness)[m] : A(1);
  }
};

template <class A>
struct Gate {  // of one block, a lane a row
  using V = Lanes<A>;
  V raw[kMaxModalities * kMaxStages], logit[kMaxModalities * kMaxStages], stage[kMaxStages];
  Bits<A> present[kMaxModalities], any_present;
  V confidence[kMaxModalities], log_odds[kMaxModalities], weight[kMaxModalities];
};

// x[k] <- base[row * count + k] for a block of rows; rows past the end repeat the last one and are never
// stored.
template <class A>
SAGE_FN void gather(const A* base, int count, int rows, Lanes<A>* x) {
  for (int k = 0; k < count; ++k) {
    A column[Lanes<A>::width];
    for (int l = 0; l < Lanes<A>::width; ++l) column[l] = base[int64_t(l < rows ? l : rows - 1) * count + k];
    x[k] = load(column);
  }
}
template <class A>
SAGE_FN void scatter(A* base, int count, int rows, const Lanes<A>* x) {
  for (int l = 0; l < rows; ++l)
    for (int k = 0; k < count; ++k) base[int64_t(l) * count + k] = x[k][l];
}

template <class A>
void read_gate(const FusionForward& q, const Calibration<A>& c, int64_t row, int rows, Gate<A>& g) {
  using V = Lanes<A>;
  const int M = q.modalities, S = q.stages;
  gather((const A*)q.reliability + row * M * S, M * S, rows, g.raw);
  if (q.stage)
    gather((const A*)q.stage + row * S, S, rows, g.stage);
  else
    for (int s = 0; s < S; ++s) g.stage[s] = V(A(1) / A(S));
  g.any_present = Bits<A>{};
  for (int m = 0; m < M; ++m) {
    A seen[V::width];
    for (int l = 0; l < V::width; ++l)
      seen[l] = !q.present || q.present[(row + (l < rows ? l : rows - 1)) * M + m];
    g.present[m] = load(seen) > V(A(0));
    g.any_present = g.any_present | g.present[m];
    for (int s = m * S; s < (m + 1) * S; ++s) {
      g.raw[s] = select(g.present[m], g.raw[s], V(A(0)));
      g.logit[s] = select(g.present[m], fma(g.raw[s], V(c.scale[s]), V(c.bias[s])), V(A(0)));
    }
  }
  // A frame with no modality does not need a stage.
  for (int s = 0; s < S; ++s) g.stage[s] = select(g.any_present, g.stage[s], V(A(1) / A(S)));
}

template <class A>
void weigh(const FusionForward& q, const Calibration<A>& c, Gate<A>& g) {
  using V = Lanes<A>;
  const V zero(A(0)), lowest(A(-3e38));
  V peak = lowest, total = zero;
  for (int m = 0; m < q.modalities; ++m) {
    const Reliability<V> r = reliability(q.stages, g.logit + m * q.stages, g.stage);
    g.confidence[m] = select(g.present[m], r.confidence, zero);
    g.log_odds[m] = r.log_odds;
    g.weight[m] = r.log_odds * V(c.sharpness[m]);
    peak = max(peak, select(g.present[m], g.weight[m], lowest));
  }
  for (int m = 0; m < q.modalities; ++m) {
    g.weight[m] = select(g.present[m], exp(g.weight[m] - peak), zero);
    total += g.weight[m];
  }
  for (int m = 0; m < q.modalities; ++m) g.weight[m] = select(g.any_present, g.weight[m] / total, zero);
}

SAGE_FN float inverse_root(float x) { return 1 / __builtin_sqrtf(x); }
SAGE_FN double inverse_root(double x) { return 1 / __builtin_sqrt(x); }

// What the feature loops need of one row. An absent modality has weight, scale and mean 0 and borrows the
// row of one that is present, so that its own is never read; rows without any modality are not among these.
template <class T, class A>
struct Row {
  int64_t row;
  const T* x[kMaxModalities];
  A weight[kMaxModalities], scale[kMaxModalities], mean[kMaxModalities];  // xhat = (x - mean) * scale
  bool present[kMaxModalities];
};

// The rows of a block that have a modality. Returns how many.
template <class T, class A>
int live_rows(const FusionForward& q, int64_t row, int rows, const Gate<A>& g, Row<T, A>* out) {
  int count = 0;
  for (int l = 0; l < rows; ++l) {
    if (!g.any_present.v[l]) continue;
    Row<T, A>& r = out[count++];
    r.row = row + l;
    const T* borrowed = nullptr;
    for (int m = 0; m < q.modalities; ++m) {
      r.present[m] = g.present[m].v[l] != 0;
      r.weight[m] = g.weight[m][l];
      r.x[m] = (const T*)q.values[m] + r.row * q.row_stride[m];
      r.scale[m] = r.mean[m] = 0;
      if (r.present[m] && !borrowed) borrowed = r.x[m];
    }
    for (int m = 0; m < q.modalities; ++m)
      if (!r.present[m]) r.x[m] = borrowed;
  }
  return count;
}

// scale and mean from what forward saved.
template <class T, class A>
SAGE_FN void recall(const FusionForward& q, Row<T, A>* rows, int count) {
  for (int i = 0; i < count; ++i)
    for (int m = 0; m < q.modalities; ++m) {
      const A* stats = (const A*)q.stats + (rows[i].row * q.modalities + m) * 2;
      rows[i].scale[m] = stats[1];
      rows[i].mean[m] = stats[0];
    }
}

// LayerNorm statistics of R rows, one modality, in one pass about c, the mean of the row's first vector (k
// numbers). By the decomposition of variance (mean - c)^2 <= var (D - k) / k, so the difference below loses
// at most a factor D / k of the arithmetic's precision whatever the row: 1e-6 for 256 floats in vectors
// of 16.
template <class T, class A, int R>
SAGE_FN void statistics(const FusionForward& q, Row<T, A>* rows, int m) {
  using V = Lanes<A>;
  constexpr int W = V::width;
  const int64_t dim = q.dim;
  const int k = int(dim < W ? dim : W);
  const T* x[R];
  V center[R], s[R], ss[R];
  for (int r = 0; r < R; ++r) {
    x[r] = rows[r].x[m];
    center[r] = V(sum(k == W ? load(x[r]) : load(x[r], k)) / A(k));
    s[r] = ss[r] = V(A(0));
  }
  for_each_vector<W>(dim, [&](int64_t d, auto at) {
    for (int r = 0; r < R; ++r) {
      const V c = at.keep(at.read(x[r] + d) - center[r]);
      s[r] += c;
      ss[r] = fma(c, c, ss[r]);
    }
  });
  A mean[R], variance[R];
  for (int r = 0; r < R; ++r) {
    const A offset = sum(s[r]) / A(dim), square = sum(ss[r]) / A(dim);
    const A v = square - offset * offset;
    mean[r] = center[r][0] + offset;
    variance[r] = v < 0 ? A(0) : v;
  }
  for (int r = 0; r < R; ++r) {
    const bool present = rows[r].present[m];
    const A rstd = inverse_root(variance[r] + A(q.eps));
    rows[r].scale[m] = present ? rstd : A(0);
    rows[r].mean[m] = present ? mean[r] : A(0);
    if (q.stats) {
      A* stats = (A*)q.stats + (rows[r].row * q.modalities + m) * 2;
      stats[0] = present ? mean[r] : A(0);
      stats[1] = present ? rstd : A(0);
    }
  }
}

template <class T, class A, bool Norm, int R, int K>
SAGE_FN void mix_rows(const FusionForward& q, Row<T, A>* rows, int modalities) {
  using V = Lanes<A>;
  const int M = K ? K : modalities;
  if (Norm)
    for (int m = 0; m < M; ++m) statistics<T, A, R>(q, rows, m);
  const A *gammas = (const A*)q.norm_weight, *betas = (const A*)q.norm_bias;
  constexpr int kM = K ? K : kMaxModalities;
  A weight[R][kM], scale[R][kM], mean[R][kM];
  const T* x[R][kM];
  T* to[R];
  for (int r = 0; r < R; ++r) {
    to[r] = (T*)q.fused + rows[r].row * q.dim;
    for (int m = 0; m < M; ++m) {
      x[r][m] = rows[r].x[m];
      weight[r][m] = rows[r].weight[m];
      scale[r][m] = rows[r].weight[m] * rows[r].scale[m];
      mean[r][m] = rows[r].mean[m];
    }
  }
  const int64_t dim = q.dim;
  for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
    V out[R];
    for (int r = 0; r < R; ++r) out[r] = V(A(0));
    for (int m = 0; m < M; ++m) {
      V gamma, beta;
      if (Norm) gamma = at.read(gammas + m * dim + d), beta = at.read(betas + m * dim + d);
      for (int r = 0; r < R; ++r) {
        const V v = at.read(x[r][m] + d), w(weight[r][m]);
        if (Norm)
          out[r] = fma(w, beta, fma((v - V(mean[r][m])) * V(scale[r][m]), gamma, out[r]));
        else
          out[r] = fma(w, v, out[r]);
      }
    }
    for (int r = 0; r < R; ++r) at.write(to[r] + d, out[r]);
  });
}

template <class T, bool Norm>
void forward_block(const FusionForward& q, const Calibration<typename Arithmetic<T>::Type>& c, int64_t row,
                   int rows) {
  using A = typename Arithmetic<T>::Type;
  Gate<A> g;
  read_gate(q, c, row, rows, g);
  weigh(q, c, g);
  scatter((A*)q.weights + row * q.modalities, q.modalities, rows, g.weight);
  scatter((A*)q.confidence + row * q.modalities, q.modalities, rows, g.confidence);
  Row<T, A> live[Lanes<A>::width];
  const int count = live_rows(q, row, rows, g, live);
  if (count < rows) {
    for (int l = 0; l < rows; ++l) {
      if (g.any_present.v[l]) continue;
      std::memset((T*)q.fused + (row + l) * q.dim, 0, size_t(q.dim) * sizeof(T));
      if (q.stats)
        std::memset((A*)q.stats + (row + l) * q.modalities * 2, 0, size_t(q.modalities) * 2 * sizeof(A));
    }
  }
  int i = 0;
  if (q.modalities == 2) {
    for (; i + kTile <= count; i += kTile) mix_rows<T, A, Norm, kTile, 2>(q, live + i, 2);
    for (; i < count; ++i) mix_rows<T, A, Norm, 1, 2>(q, live + i, 2);
  } else {
    for (; i + kTile <= count; i += kTile) mix_rows<T, A, Norm, kTile, 0>(q, live + i, q.modalities);
    for (; i < count; ++i) mix_rows<T, A, Norm, 1, 0>(q, live + i, q.modalities);
  }
}

template <class T, bool Norm>
void forward_all(const FusionForward& q, int threads) {
  using A = typename Arithmetic<T>::Type;
  constexpr int W = Lanes<A>::width;
  const Calibration<A> c(q);
  const int64_t tasks = (q.rows + kTaskRows - 1) / kTaskRows;
  parallel_for(tasks, q.rows < kSerialRows ? 1 : threads, [&](int64_t i) {
    const int64_t end = (i + 1) * kTaskRows < q.rows ? (i + 1) * kTaskRows : q.rows;
    for (int64_t row = i * kTaskRows; row < end; row += W)
      forward_block<T, Norm>(q, c, row, int(end - row < W ? end - row : W));
  });
}

// -------------------------------------------------------------------------------------------------- backward
// Parameter gradients of one chunk of rows. norm[] holds float sums of norm_weight (M, D) then norm_bias (M,
// D).
template <class A>
struct Partial {
  A* norm;
  Lanes<A> log_temperature[kMaxModalities * kMaxStages], bias[kMaxModalities * kMaxStages],
      sharpness[kMaxModalities];
};

// Features of R rows, one modality: d fused -> d values, d weight, d affine.
//   xhat = (x - mean) scale;  u = g gamma;  c0 = sum u xhat, c1 = sum u, c2 = sum g beta
//   d weight = c0 + c2;  d x = w scale (u - c1/D - xhat c0/D);  d gamma = w g xhat;  d beta = w g
template <class T, class A, bool Norm, int R>
SAGE_FN void back_rows(const FusionBackward& q, const Row<T, A>* rows, int m, A* gamma_sum, A* beta_sum,
                       A* grad_weight) {
  using V = Lanes<A>;
  const FusionForward& f = q.forward;
  const int64_t dim = f.dim;
  const A* gammas = Norm ? (const A*)f.norm_weight + m * dim : nullptr;
  const A* betas = Norm ? (const A*)f.norm_bias + m * dim : nullptr;
  const T *grad[R], *x[R];
  V c0[R], c1[R], c2[R], scale[R], mean[R], weight[R];
  for (int r = 0; r < R; ++r) {
    grad[r] = (const T*)q.grad_fused + rows[r].row * dim;
    x[r] = rows[r].x[m];
    c0[r] = c1[r] = c2[r] = V(A(0));
    scale[r] = V(rows[r].scale[m]), mean[r] = V(rows[r].mean[m]), weight[r] = V(rows[r].weight[m]);
  }
  for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
    if (!Norm) {
      for (int r = 0; r < R; ++r) c0[r] = fma(at.read(grad[r] + d), at.read(x[r] + d), c0[r]);
      return;
    }
    const V gamma = at.read(gammas + d), beta = at.read(betas + d);
    V gs = at.read(gamma_sum + d), bs = at.read(beta_sum + d);
    for (int r = 0; r < R; ++r) {
      const V g = at.read(grad[r] + d);  // 0 past the end
      // (0 - mean) past the end: everything there is multiplied by g = 0
      const V xhat = (at.read(x[r] + d) - mean[r]) * scale[r];
      const V u = g * gamma, wg = g * weight[r];
      c1[r] += u;
      c0[r] = fma(u, xhat, c0[r]);
      c2[r] = fma(g, beta, c2[r]);
      gs = fma(wg, xhat, gs);
      bs += wg;
    }
    at.write(gamma_sum + d, gs);
    at.write(beta_sum + d, bs);
  });
  V k[R], a0[R], a1[R];
  for (int r = 0; r < R; ++r) {
    const A s0 = sum(c0[r]), s1 = sum(c1[r]), s2 = sum(c2[r]);
    const A by = rows[r].weight[m] * (Norm ? rows[r].scale[m] : A(1));
    grad_weight[r] = rows[r].present[m] ? s0 + s2 : A(0);
    k[r] = V(by);
    a0[r] = V(-by * s0 / A(dim));
    a1[r] = V(-by * s1 / A(dim));
  }
  if (!q.grad_values[m]) return;
  T* out[R];
  for (int r = 0; r < R; ++r) out[r] = (T*)q.grad_values[m] + rows[r].row * dim;
  for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
    V gamma;
    if (Norm) gamma = at.read(gammas + d);
    for (int r = 0; r < R; ++r) {
      V y = at.read(grad[r] + d) * k[r];
      if (Norm) y = fma(y, gamma, fma((at.read(x[r] + d) - mean[r]) * scale[r], a0[r], a1[r]));
      at.write(out[r] + d, y);
    }
  });
  for (int r = 0; r < R; ++r)
    if (!rows[r].present[m]) std::memset(out[r], 0, size_t(dim) * sizeof(T));
}

// Softmax over the present modalities, then each modality's gate. grad_w, grad_c: gradients of weights and
// confidence.
template <class A>
void gate_backward(const FusionBackward& q, const Calibration<A>& c, int64_t row, int rows, const Gate<A>& g,
                   Lanes<A>* grad_w, const Lanes<A>* grad_c, Partial<A>& partial) {
  using V = Lanes<A>;
  const int M = q.forward.modalities, S = q.forward.stages;
  const V zero(A(0));
  V mean_grad = zero, grad_logit[kMaxModalities * kMaxStages], grad_stage[kMaxStages];
  const Bits<A> real = first<A>(rows);  // repeated rows past the end add nothing to parameter sums
  for (int m = 0; m < M; ++m) {
    grad_w[m] = select(g.present[m], grad_w[m], zero);
    mean_grad = fma(g.weight[m], grad_w[m], mean_grad);
  }
  for (int s = 0; s < S; ++s) grad_stage[s] = zero;
  for (int m = 0; m < M; ++m) {
    const Bits<A> counted = g.present[m] & real;
    const V grad_score = select(counted, g.weight[m] * (grad_w[m] - mean_grad), zero);
    const V grad_r = select(counted, grad_c[m], zero);
    partial.sharpness[m] = fma(grad_score, g.log_odds[m], partial.sharpness[m]);
    V* grad_l = grad_logit + m * S;
    reliability_backward(S, g.logit + m * S, g.stage, grad_r, grad_score * V(c.sharpness[m]), grad_l,
                         grad_stage);
    for (int s = 0; s < S; ++s) {
      const int i = m * S + s;
      partial.bias[i] += grad_l[s];
      grad_l[s] = grad_l[s] * V(c.scale[i]);
      partial.log_temperature[i] -= grad_l[s] * g.raw[i];
    }
  }
  scatter((A*)q.grad_reliability + row * M * S, M * S, rows, grad_logit);
  if (q.grad_stage) scatter((A*)q.grad_stage + row * S, S, rows, grad_stage);
}

template <class T, bool Norm>
void backward_block(const FusionBackward& q, const Calibration<typename Arithmetic<T>::Type>& c, int64_t row,
                    int rows, Partial<typename Arithmetic<T>::Type>& partial) {
  using A = typename Arithmetic<T>::Type;
  using V = Lanes<A>;
  const FusionForward& f = q.forward;
  const int M = f.modalities;
  Gate<A> g;
  read_gate(f, c, row, rows, g);
  weigh(f, c, g);

  V grad_w[kMaxModalities], grad_c[kMaxModalities];
  if (q.grad_weights)
    gather((const A*)q.grad_weights + row * M, M, rows, grad_w);
  else
    for (int m = 0; m < M; ++m) grad_w[m] = V(A(0));
  if (q.grad_confidence)
    gather((const A*)q.grad_confidence + row * M, M, rows, grad_c);
  else
    for (int m = 0; m < M; ++m) grad_c[m] = V(A(0));

  if (q.grad_fused) {
    Row<T, A> live[V::width];
    const int count = live_rows(f, row, rows, g, live);
    if (Norm) recall(f, live, count);
    A dot[V::width];
    for (int m = 0; m < M; ++m) {
      A *gamma_sum = Norm ? partial.norm + m * f.dim : nullptr,
        *beta_sum = Norm ? gamma_sum + M * f.dim : nullptr;
      int i = 0;
      for (; i + kTile <= count; i += kTile)
        back_rows<T, A, Norm, kTile>(q, live + i, m, gamma_sum, beta_sum, dot + i);
      for (; i < count; ++i) back_rows<T, A, Norm, 1>(q, live + i, m, gamma_sum, beta_sum, dot + i);
      for (int k = 0; k < count; ++k) grad_w[m].v[live[k].row - row] += dot[k];
    }
  }
  for (int m = 0; m < M; ++m) {
    if (!q.grad_values[m]) continue;
    for (int l = 0; l < rows; ++l)
      if (!q.grad_fused || !g.any_present.v[l])
        std::memset((T*)q.grad_values[m] + (row + l) * f.dim, 0, size_t(f.dim) * sizeof(T));
  }

  gate_backward(q, c, row, rows, g, grad_w, grad_c, partial);
}

template <class T, bool Norm>
void backward_all(const FusionBackward& q, int threads) {
  using A = typename Arithmetic<T>::Type;
  constexpr int W = Lanes<A>::width;
  const FusionForward& f = q.forward;
  const Calibration<A> c(f);
  const int M = f.modalities, S = f.stages;
  const int64_t affine = Norm ? 2 * M * f.dim : 0;
  const int64_t params = fusion_param_count(f.dim, M, S, Norm);
  const int64_t chunks = fusion_chunks(f.rows), per = fusion_chunk_rows(f.rows);
  double* sums = q.workspace;                       // (chunks, params)
  A* floats = (A*)(q.workspace + chunks * params);  // (chunks, affine)
  parallel_for(chunks, f.rows < kSerialRows ? 1 : threads, [&](int64_t i) {
    double* total = sums + i * params;
    Partial<A> partial = {};
    partial.norm = floats + i * affine;
    std::memset(total, 0, size_t(params) * sizeof(double));
    std::memset((void*)partial.norm, 0, size_t(affine) * sizeof(A));
    const int64_t begin = i * per, end = begin + per < f.rows ? begin + per : f.rows;
    for (int64_t row = begin; row < end; row += W) {
      backward_block<T, Norm>(q, c, row, int(end - row < W ? end - row : W), partial);
      if ((row - begin) % kFlushRows == kFlushRows - W || row + W >= end) {
        for (int64_t k = 0; k < affine; ++k) {
          total[k] += partial.norm[k];
          partial.norm[k] = 0;
        }
        double* gates = total + affine;
        for (int k = 0; k < M * S; ++k) {
          gates[k] += sum(partial.log_temperature[k]);
          gates[M * S + k] += sum(partial.bias[k]);
          partial.log_temperature[k] = partial.bias[k] = Lanes<A>(A(0));
        }
        for (int m = 0; m < M; ++m) {
          gates[2 * M * S + m] += sum(partial.sharpness[m]);
          partial.sharpness[m] = Lanes<A>(A(0));
        }
      }
    }
  });
  for (int64_t i = 1; i < chunks; ++i)
    for (int64_t k = 0; k < params; ++k) sums[k] += sums[i * params + k];
  for (int64_t k = 0; k < params; ++k) ((A*)q.grad_params)[k] = chunks ? A(sums[k]) : A(0);
}

}  // namespace

#define SAGE_BY_TYPE(q, f, call)                                                                       \
  switch ((f).dtype) {                                                                                 \
    case DType::f32:                                                                                   \
      return (f).norm_weight ? call<float, true>(q, exec.where) : call<float, false>(q, exec.where);   \
    case DType::f64:                                                                                   \
      return (f).norm_weight ? call<double, true>(q, exec.where) : call<double, false>(q, exec.where); \
    case DType::f16:                                                                                   \
      return (f).norm_weight ? call<f16, true>(q, exec.where) : call<f16, false>(q, exec.where);       \
    case DType::bf16:                                                                                  \
      return (f).norm_weight ? call<bf16, true>(q, exec.where) : call<bf16, false>(q, exec.where);     \
  }

void fusion_forward(const FusionForward& q, Exec exec) { SAGE_BY_TYPE(q, q, forward_all) }
void fusion_backward(const FusionBackward& q, Exec exec) { SAGE_BY_TYPE(q, q.forward, backward_all) }

}  // namespace sage::cpu::SAGE_ISA
