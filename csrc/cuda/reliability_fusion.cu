// reliability_fusion on the GPU.
//
// Bytes: forward reads M D and writes D values a row, backward reads (M + 1) D and writes M D; the gate adds 4 (M S + S + 4 M)
// bytes or so. The floor is the time to move those; every value is read once, absent modalities not at all.
//
// A warp takes four rows at a time. Their gates run together, 8 lanes a row, those spread over the modalities and what is
// left of them over the stages. Then come the features:
//   forward   8 (halves), 16 or 32 lanes a row (more rows side by side, fewer shuffles a row), a row of one modality in registers,
//             LayerNorm by two passes over the registers, M vectors mixed into registers, one store
//   backward  32 lanes a row, so a lane owns D / 32 columns and keeps their sums for norm_weight and norm_bias in
//             registers over all of its rows; the rows of a block are a chunk, whose sums go to workspace in double, and a
//             second launch adds the chunks in order
// Rows too wide for registers, or no multiple of 16 bytes, take the `wide` kernels, which read values again from cache.
// Which kernel and which lane serves what is decided by dtype, M and D alone: a row's bits depend on nothing else.
#include <type_traits>

#include "device.cuh"
#include "../math/reliability_fusion.h"

namespace sage::cuda {
namespace {

constexpr int kForwardWarps = 4, kBackwardWarps = 8;
constexpr int kRows = 4, kGateLanes = kWarp / kRows;  // of a warp's gate; 8 lanes serve 8 modalities
constexpr int kForwardVectors = 4;                    // vectors of a row that a lane holds
constexpr int64_t kForwardBlocks = 1 << 16;           // more rows come round again

// Whether values can lie so far from zero that their mean's rounding shows beside their spread.
template <class T>
constexpr bool kDrifts = sizeof(T) >= 4;

// Which tensors may be read 16 bytes at a time: bit m values[m], then
constexpr unsigned kFusedWhole = 1u << 8, kAffineWhole = 1u << 9;  // and grad_values[m]: bit 16 + m

// -------------------------------------------------------------------------------------------------------- the gate
template <class A>
struct Tables {  // in shared memory: per (m, s) exp(-log_temperature) and bias, per m sharpness
  const A *scale, *bias, *sharpness;
};
__host__ __device__ __forceinline__ int table_size(int modalities, int stages) {
  return modalities * (2 * stages + 1);
}

template <class A>
__device__ __forceinline__ Tables<A> read_tables(const ReliabilityFusionForward& q, A* shared) {
  const int count = q.modalities * q.stages;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    shared[i] = q.log_temperature ? exp(-static_cast<const A*>(q.log_temperature)[i]) : A(1);
    shared[count + i] = q.bias ? static_cast<const A*>(q.bias)[i] : A(0);
    if (i < q.modalities) shared[2 * count + i] = q.sharpness ? static_cast<const A*>(q.sharpness)[i] : A(1);
  }
  __syncthreads();
  return {shared, shared + count, shared + 2 * count};
}

template <class A>
struct Logits {  // of one row and modality; zeros where absent and past the last stage
  const A *raw, *scale, *bias;
  int stages;
  __device__ __forceinline__ A operator[](int s) const {
    return raw && s < stages ? fma(raw[s], scale[s], bias[s]) : A(0);
  }
};
template <class A>
struct StageRow {
  const A* at;
  A uniform;
  int stages;
  __device__ __forceinline__ A operator[](int s) const { return s < stages ? (at ? at[s] : uniform) : A(0); }
};
// Over the lanes whose numbers differ from this one's in the bits from .. to / 2 (powers of two): every one gets the same bits.
template <class A>
__device__ __forceinline__ A sum_over(int from, int to, A x) {
  for (int o = from; o < to; o *= 2) x += __shfl_xor_sync(kFull, x, o);
  return x;
}
template <class A>
__device__ __forceinline__ A max_over(int from, int to, A x) {
  for (int o = from; o < to; o *= 2) x = max(x, __shfl_xor_sync(kFull, x, o));
  return x;
}
struct StageLanes {  // of one modality: stages first, first + step, ... are this lane's
  int first, step;
  __device__ __forceinline__ int count(int stages) const { return (stages + step - 1) / step; }
  template <class A>
  __device__ __forceinline__ A sum(A x) const {
    return sum_over(1, step, x);
  }
  template <class A>
  __device__ __forceinline__ A max(A x) const {
    return max_over(1, step, x);
  }
  __device__ __forceinline__ bool any(bool m) const { return __any_sync(kFull, m); }
};
struct ModalityLanes {  // of one row, `lanes` of them a modality
  int lanes;
  template <class A>
  __device__ __forceinline__ A sum(A x) const {
    return sum_over(lanes, kGateLanes, x);
  }
  template <class A>
  __device__ __forceinline__ A max(A x) const {
    return max_over(lanes, kGateLanes, x);
  }
};

// Four rows from `base`, of those below `end`: 8 lanes a row, `lanes` of them a modality, all of which hold its results.
template <class A>
struct Gate {
  int lane, lanes, m;
  int64_t row;
  bool real, present;
  StageLanes stages;
  Logits<A> logit;
  StageRow<A> stage;
  A confidence, log_odds, weight;

