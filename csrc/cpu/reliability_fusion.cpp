// reliability_fusion on the CPU.
//
// A block is `width` rows. Its gate (M S sigmoids and M logarithms a row) runs with a lane a row; its features run
// with lanes along D, one row after the other: memory is walked in order, which is what hardware prefetchers follow
// (four rows side by side measured half the bandwidth out of cache). kTile rows are taken through one pass before the
// next pass starts, so that their reductions overlap and their data stays in the first-level cache.
//
// Bytes: forward reads M D and writes D numbers a row, backward reads (M + 1) D and writes M D; the floor is the time
// to copy those.
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

  explicit Calibration(const ReliabilityFusionForward& params) {
    for (int i = 0; i < params.modalities * params.stages; ++i) {
      scale[i] =
          params.log_temperature ? A(__builtin_exp(-double(((const A*)params.log_temperature)[i]))) : A(1);
      bias[i] = params.bias ? ((const A*)params.bias)[i] : A(0);
    }
    for (int m = 0; m < params.modalities; ++m)
      sharpness[m] = params.sharpness ? ((const A*)params.sharpness)[m] : A(1);
  }
};

template <class A>
struct Gate {  // of one block, a lane a row
  using V = Lanes<A>;
  V raw[kMaxModalities * kMaxStages], logit[kMaxModalities * kMaxStages], stage[kMaxStages];
  Bits<A> present[kMaxModalities], any_present;
  V confidence[kMaxModalities], log_odds[kMaxModalities], weight[kMaxModalities];
};

// x[k] <- base[row * count + k] for a block of rows, a lane a row; rows past the end repeat the last one and are never
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
void read_gate(const ReliabilityFusionForward& params, const Calibration<A>& calibration, int64_t row,
               int rows, Gate<A>& gate) {
  using V = Lanes<A>;
  const int M = params.modalities, S = params.stages;
  gather((const A*)params.reliability + row * M * S, M * S, rows, gate.raw);
  if (params.stage)
    gather((const A*)params.stage + row * S, S, rows, gate.stage);
  else
    for (int s = 0; s < S; ++s) gate.stage[s] = V(A(1) / A(S));
  gate.any_present = Bits<A>{};
  for (int m = 0; m < M; ++m) {
    A seen[V::width];
    for (int lane = 0; lane < V::width; ++lane)
      seen[lane] = !params.present || params.present[(row + (lane < rows ? lane : rows - 1)) * M + m];
    gate.present[m] = load(seen) > V(A(0));
    gate.any_present = gate.any_present | gate.present[m];
    for (int s = m * S; s < (m + 1) * S; ++s) {
      gate.raw[s] = select(gate.present[m], gate.raw[s], V(A(0)));
      gate.logit[s] =
          select(gate.present[m], fma(gate.raw[s], V(calibration.scale[s]), V(calibration.bias[s])), V(A(0)));
    }
  }
  // A frame with no modality does not need a stage.
  for (int s = 0; s < S; ++s) gate.stage[s] = select(gate.any_present, gate.stage[s], V(A(1) / A(S)));
}

template <class A>
void weigh(const ReliabilityFusionForward& params, const Calibration<A>& calibration, Gate<A>& gate) {
  using V = Lanes<A>;
  V score[kMaxModalities];
  for (int m = 0; m < params.modalities; ++m) {
    const Reliability<V> r = reliability(params.stages, gate.logit + m * params.stages, gate.stage);
    gate.confidence[m] = select(gate.present[m], r.confidence, V(A(0)));
    gate.log_odds[m] = r.log_odds;
    score[m] = r.log_odds * V(calibration.sharpness[m]);
  }
  modality_weights(params.modalities, score, gate.present, gate.weight);
}

// What the feature loops need of one row: its present modalities, and no other is ever read.
template <class T, class A>
struct Row {
  int64_t row;
  int count;  // at least 1
  int m[kMaxModalities];
  const T* x[kMaxModalities];
  // xhat = (x - mean) rstd, never x rstd - mean rstd, whose two terms may each be far larger than their difference.
  A weight[kMaxModalities], mean[kMaxModalities], rstd[kMaxModalities];
  NormAdjoint<A> adjoint[kMaxModalities];  // backward alone
};

