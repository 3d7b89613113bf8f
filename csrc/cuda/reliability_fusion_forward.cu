// reliability_fusion on the GPU, forward.
//
// Bytes: reads M D and writes D values a row; the gate adds 4 (M S + S + 4 M) bytes or so. The floor is the time to
// move those; every value is read once, absent modalities not at all.
//
// A warp takes four rows at a time (one or two where there are few rows): their gates together (gate.cuh), then the
// features, 8 (halves), 16 or 32 lanes a row, so that more rows lie side by side and take fewer shuffles each. A row of
// one modality stands in registers, LayerNorm is two passes over them, M vectors are mixed into registers, one store.
// While a modality is worked on, the next one's loads are under way, those of the next four rows' first one during the
// gate: a lane has 64 to 128 bytes in flight at any time, and enough warps fit a multiprocessor to cover memory's latency
// (64 KB and more). Rows too wide for registers, or no multiple of 16 bytes, take the `wide` kernel, which reads values
// again from cache. Which lane serves what is decided by dtype, M and D alone: a row's bits depend on nothing else.
#include "gate.cuh"

namespace sage::cuda {
namespace {

constexpr int kForwardWarps = 4;
constexpr int kForwardVectors = 4;  // the most vectors of a row that a lane holds
// Blocks that a multiprocessor is to have room for: what registers allow.
template <class T>
constexpr int kForwardResident = sizeof(T) == 4 ? 4 : 3;

// Whether values can lie so far from zero that their mean's rounding shows beside their spread.
template <class T>
constexpr bool kDrifts = sizeof(T) >= 4;

// One modality of the rows that lie side by side in a warp, the first of them in `slot`; rows in order, modality after
// modality.
struct Step {
  int slot, modality;
  __device__ __forceinline__ Step after(int modalities, int side) const {
    return modality + 1 < modalities ? Step{slot, modality + 1} : Step{slot + side, 0};
  }
};

// A row is shared by RowLanes lanes, each of which holds K vectors of it. Fast: all tensors may be read and written 16
// bytes at a time. Exact: D fills the lanes' vectors. `take`: rows of a warp at a time.
template <class T, int RowLanes, int K, bool Fast, bool Exact>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kForwardResident<T>)
    reliability_fusion_kernel(ReliabilityFusionForward params, int take) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>, kSide = kWarp / RowLanes;
  const int lane = int(threadIdx.x) % kWarp, row_lane = lane % RowLanes, M = params.modalities,
            D = Exact ? RowLanes * K * V : int(params.dim);
  const bool norm = params.norm_weight != nullptr;
  const A count = A(D);
  const auto column_of = [&](int k) { return (k * RowLanes + row_lane) * V; };
  const auto within = [&](int k) { return Exact || column_of(k) < D; };
  const auto end_of = [&](int64_t base) { return base + take < params.rows ? base + take : params.rows; };
  // Bit lane_of(slot, m) of `there`: modality m of that row is present.
  const auto ask = [&](uint4(&bits)[K], int64_t base, unsigned there, const GateLane& own, Step step) {
    const int slot = step.slot + lane / RowLanes, m = step.modality;
    const bool wanted = there >> own.lane_of(slot, m) & 1;
    const T* x = static_cast<const T*>(params.values[m]) + (base + slot) * params.row_stride[m];
#pragma unroll
    for (int k = 0; k < K; ++k) bits[k] = load_bits(x + column_of(k), wanted && within(k), Fast);
  };

  int64_t base = (int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp) * take;
  const int64_t stride = int64_t(gridDim.x) * kForwardWarps * take;
  GateLane own(params, base, end_of(base));
  unsigned there = __ballot_sync(kFull, own.present);
  uint4 even[K], odd[K];  // of every other step
  ask(even, base, there, own, Step{0, 0});
  const Tables<A> tables = read_tables(params, shared_memory<A>());
  while (base < params.rows) {
    const GateLane next(params, base + stride, end_of(base + stride));
    const Gate<A> gate(params, tables, own);
    write_gate(params, gate);
    A out_vals[K][V];
    const auto work = [&](const uint4(&bits)[K], Step step) {
      const int slot = step.slot + lane / RowLanes, m = step.modality;
      const int64_t row = base + slot;
      const bool inside = row < params.rows, present = there >> own.lane_of(slot, m) & 1;
      const A weight = __shfl_sync(kFull, gate.weight, gate.lane_of(slot, m));
      A x_vals[K][V];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        widen_bits<T>(bits[k], x_vals[k]);
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (m == 0) out_vals[k][i] = A(0);
      }
      A mean(0),
          rstd(1);  // weight LayerNorm(x) = (x - mean) scale gamma + weight beta; x - mean takes x's place
      if (norm) {
        A sum(0), drift(0), squares(0);
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int i = 0; i < V; ++i) sum += x_vals[k][i];
        mean = lanes_sum<1, RowLanes>(sum) / count;
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int i = 0; i < V; ++i) {
            x_vals[k][i] = within(k) ? x_vals[k][i] - mean : A(0);
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
        rstd = A(1) / sqrt(variance + A(params.eps));
      }
      if (params.stats && inside && row_lane == 0) {
        A* stats = static_cast<A*>(params.stats) + (row * M + m) * 2;
        stats[0] = present ? mean : A(0);
        stats[1] = norm && present ? rstd : A(0);
      }
      if (present) {
        const A scale = weight * rstd;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (norm) {
            A gamma[V], beta[V];
            const int64_t at = int64_t(m) * D + column_of(k);
            load_whole<A, V>(static_cast<const A*>(params.norm_weight) + at, within(k), Fast, gamma);
            load_whole<A, V>(static_cast<const A*>(params.norm_bias) + at, within(k), Fast, beta);
#pragma unroll
            for (int i = 0; i < V; ++i)
              out_vals[k][i] = fma(weight, beta[i], fma(x_vals[k][i] * scale, gamma[i], out_vals[k][i]));
          } else {
#pragma unroll
            for (int i = 0; i < V; ++i) out_vals[k][i] = fma(weight, x_vals[k][i], out_vals[k][i]);
          }
        }
      }
      if (m == M - 1 && inside) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          store_whole(static_cast<T*>(params.fused) + row * D + column_of(k), within(k), Fast, out_vals[k]);
      }
    };
