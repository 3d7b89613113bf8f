// reliability_fusion on the GPU, forward.
//
// Bytes: reads M D and writes D values a row; the gate adds 4 (M S + S + 4 M) bytes or so. The floor is the time to
// move those; every value is read once, absent modalities not at all.
//
// A warp takes four rows at a time: their gates together (gate.cuh), then the features, 8 (halves), 16 or 32 lanes a
// row (more rows side by side, fewer shuffles a row). A row of one modality stands in registers, LayerNorm is two
// passes over them, M vectors are mixed into registers, one store. Rows too wide for registers, or no multiple of 16
// bytes, take the `wide` kernel, which reads values again from cache. Which kernel and which lane serves what is
// decided by dtype, M and D alone: a row's bits depend on nothing else.
#include "gate.cuh"

namespace sage::cuda {
namespace {

constexpr int kForwardWarps = 4;
constexpr int kForwardVectors = 4;           // vectors of a row that a lane holds
constexpr int64_t kForwardBlocks = 1 << 16;  // more rows come round again

// Whether values can lie so far from zero that their mean's rounding shows beside their spread.
template <class T>
constexpr bool kDrifts = sizeof(T) >= 4;

// A row is shared by RowLanes lanes, each of which holds K vectors of it.
template <class T, int RowLanes>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 4)
    reliability_fusion_kernel(ReliabilityFusionForward params, unsigned fast_bits) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>, K = kForwardVectors;
  const Tables<A> tables = read_tables(params, shared_memory<A>());
  const int lane = int(threadIdx.x) % kWarp, row_lane = lane % RowLanes, M = params.modalities,
            D = int(params.dim);
  const bool norm = params.norm_weight != nullptr;
  const A count = A(D);
  const int64_t step = int64_t(gridDim.x) * kForwardWarps * kRows;
  for (int64_t base = (int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp) * kRows; base < params.rows;
       base += step) {
    const Gate<A> gate(params, tables, base, params.rows);
    write_gate(params, gate);
#pragma unroll 1
    for (int sub = 0; sub < kRows; sub += kWarp / RowLanes) {
      const int slot = sub + lane / RowLanes;
      const int64_t row = base + slot;
      const bool inside = row < params.rows;
      A out_vals[K][V];
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < V; ++i) out_vals[k][i] = A(0);
#pragma unroll 1
      for (int m = 0; m < M; ++m) {
        const A weight = __shfl_sync(kFull, gate.weight, gate.lane_of(slot, m));
        const bool present = __shfl_sync(kFull, int(gate.present), gate.lane_of(slot, m)) != 0;
        const T* x_row = static_cast<const T*>(params.values[m]) + row * params.row_stride[m];
        A x_vals[K][V];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int column = (k * RowLanes + row_lane) * V;
          load_whole(x_row + column, present && column < D, fast_bits >> m & 1, x_vals[k]);
        }
        A scale =
            weight;  // weight LayerNorm(x) = (x - mean) scale gamma + weight beta; x - mean takes x's place
        if (norm) {
          A sum(0), drift(0), squares(0);
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < V; ++i) sum += x_vals[k][i];
          A mean = lanes_sum<1, RowLanes>(sum) / count;
#pragma unroll
          for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < V; ++i) {
              x_vals[k][i] = (k * RowLanes + row_lane) * V < D ? x_vals[k][i] - mean : A(0);
              if (kDrifts<T>) drift += x_vals[k][i];
              squares = fma(x_vals[k][i], x_vals[k][i], squares);
            }
          A variance = lanes_sum<1, RowLanes>(squares) / count;
          if (kDrifts<T>) {  // the mean's own rounding
            drift = lanes_sum<1, RowLanes>(drift) / count;
            variance = max(fma(-drift, drift, variance), A(0));
            mean += drift;
#pragma unroll
            for (int k = 0; k < K; ++k)
#pragma unroll
              for (int i = 0; i < V; ++i) x_vals[k][i] -= drift;
          }
          const A rstd = A(1) / sqrt(variance + A(params.eps));
          if (params.stats && inside && row_lane == 0) {
            A* stats = static_cast<A*>(params.stats) + (row * M + m) * 2;
            stats[0] = present ? mean : A(0);
            stats[1] = present ? rstd : A(0);
          }
          scale = weight * rstd;
        }
        if (!present) continue;  // no shuffle follows in this round
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int column = (k * RowLanes + row_lane) * V;
          if (norm) {
            A gamma[V], beta[V];
            load_whole<A, V>(static_cast<const A*>(params.norm_weight) + m * D + column, column < D,
                             fast_bits & kAffineFast, gamma);
            load_whole<A, V>(static_cast<const A*>(params.norm_bias) + m * D + column, column < D,
                             fast_bits & kAffineFast, beta);
#pragma unroll
            for (int i = 0; i < V; ++i)
              out_vals[k][i] = fma(weight, beta[i], fma(x_vals[k][i] * scale, gamma[i], out_vals[k][i]));
          } else {
#pragma unroll
            for (int i = 0; i < V; ++i) out_vals[k][i] = fma(weight, x_vals[k][i], out_vals[k][i]);
          }
        }
      }
      if (!norm && params.stats && inside && row_lane == 0)
        for (int i = 0; i < 2 * M; ++i) static_cast<A*>(params.stats)[row * M * 2 + i] = A(0);
      if (inside) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int column = (k * RowLanes + row_lane) * V;
          store_whole(static_cast<T*>(params.fused) + row * D + column, column < D, fast_bits & kFusedFast,
                      out_vals[k]);
        }
      }
    }
  }
}