// The rows of a block that have a modality. Returns how many.
template <class T, class A>
int live_rows(const ReliabilityFusionForward& params, int64_t row, int rows, const Gate<A>& gate,
              Row<T, A>* out) {
  int live = 0;
  for (int lane = 0; lane < rows; ++lane) {
    if (!gate.any_present.v[lane]) continue;
    Row<T, A>& row_out = out[live++];
    row_out.row = row + lane;
    row_out.count = 0;
    for (int m = 0; m < params.modalities; ++m) {
      if (!gate.present[m].v[lane]) continue;
      const int k = row_out.count++;
      row_out.m[k] = m;
      row_out.x[k] = (const T*)params.values[m] + row_out.row * params.row_stride[m];
      row_out.weight[k] = gate.weight[m][lane];
    }
  }
  return live;
}

// LayerNorm statistics of one row of one modality, in one pass about the center, which is the mean of the row's first
// vector (`head` numbers). By the decomposition of variance (mean - center)^2 <= var (D - head) / head, so the
// difference below loses at most a factor D / head of the arithmetic's precision whatever the row: 1e-6 for 256
// floats in vectors of 16.
template <class T, class A>
SAGE_FN void statistics(const ReliabilityFusionForward& params, Row<T, A>& row, int i) {
  using V = Lanes<A>;
  constexpr int W = V::width;
  const int64_t dim = params.dim;
  const int head = int(dim < W ? dim : W);
  const T* x = row.x[i];
  const V center(sum(head == W ? load(x) : load(x, head)) / A(head));
  V total(A(0)), squares(A(0));
  for_each_vector<W>(dim, [&](int64_t column, auto vector) {
    const V distance = vector.keep(vector.read(x + column) - center);
    total += distance;
    squares = fma(distance, distance, squares);
  });
  const auto [mean, rstd] = norm_moments(center[0], sum(total), sum(squares), A(dim), A(params.eps));
  row.mean[i] = mean;
  row.rstd[i] = rstd;
  if (params.stats) {
    A* stats = (A*)params.stats + (row.row * params.modalities + row.m[i]) * 2;
    stats[0] = mean;
    stats[1] = rstd;
  }
}

// One row of K present modalities (0: any number).
template <class T, class A, bool Norm, int K>
SAGE_FN void mix(const ReliabilityFusionForward& params, const Row<T, A>& row) {
  using V = Lanes<A>;
  const int count = K ? K : row.count;
  const int64_t dim = params.dim;
  constexpr int kMost = K ? K : kMaxModalities;
  const A *gamma[kMost], *beta[kMost];
  V weight[kMost], mean[kMost], scale[kMost];
  for (int k = 0; k < count; ++k) {
    const A w = row.weight[k];
    weight[k] = V(w);
    if (!Norm) continue;
    mean[k] = V(row.mean[k]);
    scale[k] = V(w * row.rstd[k]);
    gamma[k] = (const A*)params.norm_weight + row.m[k] * dim;
    beta[k] = (const A*)params.norm_bias + row.m[k] * dim;
  }
  T* out_row = (T*)params.fused + row.row * dim;
  for_each_vector<V::width>(dim, [&](int64_t column, auto vector) {
    V out_vals(A(0));
    for (int k = 0; k < count; ++k) {
      const V x_vals = vector.read(row.x[k] + column);
      if (Norm)
        out_vals = fma((x_vals - mean[k]) * scale[k], vector.read(gamma[k] + column),
                       fma(weight[k], vector.read(beta[k] + column), out_vals));
      else
        out_vals = fma(weight[k], x_vals, out_vals);
    }
    vector.write(out_row + column, out_vals);
  });
}

template <class T, bool Norm>
void forward_block(const ReliabilityFusionForward& params, const Calibration<ArithmeticOf<T>>& calibration,
                   int64_t row, int rows) {
  using A = ArithmeticOf<T>;
  Gate<A> gate;
  read_gate(params, calibration, row, rows, gate);
  weigh(params, calibration, gate);
  scatter((A*)params.weights + row * params.modalities, params.modalities, rows, gate.weight);
  scatter((A*)params.confidence + row * params.modalities, params.modalities, rows, gate.confidence);
  const size_t stats_bytes = size_t(params.modalities) * 2 * sizeof(A);  // a row; 0 where absent
  if (params.stats) std::memset((char*)params.stats + row * stats_bytes, 0, rows * stats_bytes);
  for (int lane = 0; lane < rows; ++lane)
    if (!gate.any_present.v[lane])
      std::memset((T*)params.fused + (row + lane) * params.dim, 0, size_t(params.dim) * sizeof(T));
  Row<T, A> live[Lanes<A>::width];
  const int count = live_rows(params, row, rows, gate, live);
  for (int begin = 0; begin < count; begin += kTile) {
    const int end = begin + kTile < count ? begin + kTile : count;
    for (int i = begin; Norm && i < end; ++i)
      for (int k = 0; k < live[i].count; ++k) statistics(params, live[i], k);
    for (int i = begin; i < end; ++i) {
      if (live[i].count == 1)
        mix<T, A, Norm, 1>(params, live[i]);
      else if (live[i].count == 2)
        mix<T, A, Norm, 2>(params, live[i]);
      else
        mix<T, A, Norm, 0>(params, live[i]);
    }
  }
}