  __device__ __forceinline__ Gate(const ReliabilityFusionForward& q, const Tables<A>& t, int64_t base,
                                  int64_t end) {
    const int M = q.modalities, S = q.stages;
    lane = int(threadIdx.x) % kWarp;
    lanes = M > 4 ? 1 : M > 2 ? 2 : M > 1 ? 4 : 8;
    m = lane % kGateLanes / lanes;
    row = base + lane / kGateLanes;
    const bool inside = row < end;
    real = inside && m < M;
    present = real && (!q.present || q.present[row * M + m]);
    const bool any_present = __ballot_sync(kFull, present) >> lane / kGateLanes * kGateLanes & 0xffu;
    stages = {lane % lanes, lanes};
    logit = {present ? static_cast<const A*>(q.reliability) + (row * M + m) * S : nullptr, t.scale + m * S,
             t.bias + m * S, S};
    // a frame with no modality does not need a stage
    stage = {any_present && q.stage ? static_cast<const A*>(q.stage) + row * S : nullptr, A(1) / A(S), S};

    const Reliability<A> r = reliability<A>(S, logit, stage, stages);
    confidence = present ? r.confidence : A(0);
    log_odds = r.log_odds;
    const A score = log_odds * (real ? t.sharpness[m] : A(0));
    modality_weights(1, &score, &present, &weight, modalities());
  }
  __device__ __forceinline__ ModalityLanes modalities() const { return {lanes}; }
  __device__ __forceinline__ int lane_of(int r, int modality) const {
    return r * kGateLanes + modality * lanes;
  }
  __device__ __forceinline__ bool serves(int r, int modality) const {
    return lane / kGateLanes == r && m == modality;
  }
  __device__ __forceinline__ bool first() const { return stages.first == 0; }
};

// Gradients of one modality's weight and confidence -> those of the gate's inputs. `sums`: this lane's own row of
// (2 S M + M) running sums in shared memory: log_temperature, bias, sharpness.
template <class A>
__device__ __forceinline__ void gate_backward(const ReliabilityFusionBackward& q, const Tables<A>& t,
                                              const Gate<A>& g, A grad_w, A grad_c, A* sums) {
  const int M = q.forward.modalities, S = q.forward.stages;
  A grad_score = grad_w;
  modality_weights_adjoint(1, &g.weight, &g.present, &grad_score, g.modalities());
  if (g.present && g.first()) sums[2 * M * S + g.m] += grad_score * g.log_odds;
  const A sharpness = g.real ? t.sharpness[g.m] : A(0);
  reliability_adjoint<A>(S, g.logit, g.stage, g.present ? grad_c : A(0), grad_score * sharpness, g.stages,
                         [&](int s, A to_logit, A to_stage) {
                           const bool inside = s < S;
                           const int i = g.m * S + s;
                           A to_raw(0);
                           if (g.present && inside) {
                             to_raw = to_logit * t.scale[i];
                             sums[i] -= to_raw * g.logit.raw[s];
                             sums[M * S + i] += to_logit;
                           }
                           if (g.real && inside)
                             static_cast<A*>(q.grad_reliability)[(g.row * M + g.m) * S + s] = to_raw;
                           const A all = g.modalities().sum(g.present ? to_stage : A(0));
                           if (q.grad_stage && g.real && g.m == 0 && inside)
                             static_cast<A*>(q.grad_stage)[g.row * S + s] = all;
                         });
}

template <class A>
__device__ __forceinline__ A given(const void* p, const Gate<A>& g, int modalities) {
  return p && g.real ? static_cast<const A*>(p)[g.row * modalities + g.m] : A(0);
}
template <class A>
__device__ __forceinline__ void write_gate(const ReliabilityFusionForward& q, const Gate<A>& g) {
  if (!g.real || !g.first()) return;
  static_cast<A*>(q.weights)[g.row * q.modalities + g.m] = g.weight;
  static_cast<A*>(q.confidence)[g.row * q.modalities + g.m] = g.confidence;
}

// --------------------------------------------------------------------------------------------------------- forward
template <class T, int G>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 4)
    reliability_fusion_kernel(ReliabilityFusionForward q, unsigned whole) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>, K = kForwardVectors;
  const Tables<A> tables = read_tables(q, shared_memory<A>());
  const int lane = int(threadIdx.x) % kWarp, l = lane % G, M = q.modalities, D = int(q.dim);
  const bool norm = q.norm_weight != nullptr;
  const A count = A(D);
  const int64_t step = int64_t(gridDim.x) * kForwardWarps * kRows;
  for (int64_t base = (int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp) * kRows; base < q.rows;
       base += step) {
    const Gate<A> gate(q, tables, base, q.rows);
    write_gate(q, gate);
#pragma unroll 1
    for (int sub = 0; sub < kRows; sub += kWarp / G) {
      const int r = sub + lane / G;
      const int64_t row = base + r;
      const bool inside = row < q.rows;
      A out[K][V];
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < V; ++i) out[k][i] = A(0);
#pragma unroll 1
      for (int m = 0; m < M; ++m) {
        const A w = __shfl_sync(kFull, gate.weight, gate.lane_of(r, m));
        const bool here = __shfl_sync(kFull, int(gate.present), gate.lane_of(r, m)) != 0;
        const T* from = static_cast<const T*>(q.values[m]) + row * q.row_stride[m];
        A x[K][V];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int d = (k * G + l) * V;
          load_whole(from + d, here && d < D, whole >> m & 1, x[k]);
        }
        A scale = w;  // w LayerNorm(x) = (x - mean) scale gamma + w beta; x - mean takes x's place
        if (norm) {
          A sum(0), drift(0), squares(0);
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < V; ++i) sum += x[k][i];
          A mean = lanes_sum<1, G>(sum) / count;
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < V; ++i) {
              x[k][i] = (k * G + l) * V < D ? x[k][i] - mean : A(0);
              if (kDrifts<T>) drift += x[k][i];
              squares = fma(x[k][i], x[k][i], squares);
            }
          A variance = lanes_sum<1, G>(squares) / count;
          if (kDrifts<T>) {  // the mean's own rounding
            drift = lanes_sum<1, G>(drift) / count;
            variance = max(fma(-drift, drift, variance), A(0));
            mean += drift;
#pragma unroll
            for (int k = 0; k < K; ++k)
#pragma unroll
              for (int i = 0; i < V; ++i) x[k][i] -= drift;
          }
          const A rstd = A(1) / sqrt(variance + A(q.eps));
          if (q.stats && inside && l == 0) {
            A* stats = static_cast<A*>(q.stats) + (row * M + m) * 2;
            stats[0] = here ? mean : A(0);
            stats[1] = here ? rstd : A(0);
          }
          scale = w * rstd;
        }
        if (!here) continue;  // no shuffle follows in this round
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int d = (k * G + l) * V;
          if (norm) {
            A gamma[V], beta[V];
            load_whole_numbers<V>(static_cast<const A*>(q.norm_weight) + m * D + d, d < D,
                                  whole & kAffineWhole, gamma);
            load_whole_numbers<V>(static_cast<const A*>(q.norm_bias) + m * D + d, d < D, whole & kAffineWhole,
                                  beta);
#pragma unroll
            for (int i = 0; i < V; ++i)
              out[k][i] = fma(w, beta[i], fma(x[k][i] * scale, gamma[i], out[k][i]));
          } else {
#pragma unroll
            for (int i = 0; i < V; ++i) out[k][i] = fma(w, x[k][i], out[k][i]);
          }
        }
      }
      if (!norm && q.stats && inside && l == 0)
        for (int i = 0; i < 2 * M; ++i) static_cast<A*>(q.stats)[row * M * 2 + i] = A(0);
      if (inside) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int d = (k * G + l) * V;
          store_whole(static_cast<T*>(q.fused) + row * D + d, d < D, whole & kFusedWhole, out[k]);
        }
      }
    }
  }
}

