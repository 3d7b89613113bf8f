// reliability_fusion on the CPU.
//
// A block is `width` rows. Its gate (M*S sigmoids and M logarithms a row) runs with a lane a row; its
// features run with lanes along D, one row after the other: memory is walked in order, which is what hardware
// prefetchers follow (four rows side by side measured half the bandwidth out of cache). kTile rows are taken
// through one pass before the next pass starts, so that their reductions overlap and their data stays in L1.
// Bytes from the contract: forward reads M D and writes D numbers a row, backward reads (M + 1) D and writes
// M D; the floor is the time to copy those.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/reliability_fusion.h"

namespace sage::cpu::SAGE_ISA {
namespace {

constexpr int kTile = 4;             // rows a pass
constexpr int64_t kFlushRows = 256;  // parameter gradients: float sums this long, then double
constexpr int64_t kSerialRows = 96;  // fewer stay on one thread
constexpr int64_t kTaskRows = 64;

template <class A>
struct Calibration {  // per (m, s)
  A scale[kMaxModalities * kMaxStages], bias[kMaxModalities * kMaxStages], sharpness[kMaxModalities];

  explicit Calibration(const ReliabilityFusionForward& q) {
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
void read_gate(const ReliabilityFusionForward& q, const Calibration<A>& c, int64_t row, int rows,
               Gate<A>& g) {
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
void weigh(const ReliabilityFusionForward& q, const Calibration<A>& c, Gate<A>& g) {
  using V = Lanes<A>;
  V score[kMaxModalities];
  for (int m = 0; m < q.modalities; ++m) {
    const Reliability<V> r = reliability(q.stages, g.logit + m * q.stages, g.stage);
    g.confidence[m] = select(g.present[m], r.confidence, V(A(0)));
    g.log_odds[m] = r.log_odds;
    score[m] = r.log_odds * V(c.sharpness[m]);
  }
  modality_weights(q.modalities, score, g.present, g.weight);
}

SAGE_FN float inverse_root(float x) { return 1 / __builtin_sqrtf(x); }
SAGE_FN double inverse_root(double x) { return 1 / __builtin_sqrt(x); }

// What the feature loops need of one row: its present modalities, and no other is ever read.
template <class T, class A>
struct Row {
  int64_t row;
  int count;  // at least 1
  int m[kMaxModalities];
  const T* x[kMaxModalities];
  A weight[kMaxModalities], scale[kMaxModalities], shift[kMaxModalities];  // xhat = x scale + shift
};

// The rows of a block that have a modality. Returns how many.
template <class T, class A>
int live_rows(const ReliabilityFusionForward& q, int64_t row, int rows, const Gate<A>& g, Row<T, A>* out) {
  int live = 0;
  for (int l = 0; l < rows; ++l) {
    if (!g.any_present.v[l]) continue;
    Row<T, A>& r = out[live++];
    r.row = row + l;
    r.count = 0;
    for (int m = 0; m < q.modalities; ++m) {
      if (!g.present[m].v[l]) continue;
      const int k = r.count++;
      r.m[k] = m;
      r.x[k] = (const T*)q.values[m] + r.row * q.row_stride[m];
      r.weight[k] = g.weight[m][l];
    }
  }
  return live;
}

// LayerNorm statistics of one row of one modality, in one pass about c, the mean of the row's first vector (k
// numbers). By the decomposition of variance (mean - c)^2 <= var (D - k) / k, so the difference below loses
// at most a factor D / k of the arithmetic's precision whatever the row: 1e-6 for 256 floats in vectors
// of 16.
template <class T, class A>
SAGE_FN void statistics(const ReliabilityFusionForward& q, Row<T, A>& row, int i) {
  using V = Lanes<A>;
  constexpr int W = V::width;
  const int64_t dim = q.dim;
  const int k = int(dim < W ? dim : W);
  const T* x = row.x[i];
  const V center(sum(k == W ? load(x) : load(x, k)) / A(k));
  V s(A(0)), ss(A(0));
  for_each_vector<W>(dim, [&](int64_t d, auto at) {
    const V c = at.keep(at.read(x + d) - center);
    s += c;
    ss = fma(c, c, ss);
  });
  const A offset = sum(s) / A(dim), v = sum(ss) / A(dim) - offset * offset;
  const A mean = center[0] + offset, rstd = inverse_root((v < 0 ? A(0) : v) + A(q.eps));
  row.scale[i] = rstd;
  row.shift[i] = -mean * rstd;
  if (q.stats) {
    A* stats = (A*)q.stats + (row.row * q.modalities + row.m[i]) * 2;
    stats[0] = mean;
    stats[1] = rstd;
  }
}

// One row of K present modalities (0: any number).
template <class T, class A, bool Norm, int K>
SAGE_FN void mix(const ReliabilityFusionForward& q, const Row<T, A>& row) {
  using V = Lanes<A>;
  const int count = K ? K : row.count;
  const int64_t dim = q.dim;
  constexpr int kMost = K ? K : kMaxModalities;
  const A *gamma[kMost], *beta[kMost];
  V weight[kMost], scale[kMost], shift[kMost];
  for (int k = 0; k < count; ++k) {
    const A w = row.weight[k];
    weight[k] = V(w);
    if (!Norm) continue;
    scale[k] = V(w * row.scale[k]);
    shift[k] = V(w * row.shift[k]);
    gamma[k] = (const A*)q.norm_weight + row.m[k] * dim;
    beta[k] = (const A*)q.norm_bias + row.m[k] * dim;
  }
  T* to = (T*)q.fused + row.row * dim;
  for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
    V out(A(0));
    for (int k = 0; k < count; ++k) {
      const V x = at.read(row.x[k] + d);
      if (Norm)
        out =
            fma(fma(x, scale[k], shift[k]), at.read(gamma[k] + d), fma(weight[k], at.read(beta[k] + d), out));
      else
        out = fma(weight[k], x, out);
    }
    at.write(to + d, out);
  });
}

template <class T, bool Norm>
void forward_block(const ReliabilityFusionForward& q, const Calibration<typename Arithmetic<T>::Type>& c,
                   int64_t row, int rows) {
  using A = typename Arithmetic<T>::Type;
  Gate<A> g;
  read_gate(q, c, row, rows, g);
  weigh(q, c, g);
  scatter((A*)q.weights + row * q.modalities, q.modalities, rows, g.weight);
  scatter((A*)q.confidence + row * q.modalities, q.modalities, rows, g.confidence);
  const size_t stats_bytes = size_t(q.modalities) * 2 * sizeof(A);  // a row; 0 where absent
  if (q.stats) std::memset((char*)q.stats + row * stats_bytes, 0, rows * stats_bytes);
  for (int l = 0; l < rows; ++l)
    if (!g.any_present.v[l]) std::memset((T*)q.fused + (row + l) * q.dim, 0, size_t(q.dim) * sizeof(T));
  Row<T, A> live[Lanes<A>::width];
  const int count = live_rows(q, row, rows, g, live);
  for (int begin = 0; begin < count; begin += kTile) {
    const int end = begin + kTile < count ? begin + kTile : count;
    for (int i = begin; Norm && i < end; ++i)
      for (int k = 0; k < live[i].count; ++k) statistics(q, live[i], k);
    for (int i = begin; i < end; ++i) {
      if (live[i].count == 1)
        mix<T, A, Norm, 1>(q, live[i]);
      else if (live[i].count == 2)
        mix<T, A, Norm, 2>(q, live[i]);
      else
        mix<T, A, Norm, 0>(q, live[i]);
    }
  }
}

template <class T, bool Norm>
void forward_all(const ReliabilityFusionForward& q, int threads) {
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

// One row of one modality: d fused -> d values; returns d weight.
//   u = g gamma;  c0 = sum u xhat, c1 = sum u, c2 = sum g beta
//   d weight = c0 + c2;  d x = w scale (u - c1/D - xhat c0/D)
template <class T, class A, bool Norm>
SAGE_FN A back_row(const ReliabilityFusionBackward& q, const Row<T, A>& row, int i) {
  using V = Lanes<A>;
  const int64_t dim = q.forward.dim;
  const int m = row.m[i];
  const A* gammas = Norm ? (const A*)q.forward.norm_weight + m * dim : nullptr;
  const A* betas = Norm ? (const A*)q.forward.norm_bias + m * dim : nullptr;
  const T *grad = (const T*)q.grad_fused + row.row * dim, *x = row.x[i];
  T* out = q.grad_values[m] ? (T*)q.grad_values[m] + row.row * dim : nullptr;
  if (!Norm) {
    V c0(A(0));
    const V weight(row.weight[i]);
    for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
      const V g = at.read(grad + d);
      c0 = fma(g, at.read(x + d), c0);
      if (out) at.write(out + d, g * weight);
    });
    return sum(c0);
  }
  V c0(A(0)), c1(A(0)), c2(A(0));
  const V scale(row.scale[i]), shift(row.shift[i]);
  for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
    const V g = at.read(grad + d), u = g * at.read(gammas + d);  // 0 past the end
    c1 += u;
    c0 = fma(u, fma(at.read(x + d), scale, shift), c0);
    c2 = fma(g, at.read(betas + d), c2);
  });
  const A sum_u_xhat = sum(c0);
  if (out) {
    const NormAdjoint<A> back = norm_adjoint(row.weight[i], row.scale[i], sum(c1), sum_u_xhat, A(dim));
    const V by_u(back.by_u), by_x(back.by_xhat * row.scale[i]),
        rest(back.by_xhat * row.shift[i] + back.constant);
    for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
      const V u = at.read(grad + d) * at.read(gammas + d);
      at.write(out + d, fma(u, by_u, fma(at.read(x + d), by_x, rest)));
    });
  }
  return sum_u_xhat + sum(c2);
}