#pragma unroll 1
    for (Step first = {0, 0}; first.slot < take;) {
      const Step second = first.after(M, kSide), third = second.after(M, kSide);
      const bool two = second.slot < take;  // the same for all lanes, as every test of a step
      if (two) ask(odd, base, there, own, second);
      work(even, first);
      if (two && third.slot < take)
        ask(even, base, there, own, third);
      else
        ask(even, base + stride, __ballot_sync(kFull, next.present), next, Step{0, 0});
      if (two) work(odd, second);
      first = two ? third : second;
    }
    base += stride;
    own = next;
    there = __ballot_sync(kFull, own.present);
  }
}

// Any D and alignment: a warp a row, its values read once for the mean, once for the variance, once to be mixed.
constexpr int kWideResident = 4;
template <class T>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kWideResident)
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
    const Gate<A> gate(params, tables, GateLane(params, row, row + 1));
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

template <class T, int RowLanes, int K, bool Fast, bool Exact>
void launch_held(const ReliabilityFusionForward& params, size_t shared, const Call& call) {
  constexpr int kSide = kWarp / RowLanes;
  const int64_t warps = int64_t(multiprocessors(call)) * kForwardResident<T> * kForwardWarps;
  int take = kRows;  // fewer where that leaves warps of the device without rows: same lanes, same bits
  while (take > kSide && params.rows < take * warps) take /= 2;
  const int64_t per = kForwardWarps * take, blocks = (params.rows + per - 1) / per;
  const int64_t resident = warps / kForwardWarps;  // rows beyond come round again
  launch(call, reliability_fusion_kernel<T, RowLanes, K, Fast, Exact>,
         dim3(unsigned(blocks < resident ? blocks : resident)), kForwardWarps * kWarp, shared, params, take);
}

template <class T, int RowLanes>
void forward_held(const ReliabilityFusionForward& params, size_t shared, bool fast, const Call& call) {
  constexpr int K = kForwardVectors, kRow = RowLanes * kVector<T>;
  if (!fast) return launch_held<T, RowLanes, K, false, false>(params, shared, call);
  if (params.dim == kRow * K) return launch_held<T, RowLanes, K, true, true>(params, shared, call);
  if constexpr (RowLanes < kWarp)  // half a row, the same lanes
    if (params.dim == kRow * K / 2) return launch_held<T, RowLanes, K / 2, true, true>(params, shared, call);
  launch_held<T, RowLanes, K, true, false>(params, shared, call);
}

template <class T>
void forward_all(const ReliabilityFusionForward& params, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kHeld = kForwardVectors * kVector<T>;  // numbers of a row that a lane holds
  const unsigned fast_bits = fast_bits_of<T>(params, params.fused);
  const size_t shared = size_t(gate_size(params.modalities, params.stages)) * sizeof(A);
  if constexpr (sizeof(T) < 8) {
    constexpr int kFew = 4 * int(sizeof(T));  // lanes for 256 columns
    const bool fast = all_fast(fast_bits, params.modalities);
    if (params.dim % kVector<T> == 0 && params.dim <= kFew * kHeld)
      return forward_held<T, kFew>(params, shared, fast, call);
    if (params.dim % kVector<T> == 0 && params.dim <= kWarp * kHeld)
      return forward_held<T, kWarp>(params, shared, fast, call);
  }
  const int64_t blocks = (params.rows + kForwardWarps - 1) / kForwardWarps;
  const int64_t resident = int64_t(multiprocessors(call)) * kWideResident;
  launch(call, reliability_fusion_wide_kernel<T>, dim3(unsigned(blocks < resident ? blocks : resident)),
         kForwardWarps * kWarp, shared, params, fast_bits);
}

}  // namespace

void reliability_fusion_forward(const ReliabilityFusionForward& params, Exec exec) {
  if (!params.rows) return;
  const Call call = call_of("reliability_fusion", params, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(params.dtype, forward_all, params)
}

}  // namespace sage::cuda