// Any D and alignment: a warp a row, its values read once for the mean, once for the variance, once to be mixed.
template <class T>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 4)
    reliability_fusion_wide_kernel(ReliabilityFusionForward q, unsigned whole) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>;
  const Tables<A> tables = read_tables(q, shared_memory<A>());
  const int lane = int(threadIdx.x) % kWarp, M = q.modalities;
  const int64_t D = q.dim;
  const bool norm = q.norm_weight != nullptr;
  const int64_t step = int64_t(gridDim.x) * kForwardWarps;
  for (int64_t row = int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp; row < q.rows; row += step) {
    const Gate<A> gate(q, tables, row, row + 1);
    write_gate(q, gate);
    A mean_of(0), scale_of(0);  // of modality m: lane m's
    for (int m = 0; m < M; ++m) {
      const A w = __shfl_sync(kFull, gate.weight, gate.lane_of(0, m));
      const bool here = __shfl_sync(kFull, int(gate.present), gate.lane_of(0, m)) != 0;
      const T* from = static_cast<const T*>(q.values[m]) + row * q.row_stride[m];
      A mean(0), rstd = A(1);
      if (norm) {
        A sum(0), drift(0), squares(0), x[V];
        for (int64_t d = lane * V; here && d < D; d += kWarp * V) {
          const int n = int(D - d < V ? D - d : V);
          load_vector(from + d, n, n == V && whole >> m & 1, x);
#pragma unroll
          for (int i = 0; i < V; ++i) sum += x[i];
        }
        mean = lanes_sum<1, kWarp>(sum) / A(D);
        for (int64_t d = lane * V; here && d < D; d += kWarp * V) {
          const int n = int(D - d < V ? D - d : V);
          load_vector(from + d, n, n == V && whole >> m & 1, x);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A c = i < n ? x[i] - mean : A(0);
            drift += c;
            squares = fma(c, c, squares);
          }
        }
        drift = lanes_sum<1, kWarp>(drift) / A(D);
        const A variance = max(fma(-drift, drift, lanes_sum<1, kWarp>(squares) / A(D)), A(0));
        mean += drift;
        rstd = A(1) / sqrt(variance + A(q.eps));
      }
      if (q.stats && lane == 0) {
        A* stats = static_cast<A*>(q.stats) + (row * M + m) * 2;
        stats[0] = norm && here ? mean : A(0);
        stats[1] = norm && here ? rstd : A(0);
      }
      if (lane == m) mean_of = mean, scale_of = w * rstd;
    }
    for (int64_t from = 0; from < D; from += kWarp * V) {
      const int64_t d = from + lane * V;
      const int n = int(D - d < V ? (D > d ? D - d : 0) : V);
      A out[V];
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = A(0);
      for (int m = 0; m < M; ++m) {
        const A w = __shfl_sync(kFull, gate.weight, gate.lane_of(0, m));
        const bool here = __shfl_sync(kFull, int(gate.present), gate.lane_of(0, m)) != 0;
        const A mean = __shfl_sync(kFull, mean_of, m), scale = __shfl_sync(kFull, scale_of, m);
        if (!here) continue;  // the same for the whole warp
        A x[V];
        load_vector(static_cast<const T*>(q.values[m]) + row * q.row_stride[m] + d, n,
                    n == V && whole >> m & 1, x);
        if (norm) {
          A gamma[V], beta[V];
          const bool fast = n == V && whole & kAffineWhole;
          load_numbers<V>(static_cast<const A*>(q.norm_weight) + m * D + d, n, fast, gamma);
          load_numbers<V>(static_cast<const A*>(q.norm_bias) + m * D + d, n, fast, beta);
#pragma unroll
          for (int i = 0; i < V; ++i) out[i] = fma(w, beta[i], fma((x[i] - mean) * scale, gamma[i], out[i]));
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) out[i] = fma(w, x[i], out[i]);
        }
      }
      store_vector(static_cast<T*>(q.fused) + row * D + d, n, n == V && whole & kFusedWhole, out);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- backward
