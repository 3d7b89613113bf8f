// What reliability_fusion's two directions share on the GPU: the gate, forward and backward, and how a call is described.
//
// A warp takes the gates of four rows at a time: 8 lanes a row, those spread over the row's modalities, and what lanes are
// left of them over the stages. Every value of the gate is recomputed in backward, from the inputs.
#pragma once
#include "device.cuh"
#include "../math/reliability_fusion.h"

namespace sage::cuda {

constexpr int kRows = 4, kGateLanes = kWarp / kRows;  // of a warp's gate; 8 lanes serve 8 modalities

// Which tensors may be read 16 bytes at a time: bit m of `whole` is values[m], bit 16 + m grad_values[m], and
constexpr unsigned kFusedWhole = 1u << 8, kAffineWhole = 1u << 9;

// --------------------------------------------------------------------------------------------------------- forward
// The gate's parameters: log_temperature and bias (M, S), sharpness (M,). How many numbers, of them or their gradients.
__host__ __device__ __forceinline__ int gate_size(int modalities, int stages) {
  return modalities * (2 * stages + 1);
}

template <class A>
struct Tables {  // in shared memory: (M, S) exp(-log_temperature), (M, S) bias, (M,) sharpness
  const A *scale, *bias, *sharpness;
};

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

template <class A>
__device__ __forceinline__ void write_gate(const ReliabilityFusionForward& q, const Gate<A>& g) {
  if (!g.real || !g.first()) return;
  static_cast<A*>(q.weights)[g.row * q.modalities + g.m] = g.weight;
  static_cast<A*>(q.confidence)[g.row * q.modalities + g.m] = g.confidence;
}

// -------------------------------------------------------------------------------------------------------- backward
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

// -------------------------------------------------------------------------------------------------------- launching
inline Call call_of(const char* op, const ReliabilityFusionForward& q, Exec exec) {
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

// Calls all<storage type>(q, call).
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

}  // namespace sage::cuda