template <class T, bool Norm>
void forward_all(const ReliabilityFusionForward& params, int threads) {
  using A = ArithmeticOf<T>;
  constexpr int W = Lanes<A>::width;
  const Calibration<A> calibration(params);
  const int64_t tasks = (params.rows + kTaskRows - 1) / kTaskRows;
  parallel_for(tasks, params.rows < kSerialRows ? 1 : threads, [&](int64_t i) {
    const int64_t end = (i + 1) * kTaskRows < params.rows ? (i + 1) * kTaskRows : params.rows;
    for (int64_t row = i * kTaskRows; row < end; row += W)
      forward_block<T, Norm>(params, calibration, row, int(end - row < W ? end - row : W));
  });
}

// -------------------------------------------------------------------------------------------------- backward
// Parameter gradients of one chunk of rows: running sums in the arithmetic type. `norm`: of norm_weight (M, D), then of
// norm_bias (M, D).
template <class A>
struct Partial {
  A* norm;
  Lanes<A> log_temperature[kMaxModalities * kMaxStages], bias[kMaxModalities * kMaxStages],
      sharpness[kMaxModalities];
};

// One row of one modality: returns the gradient of its weight (norm_adjoint's formulas; without the LayerNorm u is the
// gradient of fused, and xhat is x) and writes that of its values, which after a LayerNorm is left to finish_rows.
template <class T, class A, bool Norm>
SAGE_FN A back_row(const ReliabilityFusionBackward& params, Row<T, A>& row, int i) {
  using V = Lanes<A>;
  const int64_t dim = params.forward.dim;
  const int m = row.m[i];
  const A* gammas = Norm ? (const A*)params.forward.norm_weight + m * dim : nullptr;
  const A* betas = Norm ? (const A*)params.forward.norm_bias + m * dim : nullptr;
  const T *grad = (const T*)params.grad_fused + row.row * dim, *x = row.x[i];
  T* out = params.grad_values[m] ? (T*)params.grad_values[m] + row.row * dim : nullptr;
  if (!Norm) {
    V sum_u_xhat_lanes(A(0));
    const V weight(row.weight[i]);
    for_each_vector<V::width>(dim, [&](int64_t column, auto vector) {
      const V grad_vals = vector.read(grad + column);
      sum_u_xhat_lanes = fma(grad_vals, vector.read(x + column), sum_u_xhat_lanes);
      if (out) vector.write(out + column, grad_vals * weight);
    });
    return sum(sum_u_xhat_lanes);
  }
  V sum_uc_lanes(A(0)), sum_u(A(0)), sum_grad_beta(A(0));
  const V mean(row.mean[i]);
  for_each_vector<V::width>(dim, [&](int64_t column, auto vector) {
    if (out) __builtin_prefetch(out + column, 1);  // finish_rows writes it
    const V grad_vals = vector.read(grad + column),
            u = grad_vals * vector.read(gammas + column);  // 0 past the end
    sum_u += u;
    sum_uc_lanes = fma(u, vector.read(x + column) - mean, sum_uc_lanes);
    sum_grad_beta = fma(grad_vals, vector.read(betas + column), sum_grad_beta);
  });
  const A sum_u_xhat = sum(sum_uc_lanes) * row.rstd[i];
  row.adjoint[i] = norm_adjoint(row.weight[i], row.rstd[i], sum(sum_u), sum_u_xhat, A(dim));
  return sum_u_xhat + sum(sum_grad_beta);
}