// A row, one modality:  xhat = (x - mean) scale;  u = g gamma;  c0 = sum u xhat, c1 = sum u, c2 = sum g beta
//   d weight = c0 + c2;  d x = w scale (u - c1/D - xhat c0/D);  d gamma = w g xhat;  d beta = w g
// Without the norm: c0 = sum g x, d weight = c0, d x = w g.
template <class A>
struct RowAdjoint {  // what the columns need to know of a row and modality
  A mean, scale, weight;
  NormAdjoint<A> back;
};

// The gate's sums, one row of them for each of a warp's four, and at the end their total for the block's chunk.
__host__ __device__ __forceinline__ int sum_size(int modalities, int stages) {
  return modalities * (2 * stages + 1);
}

template <class A>
__device__ __forceinline__ A* gate_sums(A* sums, const Gate<A>& g, int size) {
  return sums + (int(threadIdx.x) / kGateLanes) * size;
}
template <class A>
__device__ __forceinline__ void clear(A* sums, int size) {
  for (int i = int(threadIdx.x); i < kBackwardWarps * kRows * size; i += kBackwardWarps * kWarp)
    sums[i] = A(0);
}
template <class A>
__device__ __forceinline__ void finish_gate(const A* sums, int size, double* out) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < size; i += kBackwardWarps * kWarp) {
    double total = 0;
    for (int k = 0; k < kBackwardWarps * kRows; ++k) total += double(sums[k * size + i]);
    out[i] = total;
  }
}

