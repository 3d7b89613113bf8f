// reliability_fusion on the GPU, backward.
//
// Bytes: reads (M + 1) D and writes M D values a row; the gate adds 8 (M S + S + 4 M) bytes or so. The floor is the
// time to move those.
//
// A warp takes four rows at a time: their gates together (gate.cuh), then the features, 32 lanes a row, so that a
// lane owns D / 32 columns and keeps their sums for norm_weight and norm_bias in registers over all of its rows. The
// rows of a block are a chunk, whose sums go to workspace in double, and a second launch adds the chunks in order.
// Rows too wide for registers, or no multiple of 16 bytes, take the `wide` kernel, which reads values again from
// cache. Which kernel and which lane serves what is decided by dtype, M and D alone: a row's bits depend on nothing
// else.
#include <type_traits>

#include "gate.cuh"

namespace sage::cuda {
namespace {

constexpr int kBackwardWarps = 4;  // of a block: three or four blocks fit a multiprocessor's registers

// With g the gradient of fused, a row and one of its modalities give
//   xhat = (x - mean) scale,  u = g gamma,  sum_u_xhat and sum_u over the row,  sum_grad_beta = sum g beta
//   d weight = sum_u_xhat + sum_grad_beta,  d x by norm_adjoint,  d gamma = weight g xhat,  d beta = weight g
// Without the norm xhat is x and u is g: d weight = sum_u_xhat, d x = weight g.
template <class A>
struct RowAdjoint {  // what the columns need to know of a row and modality
  A mean, scale, weight;
  NormAdjoint<A> back;
};

// The gradients of the gate's parameters are summed in shared memory, `size` numbers for each of the four rows that
// each of the block's warps has in hand: gate_sums() is where this lane's row has them, clear() sets all to 0, and
// finish_gate() adds them up for the chunk.
template <class A>
__device__ __forceinline__ A* gate_sums(A* sums, const Gate<A>& gate, int size) {
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

// What a lane needs of one row, as it lies in memory.
template <int Modalities, int Vectors>
struct HeldRow {
  uint4 grad[Vectors], x[Modalities][Vectors];
  float mean[Modalities], scale[Modalities];
};

// Rows of at most Modalities modalities, of which a lane holds Vectors vectors of 16 bytes. Fast: all tensors may be read
// and written 16 bytes at a time. Exact: D fills the lanes' vectors. A row's loads are under way while the row before it
// is worked on (halves), or go out together (float32, which has no registers for two rows).
template <class T, int Modalities, int Vectors, bool Fast, bool Exact>
__global__ void __launch_bounds__(kBackwardWarps* kWarp)
    reliability_fusion_gradient_kernel(ReliabilityFusionBackward params, int64_t chunk_rows) {
  using A = float;
  using Row = HeldRow<Modalities, Vectors>;
  constexpr int V = kVector<T>;
  constexpr bool kAhead = sizeof(T) == 2;
  const ReliabilityFusionForward& forward = params.forward;
  const int M = forward.modalities, S = forward.stages, D = Exact ? kWarp * Vectors * V : int(forward.dim),
            size = gate_size(M, S);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const bool norm = forward.norm_weight != nullptr;
  const int affine = norm ? 2 * M * D : 0;
  double* const total = shared_memory<double>();  // (2, M, D) of the block
  A* const sums = reinterpret_cast<A*>(total + affine);
  const auto column_of = [&](int k) { return (k * kWarp + lane) * V; };
  const auto within = [&](int k) { return Exact || column_of(k) < D; };
  const int64_t begin = int64_t(blockIdx.x) * chunk_rows,
                end = begin + chunk_rows < forward.rows ? begin + chunk_rows : forward.rows;
  GateLane own(forward, begin + warp * kRows, end);
  // Bit lane_of(slot, m) of `there`: modality m of the row is present.
  const auto ask = [&](Row& to, int64_t base, int slot, unsigned there) {
    const int64_t row = base + slot;
    if (row >= end) return;  // the same for all lanes
#pragma unroll
    for (int k = 0; k < Vectors; ++k)
      to.grad[k] = load_bits(static_cast<const T*>(params.grad_fused) + row * D + column_of(k),
                             params.grad_fused && within(k), Fast);
#pragma unroll
    for (int m = 0; m < Modalities; ++m) {
      if (m >= M) continue;
      const bool wanted = there >> own.lane_of(slot, m) & 1;
      const T* x = static_cast<const T*>(forward.values[m]) + row * forward.row_stride[m];
#pragma unroll
      for (int k = 0; k < Vectors; ++k) to.x[m][k] = load_bits(x + column_of(k), wanted && within(k), Fast);
      to.mean[m] = norm ? static_cast<const A*>(forward.stats)[(row * M + m) * 2] : A(0);
      to.scale[m] = norm ? static_cast<const A*>(forward.stats)[(row * M + m) * 2 + 1] : A(1);
    }
  };

  int64_t base = begin + warp * kRows;
  unsigned there = __ballot_sync(kFull, own.present);
  Row even = {}, odd = {};
  ask(even, base, 0, there);
  clear(sums, size);
  const Tables<A> tables = read_tables(forward, sums + kBackwardWarps * kRows * size);
  A gamma_sum[Modalities][Vectors][V], beta_sum[Modalities][Vectors][V];
#pragma unroll
  for (int m = 0; m < Modalities; ++m)
#pragma unroll
    for (int k = 0; k < Vectors; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) gamma_sum[m][k][i] = beta_sum[m][k][i] = A(0);

  while (base < end) {
    const int64_t then = base + kBackwardWarps * kRows;
    const GateLane after(forward, then, end);
    const Gate<A> gate(forward, tables, own);
    A grad_weight = given(params.grad_weights, gate, M);
    const auto work = [&](const Row& now, int slot) {
      const int64_t row = base + slot;
      if (row >= end) return;  // the same for all lanes
#pragma unroll
      for (int m = 0; m < Modalities; ++m) {
        if (m >= M) continue;  // the same for all lanes
        const A weight = __shfl_sync(kFull, gate.weight, gate.lane_of(slot, m));
        const bool present = __shfl_sync(kFull, int(gate.present), gate.lane_of(slot, m)) != 0;
        const A mean = now.mean[m], scale = now.scale[m];
        A xhat[Vectors][V], u[Vectors][V], sum_u_xhat(0), sum_u(0), sum_grad_beta(0);
#pragma unroll
        for (int k = 0; k < Vectors; ++k) {
          A grad_vals[V];
          widen_bits<T>(now.grad[k], grad_vals);
          widen_bits<T>(now.x[m][k], xhat[k]);
          if (norm) {
            A gamma[V], beta[V];
            const int64_t at = int64_t(m) * D + column_of(k);
            load_whole<A, V>(static_cast<const A*>(forward.norm_weight) + at, within(k), Fast, gamma);
            load_whole<A, V>(static_cast<const A*>(forward.norm_bias) + at, within(k), Fast, beta);
#pragma unroll
            for (int i = 0; i < V; ++i) {  // grad_vals are 0 past the end
              const A xhat_val = (xhat[k][i] - mean) * scale, weighted = grad_vals[i] * weight;
              xhat[k][i] = xhat_val;
              u[k][i] = grad_vals[i] * gamma[i];
              sum_u += u[k][i];
              sum_u_xhat = fma(u[k][i], xhat_val, sum_u_xhat);
              sum_grad_beta = fma(grad_vals[i], beta[i], sum_grad_beta);
              gamma_sum[m][k][i] = fma(weighted, xhat_val, gamma_sum[m][k][i]);
              beta_sum[m][k][i] += weighted;
            }
          } else {
#pragma unroll
            for (int i = 0; i < V; ++i) {
              u[k][i] = grad_vals[i];
              sum_u_xhat = fma(grad_vals[i], xhat[k][i], sum_u_xhat);
            }
          }
        }
        sum_u_xhat = lanes_sum<1, kWarp>(sum_u_xhat);
        if (norm) sum_u = lanes_sum<1, kWarp>(sum_u), sum_grad_beta = lanes_sum<1, kWarp>(sum_grad_beta);
        if (present && gate.serves(slot, m)) grad_weight += sum_u_xhat + sum_grad_beta;
        if (!params.grad_values[m]) continue;
        const NormAdjoint<A> back = norm_adjoint(weight, scale, sum_u, norm ? sum_u_xhat : A(0), A(D));
#pragma unroll
        for (int k = 0; k < Vectors; ++k) {
          A out_vals[V];
#pragma unroll
          for (int i = 0; i < V; ++i)
            out_vals[i] =
                present ? fma(u[k][i], back.by_u, fma(xhat[k][i], back.by_xhat, back.constant)) : A(0);
          store_whole(static_cast<T*>(params.grad_values[m]) + row * D + column_of(k), within(k), Fast,
                      out_vals);
        }
      }
    };
    const auto ask_after = [&](Row& to,
                               int slot) {  // the row after a slot's, which may be the next four's first
      const bool last = slot + 1 == kRows;
      if (last) there = __ballot_sync(kFull, after.present);
      ask(to, last ? then : base, last ? 0 : slot + 1, there);
    };
#pragma unroll 1
    for (int slot = 0; slot < kRows; slot += kAhead ? 2 : 1) {
      if (kAhead) {  // two rows' registers take turns
        ask_after(odd, slot);
        work(even, slot);
        ask_after(even, slot + 1);
        work(odd, slot + 1);
      } else {
        work(even, slot);
        ask_after(even, slot);
      }
    }
    gate_backward(params, tables, gate, grad_weight, given(params.grad_confidence, gate, M),
                  gate_sums(sums, gate, size));
    base = then;
    own = after;
  }

  double* const chunk_out = params.workspace + int64_t(blockIdx.x) * (affine + size);
  if (norm) {
    for (int turn = 0; turn < kBackwardWarps; ++turn) {  // warps add up in order
      if (turn == warp) {
#pragma unroll
        for (int m = 0; m < Modalities; ++m)
#pragma unroll
          for (int k = 0; k < Vectors; ++k)
#pragma unroll
            for (int i = 0; i < V; ++i) {
              const int column = (k * kWarp + lane) * V + i;
              if (m >= M || column >= D) continue;
              double *a = total + m * D + column, *b = a + M * D;
              *a = (turn ? *a : 0.0) + double(gamma_sum[m][k][i]);
              *b = (turn ? *b : 0.0) + double(beta_sum[m][k][i]);
            }
      }
      __syncthreads();
    }
    for (int i = int(threadIdx.x); i < affine; i += kBackwardWarps * kWarp) chunk_out[i] = total[i];
  }
  finish_gate(sums, size, chunk_out + affine);
}

// Any M, D and alignment. A block takes kBackwardWarps rows at a time: first a warp takes a row, for its sums over D; then a
// thread takes a vector of columns of all these rows, and adds its columns' sums to the chunk's in workspace.
template <class T>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2)
    reliability_fusion_wide_gradient_kernel(ReliabilityFusionBackward params, unsigned fast_bits,
                                            int64_t chunk_rows) {
  using A = ArithmeticOf<T>;
  constexpr int V = kVector<T>;
  const ReliabilityFusionForward& forward = params.forward;
  const int M = forward.modalities, S = forward.stages, size = gate_size(M, S);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t D = forward.dim;
  const bool norm = forward.norm_weight != nullptr;
  const int64_t affine = norm ? 2 * M * D : 0;
  double* const chunk_out = params.workspace + int64_t(blockIdx.x) * (affine + size);
  RowAdjoint<A>* const rows = shared_memory<RowAdjoint<A>>();  // (rows, M)
  A* const sums = reinterpret_cast<A*>(rows + kBackwardWarps * kMaxModalities);
  clear(sums, size);
  const Tables<A> tables = read_tables(forward, sums + kBackwardWarps * kRows * size);
  const int64_t begin = int64_t(blockIdx.x) * chunk_rows,
                end = begin + chunk_rows < forward.rows ? begin + chunk_rows : forward.rows;
  for (int64_t base = begin; base < end; base += kBackwardWarps) {
    const int64_t row = base + warp;
    if (row < end) {  // the same for a whole warp
      const Gate<A> gate(forward, tables, GateLane(forward, row, row + 1));
      A grad_weight = given(params.grad_weights, gate, M);
      for (int m = 0; m < M; ++m) {
        const A weight = __shfl_sync(kFull, gate.weight, gate.lane_of(0, m));
        const bool present = __shfl_sync(kFull, int(gate.present), gate.lane_of(0, m)) != 0;
        A mean(0), scale(1), sum_u_xhat(0), sum_u(0), sum_grad_beta(0);
        if (norm) {
          const A* stats = static_cast<const A*>(forward.stats) + (row * M + m) * 2;
          mean = stats[0];
          scale = stats[1];
        }
        if (present && params.grad_fused)
          for (int64_t column = lane * V; column < D; column += kWarp * V) {
            const int count = int(D - column < V ? D - column : V);
            A x_vals[V], grad_vals[V];
            load_vector(static_cast<const T*>(forward.values[m]) + row * forward.row_stride[m] + column,
                        count, count == V && fast_bits >> m & 1, x_vals);
            load_vector(static_cast<const T*>(params.grad_fused) + row * D + column, count,
                        count == V && fast_bits & kFusedFast, grad_vals);
            if (norm) {
              A gamma[V], beta[V];
              const bool fast = count == V && fast_bits & kAffineFast;
              load_numbers<V>(static_cast<const A*>(forward.norm_weight) + m * D + column, count, fast,
                              gamma);
              load_numbers<V>(static_cast<const A*>(forward.norm_bias) + m * D + column, count, fast, beta);
#pragma unroll
              for (int i = 0; i < V; ++i) {
                const A u = grad_vals[i] * gamma[i];
                sum_u += u;
                sum_u_xhat = fma(u, (x_vals[i] - mean) * scale, sum_u_xhat);
                sum_grad_beta = fma(grad_vals[i], beta[i], sum_grad_beta);
              }
            } else {
#pragma unroll
              for (int i = 0; i < V; ++i) sum_u_xhat = fma(grad_vals[i], x_vals[i], sum_u_xhat);
            }
          }
        sum_u_xhat = lanes_sum<1, kWarp>(sum_u_xhat), sum_u = lanes_sum<1, kWarp>(sum_u),
        sum_grad_beta = lanes_sum<1, kWarp>(sum_grad_beta);
        if (present && gate.serves(0, m)) grad_weight += sum_u_xhat + sum_grad_beta;
        if (lane == 0)
          rows[warp * M + m] = {
              mean, scale, weight,
              norm_adjoint(present ? weight : A(0), scale, sum_u, norm ? sum_u_xhat : A(0), A(D))};
      }
      gate_backward(params, tables, gate, grad_weight, given(params.grad_confidence, gate, M),
                    gate_sums(sums, gate, size));
    }
    __syncthreads();
    const int live = int(end - base < kBackwardWarps ? end - base : kBackwardWarps);
    for (int64_t column = int64_t(threadIdx.x) * V; column < D; column += kBackwardWarps * kWarp * V) {
      const int count = int(D - column < V ? D - column : V);
      for (int m = 0; m < M; ++m) {
        A gamma[V], gamma_sum[V], beta_sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) gamma[i] = A(1), gamma_sum[i] = beta_sum[i] = A(0);
        if (norm)
          load_numbers<V>(static_cast<const A*>(forward.norm_weight) + m * D + column, count,
                          count == V && fast_bits & kAffineFast, gamma);
        for (int slot = 0; slot < live; ++slot) {
          const RowAdjoint<A> adjoint = rows[slot * M + m];
          const bool present =
              adjoint.weight != A(0) || adjoint.back.by_u != A(0);  // a weight of 0 has no gradient to give
          A x_vals[V], grad_vals[V], out_vals[V];
          load_vector(
              static_cast<const T*>(forward.values[m]) + (base + slot) * forward.row_stride[m] + column,
              present ? count : 0, present && count == V && fast_bits >> m & 1, x_vals);
          load_vector(static_cast<const T*>(params.grad_fused) + (base + slot) * D + column,
                      present && params.grad_fused ? count : 0,
                      present && params.grad_fused && count == V && fast_bits & kFusedFast, grad_vals);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A xhat_val = (x_vals[i] - adjoint.mean) * adjoint.scale,
                    weighted = grad_vals[i] * adjoint.weight;
            gamma_sum[i] = fma(weighted, xhat_val, gamma_sum[i]);
            beta_sum[i] += weighted;
            out_vals[i] = present ? fma(grad_vals[i] * gamma[i], adjoint.back.by_u,
                                        fma(xhat_val, adjoint.back.by_xhat, adjoint.back.constant))
                                  : A(0);
          }
          if (params.grad_values[m])
            store_vector(static_cast<T*>(params.grad_values[m]) + (base + slot) * D + column, count,
                         count == V && fast_bits >> (16 + m) & 1, out_vals);
        }
        if (norm) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (i >= count) continue;
            double *a = chunk_out + m * D + column + i, *b = a + M * D;
            *a = (base == begin ? 0.0 : *a) + double(gamma_sum[i]);
            *b = (base == begin ? 0.0 : *b) + double(beta_sum[i]);
          }
        }
      }
    }
    __syncthreads();
  }
  finish_gate(sums, size, chunk_out + affine);
}