// R rows of one modality, just read by back_row: d gamma += w g xhat;  d beta += w g.
template <class T, class A, int R>
SAGE_FN void back_affine(const ReliabilityFusionBackward& q, const Row<T, A>* const* rows, const int* at_k,
                         A* gamma_sum, A* beta_sum) {
  using V = Lanes<A>;
  const int64_t dim = q.forward.dim;
  const T *grad[R], *x[R];
  V weight[R], scale[R], shift[R];
  for (int r = 0; r < R; ++r) {
    const Row<T, A>& row = *rows[r];
    const int k = at_k[r];
    grad[r] = (const T*)q.grad_fused + row.row * dim;
    x[r] = row.x[k];
    weight[r] = V(row.weight[k]);
    scale[r] = V(row.weight[k] * row.scale[k]);
    shift[r] = V(row.weight[k] * row.shift[k]);
  }
  for_each_vector<V::width>(dim, [&](int64_t d, auto at) {
    V gs = at.read(gamma_sum + d), bs = at.read(beta_sum + d);
    for (int r = 0; r < R; ++r) {
      const V g = at.read(grad[r] + d);
      gs = fma(g, fma(at.read(x[r] + d), scale[r], shift[r]), gs);
      bs = fma(g, weight[r], bs);
    }
    at.write(gamma_sum + d, gs);
    at.write(beta_sum + d, bs);
  });
}