template <class T, int MM, int K>
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    reliability_fusion_gradient_kernel(ReliabilityFusionBackward q, unsigned whole, int64_t per) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>;
  const ReliabilityFusionForward& f = q.forward;
  const int M = f.modalities, S = f.stages, D = int(f.dim), size = sum_size(M, S);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const bool norm = f.norm_weight != nullptr;
  const int affine = norm ? 2 * M * D : 0;
  double* const total = shared_memory<double>();  // (2, M, D) of the block
  A* const sums = reinterpret_cast<A*>(total + affine);
  clear(sums, size);
  const Tables<A> tables = read_tables(f, sums + kBackwardWarps * kRows * size);
  A gamma_sum[MM][K][V], beta_sum[MM][K][V];
#pragma unroll
  for (int m = 0; m < MM; ++m)
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) gamma_sum[m][k][i] = beta_sum[m][k][i] = A(0);

  const int64_t begin = int64_t(blockIdx.x) * per, end = begin + per < f.rows ? begin + per : f.rows;
  for (int64_t base = begin + warp * kRows; base < end; base += kBackwardWarps * kRows) {
    const Gate<A> gate(f, tables, base, end);
    A grad_w = given(q.grad_weights, gate, M);
#pragma unroll 1
    for (int r = 0; r < kRows && base + r < end; ++r) {
      const int64_t row = base + r;
      A g[K][V];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int d = (k * kWarp + lane) * V;
        load_whole(static_cast<const T*>(q.grad_fused) + row * D + d, q.grad_fused && d < D,
                   whole & kFusedWhole, g[k]);
      }
#pragma unroll
      for (int m = 0; m < MM; ++m) {
        if (m >= M) continue;  // the same for all
        const A w = __shfl_sync(kFull, gate.weight, gate.lane_of(r, m));
        const bool here = __shfl_sync(kFull, int(gate.present), gate.lane_of(r, m)) != 0;
        A mean(0), scale(1);
        if (norm) {
          const A* stats = static_cast<const A*>(f.stats) + (row * M + m) * 2;
          mean = stats[0];
          scale = stats[1];
        }
        A xhat[K][V], u[K][V], c0(0), c1(0), c2(0);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int d = (k * kWarp + lane) * V;
          load_whole(static_cast<const T*>(f.values[m]) + row * f.row_stride[m] + d, here && d < D,
                     whole >> m & 1, xhat[k]);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int d = (k * kWarp + lane) * V;
          if (norm) {
            A gamma[V], beta[V];
            load_whole_numbers<V>(static_cast<const A*>(f.norm_weight) + m * D + d, d < D,
                                  whole & kAffineWhole, gamma);
            load_whole_numbers<V>(static_cast<const A*>(f.norm_bias) + m * D + d, d < D, whole & kAffineWhole,
                                  beta);
#pragma unroll
            for (int i = 0; i < V; ++i) {  // g is 0 past the end
              const A h = (xhat[k][i] - mean) * scale, wg = g[k][i] * w;
              xhat[k][i] = h;
              u[k][i] = g[k][i] * gamma[i];
              c1 += u[k][i];
              c0 = fma(u[k][i], h, c0);
              c2 = fma(g[k][i], beta[i], c2);
              gamma_sum[m][k][i] = fma(wg, h, gamma_sum[m][k][i]);
              beta_sum[m][k][i] += wg;
            }
          } else {
#pragma unroll
            for (int i = 0; i < V; ++i) {
              u[k][i] = g[k][i];
              c0 = fma(g[k][i], xhat[k][i], c0);
            }
          }
        }
        c0 = lanes_sum<1, kWarp>(c0);
        if (norm) c1 = lanes_sum<1, kWarp>(c1), c2 = lanes_sum<1, kWarp>(c2);
        if (here && gate.serves(r, m)) grad_w += c0 + c2;
        if (!q.grad_values[m]) continue;
        const NormAdjoint<A> back = norm_adjoint(w, scale, c1, norm ? c0 : A(0), A(D));
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int d = (k * kWarp + lane) * V;
          A y[V];
#pragma unroll
          for (int i = 0; i < V; ++i)
            y[i] = here ? fma(u[k][i], back.by_u, fma(xhat[k][i], back.by_xhat, back.constant)) : A(0);
          store_whole(static_cast<T*>(q.grad_values[m]) + row * D + d, d < D, whole >> (16 + m) & 1, y);
        }
      }
    }
    gate_backward(q, tables, gate, grad_w, given(q.grad_confidence, gate, M), gate_sums(sums, gate, size));
  }

  double* const out = q.workspace + int64_t(blockIdx.x) * (affine + size);
  if (norm) {
    for (int turn = 0; turn < kBackwardWarps; ++turn) {  // warps add up in order
      if (turn == warp) {
#pragma unroll
        for (int m = 0; m < MM; ++m)
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < V; ++i) {
              const int d = (k * kWarp + lane) * V + i;
              if (m >= M || d >= D) continue;
              double *a = total + m * D + d, *b = a + M * D;
              *a = (turn ? *a : 0.0) + double(gamma_sum[m][k][i]);
              *b = (turn ? *b : 0.0) + double(beta_sum[m][k][i]);
            }
      }
      __syncthreads();
    }
    for (int i = int(threadIdx.x); i < affine; i += kBackwardWarps * kWarp) out[i] = total[i];
  }
  finish_gate(sums, size, out + affine);
}