// Parameter gradients: the chunks in a fixed order, 32 parameters a block.
constexpr int kColumns = 32, kSlices = 32;
template <class A>
__global__ void __launch_bounds__(kColumns* kSlices)
    reliability_fusion_parameter_kernel(ReliabilityFusionBackward params, int64_t chunks, int64_t count) {
  const int column = int(threadIdx.x) % kColumns, slice = int(threadIdx.x) / kColumns;
  const int64_t i = int64_t(blockIdx.x) * kColumns + column;
  double* shared = shared_memory<double>();
  double sum = 0;
  if (i < count)
    for (int64_t k = slice; k < chunks; k += kSlices) sum += params.workspace[k * count + i];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice || i >= count) return;
  for (int k = 1; k < kSlices; ++k) sum += shared[k * kColumns + column];
  static_cast<A*>(params.grad_params)[i] = A(sum);
}

template <class T>
void backward_all(const ReliabilityFusionBackward& params, const Call& call) {
  using A = ArithmeticOf<T>;
  constexpr int kHeld = kWarp * 8;  // columns of a warp's 16-byte vectors, or of its pairs of them
  const ReliabilityFusionForward& forward = params.forward;
  const bool norm = forward.norm_weight != nullptr;
  unsigned fast_bits = fast_bits_of<T>(forward, params.grad_fused);
  for (int m = 0; m < forward.modalities; ++m)
    fast_bits |= aligned(params.grad_values[m], forward.dim * int64_t(sizeof(T))) ? 1u << (16 + m) : 0;
  const int64_t chunk_rows = reliability_fusion_cuda_chunk_rows(forward.rows),
                chunks = (forward.rows + chunk_rows - 1) / chunk_rows;
  const int size = gate_size(forward.modalities, forward.stages);
  size_t shared =
      size_t(kBackwardWarps * kRows * size + gate_size(forward.modalities, forward.stages)) * sizeof(A);
  const unsigned grads = (1u << forward.modalities) - 1;  // those that are not wanted count as aligned
  const bool fast = all_fast(fast_bits, forward.modalities) && (fast_bits >> 16 & grads) == grads;
  void (*kernel)(ReliabilityFusionBackward, int64_t) = nullptr;
  if constexpr (sizeof(T) < 8) {
    constexpr int K = 8 / kVector<T>;  // vectors a lane for 256 columns
    const bool narrow = forward.dim % kVector<T> == 0, two = forward.modalities <= 2;
    if (narrow && two && forward.dim == kHeld && fast)
      kernel = reliability_fusion_gradient_kernel<T, 2, K, true, true>;
    else if (narrow && two && forward.dim <= kHeld)
      kernel = fast ? reliability_fusion_gradient_kernel<T, 2, K, true, false>
                    : reliability_fusion_gradient_kernel<T, 2, K, false, false>;
    if constexpr (!std::is_same<T, __half>::value) {  // float16 does with fewer: each costs build time
      if (narrow && two && forward.dim > kHeld && forward.dim <= 2 * kHeld)
        kernel = fast ? reliability_fusion_gradient_kernel<T, 2, 2 * K, true, false>
                      : reliability_fusion_gradient_kernel<T, 2, 2 * K, false, false>;
      if (narrow && !two && forward.modalities <= 4 && forward.dim <= kHeld)
        kernel = fast ? reliability_fusion_gradient_kernel<T, 4, K, true, false>
                      : reliability_fusion_gradient_kernel<T, 4, K, false, false>;
    }
  }
  if (kernel) {
    shared += norm ? size_t(2 * forward.modalities * forward.dim) * sizeof(double) : 0;
    launch(call, kernel, dim3(grid_x(call, chunks)), kBackwardWarps * kWarp, shared, params, chunk_rows);
  } else {
    shared += kBackwardWarps * kMaxModalities * sizeof(RowAdjoint<A>);
    launch(call, reliability_fusion_wide_gradient_kernel<T>, dim3(grid_x(call, chunks)),
           kBackwardWarps * kWarp, shared, params, fast_bits, chunk_rows);
  }
  const int64_t count = reliability_fusion_param_count(forward.dim, forward.modalities, forward.stages, norm);
  launch(call, reliability_fusion_parameter_kernel<A>, dim3(grid_x(call, (count + kColumns - 1) / kColumns)),
         kColumns * kSlices, kColumns * kSlices * sizeof(double), params, chunks, count);
}

}  // namespace

void reliability_fusion_backward(const ReliabilityFusionBackward& params, Exec exec) {
  const ReliabilityFusionForward& forward = params.forward;
  if (!forward.rows) return;
  const Call call = call_of("reliability_fusion backward", forward, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(forward.dtype, backward_all, params)
}

}  // namespace sage::cuda
