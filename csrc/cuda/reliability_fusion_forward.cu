// reliability_fusion on the GPU, forward.
//
// Bytes: reads M D and writes D values a row; the gate adds 4 (M S + S + 4 M) bytes or so. The floor is the time to move
// those; every value is read once, absent modalities not at all.
//
// A warp takes four rows at a time: their gates together (gate.cuh), then the features, 8 (halves), 16 or 32 lanes a row
// (more rows side by side, fewer shuffles a row). A row of one modality stands in registers, LayerNorm is two passes over
// them, M vectors are mixed into registers, one store. Rows too wide for registers, or no multiple of 16 bytes, take the
// `wide` kernel, which reads values again from cache. Which kernel and which lane serves what is decided by dtype, M and D
// alone: a row's bits depend on nothing else.
#include "gate.cuh"

namespace sage::cuda {
namespace {

constexpr int kForwardWarps = 4;
constexpr int kForwardVectors = 4;           // vectors of a row that a lane holds
constexpr int64_t kForwardBlocks = 1 << 16;  // more rows come round again

// Whether values can lie so far from zero that their mean's rounding shows beside their spread.
template <class T>
constexpr bool kDrifts = sizeof(T) >= 4;

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

template <class T>
void forward_all(const ReliabilityFusionForward& q, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kHeld = kForwardVectors * kVector<T>;  // numbers of a row that a lane holds
  const unsigned whole = whole_bits<T>(q, q.fused);
  const size_t shared = size_t(gate_size(q.modalities, q.stages)) * sizeof(A);
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

}  // namespace

void reliability_fusion_forward(const ReliabilityFusionForward& q, Exec exec) {
  if (!q.rows) return;
  const Call call = call_of("reliability_fusion", q, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(q.dtype, forward_all, q)
}

}  // namespace sage::cuda