// Any M, D and alignment. A block takes 8 rows at a time: a warp a row for its dots, then a thread a vector of columns for all 8, adding
// its columns' sums to the chunk's in workspace.
template <class T>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2)
    reliability_fusion_wide_gradient_kernel(ReliabilityFusionBackward q, unsigned whole, int64_t per) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>;
  const ReliabilityFusionForward& f = q.forward;
  const int M = f.modalities, S = f.stages, size = sum_size(M, S);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t D = f.dim;
  const bool norm = f.norm_weight != nullptr;
  const int64_t affine = norm ? 2 * M * D : 0;
  double* const out = q.workspace + int64_t(blockIdx.x) * (affine + size);
  RowAdjoint<A>* const rows = shared_memory<RowAdjoint<A>>();  // (8 rows, M)
  A* const sums = reinterpret_cast<A*>(rows + kBackwardWarps * kMaxModalities);
  clear(sums, size);
  const Tables<A> tables = read_tables(f, sums + kBackwardWarps * kRows * size);
  const int64_t begin = int64_t(blockIdx.x) * per, end = begin + per < f.rows ? begin + per : f.rows;
  for (int64_t base = begin; base < end; base += kBackwardWarps) {
    const int64_t row = base + warp;
    if (row < end) {  // the same for a whole warp
      const Gate<A> gate(f, tables, row, row + 1);
      A grad_w = given(q.grad_weights, gate, M);
      for (int m = 0; m < M; ++m) {
        const A w = __shfl_sync(kFull, gate.weight, gate.lane_of(0, m));
        const bool here = __shfl_sync(kFull, int(gate.present), gate.lane_of(0, m)) != 0;
        A mean(0), scale(1), c0(0), c1(0), c2(0);
        if (norm) {
          const A* stats = static_cast<const A*>(f.stats) + (row * M + m) * 2;
          mean = stats[0];
          scale = stats[1];
        }
        if (here && q.grad_fused)
          for (int64_t d = lane * V; d < D; d += kWarp * V) {
            const int n = int(D - d < V ? D - d : V);
            A x[V], g[V];
            load_vector(static_cast<const T*>(f.values[m]) + row * f.row_stride[m] + d, n,
                        n == V && whole >> m & 1, x);
            load_vector(static_cast<const T*>(q.grad_fused) + row * D + d, n, n == V && whole & kFusedWhole,
                        g);
            if (norm) {
              A gamma[V], beta[V];
              const bool fast = n == V && whole & kAffineWhole;
              load_numbers<V>(static_cast<const A*>(f.norm_weight) + m * D + d, n, fast, gamma);
              load_numbers<V>(static_cast<const A*>(f.norm_bias) + m * D + d, n, fast, beta);
#pragma unroll
              for (int i = 0; i < V; ++i) {
                const A u = g[i] * gamma[i];
                c1 += u;
                c0 = fma(u, (x[i] - mean) * scale, c0);
                c2 = fma(g[i], beta[i], c2);
              }
            } else {
#pragma unroll
              for (int i = 0; i < V; ++i) c0 = fma(g[i], x[i], c0);
            }
          }
        c0 = lanes_sum<1, kWarp>(c0), c1 = lanes_sum<1, kWarp>(c1), c2 = lanes_sum<1, kWarp>(c2);
        if (here && gate.serves(0, m)) grad_w += c0 + c2;
        if (lane == 0)
          rows[warp * M + m] = {mean, scale, w,
                                norm_adjoint(here ? w : A(0), scale, c1, norm ? c0 : A(0), A(D))};
      }
      gate_backward(q, tables, gate, grad_w, given(q.grad_confidence, gate, M), gate_sums(sums, gate, size));
    }
    __syncthreads();
    const int live = int(end - base < kBackwardWarps ? end - base : kBackwardWarps);
    for (int64_t d = int64_t(threadIdx.x) * V; d < D; d += kBackwardWarps * kWarp * V) {
      const int n = int(D - d < V ? D - d : V);
      for (int m = 0; m < M; ++m) {
        A gamma[V], gamma_sum[V], beta_sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) gamma[i] = A(1), gamma_sum[i] = beta_sum[i] = A(0);
        if (norm)
          load_numbers<V>(static_cast<const A*>(f.norm_weight) + m * D + d, n, n == V && whole & kAffineWhole,
                          gamma);
        for (int r = 0; r < live; ++r) {
          const RowAdjoint<A> a = rows[r * M + m];
          const bool here = a.weight != A(0) || a.back.by_u != A(0);  // a weight of 0 has no gradient to give
          A x[V], g[V], y[V];
          load_vector(static_cast<const T*>(f.values[m]) + (base + r) * f.row_stride[m] + d, here ? n : 0,
                      here && n == V && whole >> m & 1, x);
          load_vector(static_cast<const T*>(q.grad_fused) + (base + r) * D + d, here && q.grad_fused ? n : 0,
                      here && q.grad_fused && n == V && whole & kFusedWhole, g);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A h = (x[i] - a.mean) * a.scale, wg = g[i] * a.weight;
            gamma_sum[i] = fma(wg, h, gamma_sum[i]);
            beta_sum[i] += wg;
            y[i] = here ? fma(g[i] * gamma[i], a.back.by_u, fma(h, a.back.by_xhat, a.back.constant)) : A(0);
          }
          if (q.grad_values[m])
            store_vector(static_cast<T*>(q.grad_values[m]) + (base + r) * D + d, n,
                         n == V && whole >> (16 + m) & 1, y);
        }
        if (norm) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (i >= n) continue;
            double *a = out + m * D + d + i, *b = a + M * D;
            *a = (base == begin ? 0.0 : *a) + double(gamma_sum[i]);
            *b = (base == begin ? 0.0 : *b) + double(beta_sum[i]);
          }
        }
      }
    }
    __syncthreads();
  }
  finish_gate(sums, size, out + affine);
}