// R rows of one modality, just read by back_row. Writes the gradients of their values; adds weight grad xhat to that of
// norm_weight, weight grad to that of norm_bias. What the three share is loaded and computed once.
template <class T, class A, int R>
SAGE_FN void finish_rows(const ReliabilityFusionBackward& params, Row<T, A>* const* rows, const int* at_k,
                         int m, A* gamma_sum, A* beta_sum) {
  using V = Lanes<A>;
  const int64_t dim = params.forward.dim;
  const A* gammas = (const A*)params.forward.norm_weight + m * dim;
  const bool write = params.grad_values[m] != nullptr;
  const T *grad[R], *x[R];
  T* out[R];
  V weight[R], mean[R], scale[R], by_x[R], constant[R];
  for (int r = 0; r < R; ++r) {
    const Row<T, A>& row = *rows[r];
    const int k = at_k[r];
    grad[r] = (const T*)params.grad_fused + row.row * dim;
    x[r] = row.x[k];
    out[r] = write ? (T*)params.grad_values[m] + row.row * dim : nullptr;
    weight[r] = V(row.weight[k]);
    mean[r] = V(row.mean[k]);
    scale[r] = V(row.adjoint[k].by_u);
    by_x[r] = V(row.adjoint[k].by_xhat * row.rstd[k]);
    constant[r] = V(row.adjoint[k].constant);
  }
  for_each_vector<V::width>(dim, [&](int64_t column, auto vector) {
    const V gamma = vector.read(gammas + column);
    V gamma_vals = vector.read(gamma_sum + column), beta_vals = vector.read(beta_sum + column);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V grad_vals = vector.read(grad[r] + column), distance = vector.read(x[r] + column) - mean[r];
      const V scaled = grad_vals * scale[r];
      if (write) vector.write(out[r] + column, fma(scaled, gamma, fma(distance, by_x[r], constant[r])));
      gamma_vals = fma(scaled, distance, gamma_vals);
      beta_vals = fma(grad_vals, weight[r], beta_vals);
    }
    vector.write(gamma_sum + column, gamma_vals);
    vector.write(beta_sum + column, beta_vals);
  });
}

// Softmax over the present modalities, then each modality's gate, from the gradients of its weight and confidence.
template <class A>
void gate_backward(const ReliabilityFusionBackward& params, const Calibration<A>& calibration, int64_t row,
                   int rows, const Gate<A>& gate, Lanes<A>* grad_weight, const Lanes<A>* grad_confidence,
                   Partial<A>& partial) {
  using V = Lanes<A>;
  const int M = params.forward.modalities, S = params.forward.stages;
  const V zero(A(0));
  V grad_logit[kMaxModalities * kMaxStages], grad_stage[kMaxStages];
  Bits<A> counted[kMaxModalities];  // repeated rows past the end add nothing to parameter sums
  for (int m = 0; m < M; ++m) counted[m] = gate.present[m] & first<A>(rows);
  modality_weights_adjoint(M, gate.weight, counted, grad_weight);
  for (int s = 0; s < S; ++s) grad_stage[s] = zero;
  for (int m = 0; m < M; ++m) {
    const V grad_score = grad_weight[m], grad_r = select(counted[m], grad_confidence[m], zero);
    partial.sharpness[m] = fma(grad_score, gate.log_odds[m], partial.sharpness[m]);
    V* grad_l = grad_logit + m * S;
    reliability_backward(S, gate.logit + m * S, gate.stage, grad_r, grad_score * V(calibration.sharpness[m]),
                         grad_l, grad_stage);
    for (int s = 0; s < S; ++s) {
      const int i = m * S + s;
      partial.bias[i] += grad_l[s];
      grad_l[s] = grad_l[s] * V(calibration.scale[i]);
      partial.log_temperature[i] -= grad_l[s] * gate.raw[i];
    }
  }
  scatter((A*)params.grad_reliability + row * M * S, M * S, rows, grad_logit);
  if (params.grad_stage) scatter((A*)params.grad_stage + row * S, S, rows, grad_stage);
}