// Any D and alignment: a warp a row, its values read once for the mean, once for the variance, once to be mixed.
template <class T>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 4)
    reliability_fusion_wide_kernel(ReliabilityFusionForward params, unsigned fast_bits) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>;
  const Tables<A> tables = read_tables(params, shared_memory<A>());
  const int lane = int(threadIdx.x) % kWarp, M = params.modalities;
  const int64_t D = params.dim;
  const bool norm = params.norm_weight != nullptr;
  const int64_t step = int64_t(gridDim.x) * kForwardWarps;
  for (int64_t row = int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp; row < params.rows;
       row += step) {
    const Gate<A> gate(params, tables, row, row + 1);
    write_gate(params, gate);
    A mean_of(0), scale_of(0);  // of modality m: lane m's
    for (int m = 0; m < M; ++m) {
      const A weight = __shfl_sync(kFull, gate.weight, gate.lane_of(0, m));
      const bool present = __shfl_sync(kFull, int(gate.present), gate.lane_of(0, m)) != 0;
      const T* x_row = static_cast<const T*>(params.values[m]) + row * params.row_stride[m];
      A mean(0), rstd = A(1);
      if (norm) {
        A sum(0), drift(0), squares(0), x_vals[V];
        for (int64_t column = lane * V; present && column < D; column += kWarp * V) {
          const int n = int(D - column < V ? D - column : V);
          load_vector(x_row + column, n, n == V && fast_bits >> m & 1, x_vals);
#pragma unroll
          for (int i = 0; i < V; ++i) sum += x_vals[i];
        }
        mean = lanes_sum<1, kWarp>(sum) / A(D);
        for (int64_t column = lane * V; present && column < D; column += kWarp * V) {
          const int n = int(D - column < V ? D - column : V);
          load_vector(x_row + column, n, n == V && fast_bits >> m & 1, x_vals);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A c = i < n ? x_vals[i] - mean : A(0);
            drift += c;
            squares = fma(c, c, squares);
          }
        }
        drift = lanes_sum<1, kWarp>(drift) / A(D);
        const A variance = max(fma(-drift, drift, lanes_sum<1, kWarp>(squares) / A(D)), A(0));
        mean += drift;
        rstd = A(1) / sqrt(variance + A(params.eps));
      }
      if (params.stats && lane == 0) {
        A* stats = static_cast<A*>(params.stats) + (row * M + m) * 2;
        stats[0] = norm && present ? mean : A(0);
        stats[1] = norm && present ? rstd : A(0);
      }
      if (lane == m) mean_of = mean, scale_of = weight * rstd;
    }
    for (int64_t first = 0; first < D; first += kWarp * V) {
      const int64_t column = first + lane * V;
      const int n = int(D - column < V ? (D > column ? D - column : 0) : V);
      A out_vals[V];
#pragma unroll
      for (int i = 0; i < V; ++i) out_vals[i] = A(0);
      for (int m = 0; m < M; ++m) {
        const A weight = __shfl_sync(kFull, gate.weight, gate.lane_of(0, m));
        const bool present = __shfl_sync(kFull, int(gate.present), gate.lane_of(0, m)) != 0;
        const A mean = __shfl_sync(kFull, mean_of, m), scale = __shfl_sync(kFull, scale_of, m);
        if (!present) continue;  // the same for the whole warp
        A x_vals[V];
        load_vector(static_cast<const T*>(params.values[m]) + row * params.row_stride[m] + column, n,
                    n == V && fast_bits >> m & 1, x_vals);
        if (norm) {
          A gamma[V], beta[V];
          const bool fast = n == V && fast_bits & kAffineFast;
          load_numbers<V>(static_cast<const A*>(params.norm_weight) + m * D + column, n, fast, gamma);
          load_numbers<V>(static_cast<const A*>(params.norm_bias) + m * D + column, n, fast, beta);
#pragma unroll
          for (int i = 0; i < V; ++i)
            out_vals[i] = fma(weight, beta[i], fma((x_vals[i] - mean) * scale, gamma[i], out_vals[i]));
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) out_vals[i] = fma(weight, x_vals[i], out_vals[i]);
        }
      }
      store_vector(static_cast<T*>(params.fused) + row * D + column, n, n == V && fast_bits & kFusedFast,
                   out_vals);
    }
  }
}

template <class T>
void forward_all(const ReliabilityFusionForward& params, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kHeld = kForwardVectors * kVector<T>;  // numbers of a row that a lane holds
  const unsigned fast_bits = fast_bits_of<T>(params, params.fused);
  const size_t shared = size_t(gate_size(params.modalities, params.stages)) * sizeof(A);
  const bool narrow = sizeof(T) < 8 && params.dim <= kWarp * kHeld && params.dim % kVector<T> == 0;
  const int64_t per = narrow ? kForwardWarps * kRows : kForwardWarps;
  const int64_t blocks = (params.rows + per - 1) / per;
  const dim3 grid(unsigned(blocks < kForwardBlocks ? blocks : kForwardBlocks));
  void (*kernel)(ReliabilityFusionForward, unsigned) = reliability_fusion_wide_kernel<T>;
  if constexpr (sizeof(T) < 8) {
    constexpr int kFew = 4 * int(sizeof(T));  // lanes for 256 columns
    if (narrow)
      kernel = params.dim <= kFew * kHeld ? reliability_fusion_kernel<T, kFew>
                                          : reliability_fusion_kernel<T, kWarp>;
  }
  launch(call, kernel, grid, kForwardWarps * kWarp, shared, params, fast_bits);
}

}  // namespace

void reliability_fusion_forward(const ReliabilityFusionForward& params, Exec exec) {
  if (!params.rows) return;
  const Call call = call_of("reliability_fusion", params, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(params.dtype, forward_all, params)
}

}  // namespace sage::cuda