// Parameter gradients: the chunks in a fixed order, 32 parameters a block.
constexpr int kColumns = 32, kSlices = 32;
template <class A>
__global__ void __launch_bounds__(kColumns* kSlices)
    reliability_fusion_parameter_kernel(ReliabilityFusionBackward q, int64_t chunks, int64_t count) {
  const int column = int(threadIdx.x) % kColumns, slice = int(threadIdx.x) / kColumns;
  const int64_t i = int64_t(blockIdx.x) * kColumns + column;
  double* shared = shared_memory<double>();
  double sum = 0;
  if (i < count)
    for (int64_t k = slice; k < chunks; k += kSlices) sum += q.workspace[k * count + i];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice || i >= count) return;
  for (int k = 1; k < kSlices; ++k) sum += shared[k * kColumns + column];
  static_cast<A*>(q.grad_params)[i] = A(sum);
}

// ------------------------------------------------------------------------------------------------------- launchers
Call call_of(const char* op, const ReliabilityFusionForward& q, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of %d x (%lld, %lld), %d stages, %s", op, q.modalities,
           (long long)q.rows, (long long)q.dim, q.stages, dtype_name(q.dtype));
  return call;
}

template <class T>
unsigned whole_bits(const ReliabilityFusionForward& q, const void* row_of_values) {
  const int64_t size = int64_t(sizeof(T)), affine = q.dim * int64_t(sizeof(ArithmeticOf<T>));
  unsigned bits = aligned(row_of_values, q.dim * size) ? kFusedWhole : 0;
  for (int m = 0; m < q.modalities; ++m) bits |= aligned(q.values[m], q.row_stride[m] * size) ? 1u << m : 0;
  if (aligned(q.norm_weight, affine) && aligned(q.norm_bias, affine)) bits |= kAffineWhole;
  return bits;
}