// Softmax over the present modalities, then each modality's gate. grad_w, grad_c: gradients of weights and
// confidence.
template <class A>
void gate_backward(const ReliabilityFusionBackward& q, const Calibration<A>& c, int64_t row, int rows,
                   const Gate<A>& g, Lanes<A>* grad_w, const Lanes<A>* grad_c, Partial<A>& partial) {
  using V = Lanes<A>;
  const int M = q.forward.modalities, S = q.forward.stages;
  const V zero(A(0));
  V grad_logit[kMaxModalities * kMaxStages], grad_stage[kMaxStages];
  Bits<A> counted[kMaxModalities];  // repeated rows past the end add nothing to parameter sums
  for (int m = 0; m < M; ++m) counted[m] = g.present[m] & first<A>(rows);
  modality_weights_adjoint(M, g.weight, counted, grad_w);
  for (int s = 0; s < S; ++s) grad_stage[s] = zero;
  for (int m = 0; m < M; ++m) {
    const V grad_score = grad_w[m], grad_r = select(counted[m], grad_c[m], zero);
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
void backward_block(const ReliabilityFusionBackward& q, const Calibration<typename Arithmetic<T>::Type>& c,
                    int64_t row, int rows, Partial<typename Arithmetic<T>::Type>& partial) {
  using A = typename Arithmetic<T>::Type;
  using V = Lanes<A>;
  const ReliabilityFusionForward& f = q.forward;
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
    for (int begin = 0; begin < count; begin += kTile) {
      const int end = begin + kTile < count ? begin + kTile : count;
      for (int m = 0; m < M; ++m) {
        const Row<T, A>* rows_of_m[kTile];
        int at_k[kTile], n = 0;
        for (int i = begin; i < end; ++i)
          for (int k = 0; k < live[i].count; ++k) {
            if (live[i].m[k] != m) continue;
            if (Norm) {  // what forward saved
              const A* stats = (const A*)f.stats + (live[i].row * M + m) * 2;
              live[i].scale[k] = stats[1];
              live[i].shift[k] = -stats[0] * stats[1];
            }
            grad_w[m].v[live[i].row - row] += back_row<T, A, Norm>(q, live[i], k);
            rows_of_m[n] = live + i;
            at_k[n++] = k;
          }
        if (!Norm) continue;
        A *gamma_sum = partial.norm + m * f.dim, *beta_sum = gamma_sum + M * f.dim;
        if (n == 4) back_affine<T, A, 4>(q, rows_of_m, at_k, gamma_sum, beta_sum);
        if (n == 3) back_affine<T, A, 3>(q, rows_of_m, at_k, gamma_sum, beta_sum);
        if (n == 2) back_affine<T, A, 2>(q, rows_of_m, at_k, gamma_sum, beta_sum);
        if (n == 1) back_affine<T, A, 1>(q, rows_of_m, at_k, gamma_sum, beta_sum);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    if (!q.grad_values[m]) continue;
    for (int l = 0; l < rows; ++l)
      if (!q.grad_fused || !g.present[m].v[l])
        std::memset((T*)q.grad_values[m] + (row + l) * f.dim, 0, size_t(f.dim) * sizeof(T));
  }

  gate_backward(q, c, row, rows, g, grad_w, grad_c, partial);
}

template <class T, bool Norm>
void backward_all(const ReliabilityFusionBackward& q, int threads) {
  using A = typename Arithmetic<T>::Type;
  constexpr int W = Lanes<A>::width;
  const ReliabilityFusionForward& f = q.forward;
  const Calibration<A> c(f);
  const int M = f.modalities, S = f.stages;
  const int64_t affine = Norm ? 2 * M * f.dim : 0;
  const int64_t params = reliability_fusion_param_count(f.dim, M, S, Norm);
  const int64_t chunks = reliability_fusion_chunks(f.rows), per = reliability_fusion_chunk_rows(f.rows);
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

void reliability_fusion_forward(const ReliabilityFusionForward& q, Exec exec) {
  SAGE_BY_TYPE(q, q, forward_all)
}
void reliability_fusion_backward(const ReliabilityFusionBackward& q, Exec exec) {
  SAGE_BY_TYPE(q, q.forward, backward_all)
}

}  // namespace sage::cpu::SAGE_ISA