template <class T, bool Norm>
void backward_block(const ReliabilityFusionBackward& params, const Calibration<ArithmeticOf<T>>& calibration,
                    int64_t row, int rows, Partial<ArithmeticOf<T>>& partial) {
  using A = ArithmeticOf<T>;
  using V = Lanes<A>;
  const ReliabilityFusionForward& forward = params.forward;
  const int M = forward.modalities;
  Gate<A> gate;
  read_gate(forward, calibration, row, rows, gate);
  weigh(forward, calibration, gate);

  V grad_weight[kMaxModalities], grad_confidence[kMaxModalities];
  if (params.grad_weights)
    gather((const A*)params.grad_weights + row * M, M, rows, grad_weight);
  else
    for (int m = 0; m < M; ++m) grad_weight[m] = V(A(0));
  if (params.grad_confidence)
    gather((const A*)params.grad_confidence + row * M, M, rows, grad_confidence);
  else
    for (int m = 0; m < M; ++m) grad_confidence[m] = V(A(0));

  if (params.grad_fused) {
    Row<T, A> live[V::width];
    const int count = live_rows(forward, row, rows, gate, live);
    for (int begin = 0; begin < count; begin += kTile) {
      const int end = begin + kTile < count ? begin + kTile : count;
      for (int m = 0; m < M; ++m) {
        Row<T, A>* rows_of_m[kTile];
        int at_k[kTile], n = 0;
        for (int i = begin; i < end; ++i)
          for (int k = 0; k < live[i].count; ++k) {
            if (live[i].m[k] != m) continue;
            if (Norm) {  // what forward saved
              const A* stats = (const A*)forward.stats + (live[i].row * M + m) * 2;
              live[i].mean[k] = stats[0];
              live[i].rstd[k] = stats[1];
            }
            grad_weight[m].v[live[i].row - row] += back_row<T, A, Norm>(params, live[i], k);
            rows_of_m[n] = live + i;
            at_k[n++] = k;
          }
        if (!Norm) continue;
        A *gamma_sum = partial.norm + m * forward.dim, *beta_sum = gamma_sum + M * forward.dim;
        if (n == 4) finish_rows<T, A, 4>(params, rows_of_m, at_k, m, gamma_sum, beta_sum);
        if (n == 3) finish_rows<T, A, 3>(params, rows_of_m, at_k, m, gamma_sum, beta_sum);
        if (n == 2) finish_rows<T, A, 2>(params, rows_of_m, at_k, m, gamma_sum, beta_sum);
        if (n == 1) finish_rows<T, A, 1>(params, rows_of_m, at_k, m, gamma_sum, beta_sum);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    if (!params.grad_values[m]) continue;
    for (int lane = 0; lane < rows; ++lane)
      if (!params.grad_fused || !gate.present[m].v[lane])
        std::memset((T*)params.grad_values[m] + (row + lane) * forward.dim, 0,
                    size_t(forward.dim) * sizeof(T));
  }

  gate_backward(params, calibration, row, rows, gate, grad_weight, grad_confidence, partial);
}

template <class T, bool Norm>
void backward_all(const ReliabilityFusionBackward& params, int threads) {
  using A = ArithmeticOf<T>;
  constexpr int W = Lanes<A>::width;
  const ReliabilityFusionForward& forward = params.forward;
  const Calibration<A> calibration(forward);
  const int M = forward.modalities, S = forward.stages;
  const int64_t affine = Norm ? 2 * M * forward.dim : 0;
  const int64_t numbers = reliability_fusion_param_count(forward.dim, M, S, Norm);
  const int64_t chunks = reliability_fusion_chunks(forward.rows),
                chunk_rows = reliability_fusion_chunk_rows(forward.rows);
  double* sums = params.workspace;                        // (chunks, numbers)
  A* floats = (A*)(params.workspace + chunks * numbers);  // (chunks, affine)
  parallel_for(chunks, forward.rows < kSerialRows ? 1 : threads, [&](int64_t i) {
    double* total = sums + i * numbers;
    Partial<A> partial = {};
    partial.norm = floats + i * affine;
    std::memset(total, 0, size_t(numbers) * sizeof(double));
    std::memset((void*)partial.norm, 0, size_t(affine) * sizeof(A));
    const int64_t begin = i * chunk_rows,
                  end = begin + chunk_rows < forward.rows ? begin + chunk_rows : forward.rows;
    for (int64_t row = begin; row < end; row += W) {
      backward_block<T, Norm>(params, calibration, row, int(end - row < W ? end - row : W), partial);
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
    for (int64_t k = 0; k < numbers; ++k) sums[k] += sums[i * numbers + k];
  for (int64_t k = 0; k < numbers; ++k) ((A*)params.grad_params)[k] = chunks ? A(sums[k]) : A(0);
}

}  // namespace

// Calls all<storage type, whether there is a LayerNorm>(params, threads).
#define SAGE_BY_TYPE(all, params, forward, threads)                                                          \
  switch ((forward).dtype) {                                                                                 \
    case DType::f32:                                                                                         \
      return (forward).norm_weight ? all<float, true>(params, threads) : all<float, false>(params, threads); \
    case DType::f64:                                                                                         \
      return (forward).norm_weight ? all<double, true>(params, threads)                                      \
                                   : all<double, false>(params, threads);                                    \
    case DType::f16:                                                                                         \
      return (forward).norm_weight ? all<f16, true>(params, threads) : all<f16, false>(params, threads);     \
    case DType::bf16:                                                                                        \
      return (forward).norm_weight ? all<bf16, true>(params, threads) : all<bf16, false>(params, threads);   \
  }

void reliability_fusion_forward(const ReliabilityFusionForward& params, Exec exec) {
  SAGE_BY_TYPE(forward_all, params, params, exec.where)
}
void reliability_fusion_backward(const ReliabilityFusionBackward& params, Exec exec) {
  SAGE_BY_TYPE(backward_all, params, params.forward, exec.where)
}

}  // namespace sage::cpu::SAGE_ISA