template <class T>
void forward_all(const ReliabilityFusionForward& q, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kHeld = kForwardVectors * kVector<T>;  // numbers of a row that a lane holds
  const unsigned whole = whole_bits<T>(q, q.fused);
  const size_t shared = size_t(table_size(q.modalities, q.stages)) * sizeof(A);
  const bool narrow = sizeof(T) < 8 && q.dim <= kWarp * kHeld && q.dim % kVector<T> == 0;
  const int64_t per = narrow ? kForwardWarps * kRows : kForwardWarps;
  const int64_t blocks = (q.rows + per - 1) / per;
  const dim3 grid(unsigned(blocks < kForwardBlocks ? blocks : kForwardBlocks));
  void (*kernel)(ReliabilityFusionForward, unsigned) = reliability_fusion_wide_kernel<T>;
  if constexpr (sizeof(T) < 8) {
    constexpr int kFew = 4 * int(sizeof(T));  // lanes for 256 columns
    if (narrow)
      kernel =
          q.dim <= kFew * kHeld ? reliability_fusion_kernel<T, kFew> : reliability_fusion_kernel<T, kWarp>;
  }
  launch(call, kernel, grid, kForwardWarps * kWarp, shared, q, whole);
}

template <class T>
void backward_all(const ReliabilityFusionBackward& q, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kHeld = kWarp * 8;  // columns of a warp's 16-byte vectors, or of its pairs of them
  const ReliabilityFusionForward& f = q.forward;
  const bool norm = f.norm_weight != nullptr;
  unsigned whole = whole_bits<T>(f, q.grad_fused);
  for (int m = 0; m < f.modalities; ++m)
    whole |= aligned(q.grad_values[m], f.dim * int64_t(sizeof(T))) ? 1u << (16 + m) : 0;
  const int64_t per = reliability_fusion_cuda_chunk_rows(f.rows), chunks = (f.rows + per - 1) / per;
  const int size = sum_size(f.modalities, f.stages);
  size_t shared = size_t(kBackwardWarps * kRows * size + table_size(f.modalities, f.stages)) * sizeof(A);
  void (*kernel)(ReliabilityFusionBackward, unsigned, int64_t) = nullptr;
  if constexpr (sizeof(T) < 8) {
    constexpr int K = 8 / kVector<T>;  // vectors a lane for 256 columns
    const bool narrow = f.dim % kVector<T> == 0;
    if (narrow && f.modalities <= 2 && f.dim <= kHeld) kernel = reliability_fusion_gradient_kernel<T, 2, K>;
    if constexpr (!std::is_same<T,
                                __half>::value) {  // float16 does with fewer kernels: each costs build time
      if (narrow && f.modalities <= 2 && f.dim > kHeld && f.dim <= 2 * kHeld)
        kernel = reliability_fusion_gradient_kernel<T, 2, 2 * K>;
      if (narrow && f.modalities > 2 && f.modalities <= 4 && f.dim <= kHeld)
        kernel = reliability_fusion_gradient_kernel<T, 4, K>;
    }
  }
  if (kernel) {
    shared += norm ? size_t(2 * f.modalities * f.dim) * sizeof(double) : 0;
  } else {
    kernel = reliability_fusion_wide_gradient_kernel<T>;
    shared += kBackwardWarps * kMaxModalities * sizeof(RowAdjoint<A>);
  }
  launch(call, kernel, dim3(grid_x(call, chunks)), kBackwardWarps * kWarp, shared, q, whole, per);
  const int64_t count = reliability_fusion_param_count(f.dim, f.modalities, f.stages, norm);
  launch(call, reliability_fusion_parameter_kernel<A>, dim3(grid_x(call, (count + kColumns - 1) / kColumns)),
         kColumns * kSlices, kColumns * kSlices * sizeof(double), q, chunks, count);
}

}  // namespace

#define SAGE_BY_TYPE(dtype, all, q)       \
  switch (dtype) {                        \
    case DType::f32:                      \
      return all<float>(q, call);         \
    case DType::f64:                      \
      return all<double>(q, call);        \
    case DType::f16:                      \
      return all<__half>(q, call);        \
    case DType::bf16:                     \
      return all<__nv_bfloat16>(q, call); \
  }

void reliability_fusion_forward(const ReliabilityFusionForward& q, Exec exec) {
  if (!q.rows) return;
  const Call call = call_of("reliability_fusion", q, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(q.dtype, forward_all, q)
}

void reliability_fusion_backward(const ReliabilityFusionBackward& q, Exec exec) {
  const ReliabilityFusionForward& f = q.forward;
  if (!f.rows) return;
  const Call call = call_of("reliability_fusion backward", f, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(f.dtype, backward_all, q)
}

}  // namespace sage::cuda
