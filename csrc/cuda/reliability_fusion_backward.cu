// reliability_fusion on the GPU, backward.
//
// Bytes: reads (M + 1) D and writes M D values a row; the gate adds 8 (M S + S + 4 M) bytes or so. The floor is the time to
// move those.
//
// A warp takes four rows at a time: their gates together (gate.cuh), then the features, 32 lanes a row, so that a lane owns
// D / 32 columns and keeps their sums for norm_weight and norm_bias in registers over all of its rows. The rows of a block
// are a chunk, whose sums go to workspace in double, and a second launch adds the chunks in order. Rows too wide for
// registers, or no multiple of 16 bytes, take the `wide` kernel, which reads values again from cache. Which kernel and which
// lane serves what is decided by dtype, M and D alone: a row's bits depend on nothing else.
#include <type_traits>

#include "gate.cuh"

namespace sage::cuda {
namespace {

constexpr int kBackwardWarps = 8;  // of a block

// A row, one modality:  xhat = (x - mean) scale;  u = g gamma;  c0 = sum u xhat, c1 = sum u, c2 = sum g beta
//   d weight = c0 + c2;  d x = w scale (u - c1/D - xhat c0/D);  d gamma = w g xhat;  d beta = w g
// Without the norm: c0 = sum g x, d weight = c0, d x = w g.
template <class A>
struct RowAdjoint {  // what the columns need to know of a row and modality
  A mean, scale, weight;
  NormAdjoint<A> back;
};

// The gradients of the gate's parameters: in shared memory a row of running sums for each row of rows that the block's warps
// take at a time, and at the end their total for the chunk.
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
  const int M = f.modalities, S = f.stages, D = int(f.dim), size = gate_size(M, S);
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
  const int M = f.modalities, S = f.stages, size = gate_size(M, S);
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
  const int size = gate_size(f.modalities, f.stages);
  size_t shared = size_t(kBackwardWarps * kRows * size + gate_size(f.modalities, f.stages)) * sizeof(A);
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

void reliability_fusion_backward(const ReliabilityFusionBackward& q, Exec exec) {
  const ReliabilityFusionForward& f = q.forward;
  if (!f.rows) return;
  const Call call = call_of("reliability_fusion backward", f, exec);
  const DeviceGuard guard(exec.where);
  SAGE_BY_TYPE(f.dtype, backward_all, q)
}

}  // namespace sage::cuda
