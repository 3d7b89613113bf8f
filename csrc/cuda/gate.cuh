// What reliability_fusion's two directions share on the GPU: the gate, forward and backward, and how a call is
// described.
//
// A warp takes the gates of four rows at a time: 8 lanes a row, those spread over the row's modalities, and what
// lanes are left of them over the stages. Every value of the gate is recomputed in backward, from the inputs.
#pragma once
#include "device.cuh"
#include "../math/reliability_fusion.h"

namespace sage::cuda {

constexpr int kRows = 4, kGateLanes = kWarp / kRows;  // of a warp's gate; 8 lanes serve 8 modalities

// Which tensors may be read and written 16 bytes at a time, in a wide kernel's `fast_bits`: bit m is values[m], bit
// 16 + m grad_values[m], and these are fused (in backward its gradient) and norm_weight with norm_bias. Kernels that hold
// a row in registers are compiled once for tensors that all may, and once for any: a choice at run time would make every
// load wait for the one before it, since both ways to load must end in the same registers.
constexpr unsigned kFusedFast = 1u << 8, kAffineFast = 1u << 9;

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
__device__ __forceinline__ Tables<A> read_tables(const ReliabilityFusionForward& params, A* shared) {
  const int count = params.modalities * params.stages;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    shared[i] = params.log_temperature ? exp(-static_cast<const A*>(params.log_temperature)[i]) : A(1);
    shared[count + i] = params.bias ? static_cast<const A*>(params.bias)[i] : A(0);
    if (i < params.modalities)
      shared[2 * count + i] = params.sharpness ? static_cast<const A*>(params.sharpness)[i] : A(1);
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
struct StageRow {  // of one row; zeros past the last stage
  const A* at;
  A uniform;
  int stages;
  __device__ __forceinline__ A operator[](int s) const { return s < stages ? (at ? at[s] : uniform) : A(0); }
};
// Sum and maximum over a group of neighbouring lanes: those whose numbers differ from this one's in the binary digits
// from, 2 from, ... to / 2 alone. Every lane of the group gets the same bits.
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

// A lane's place in the gates of the four rows from `base` on, of those below `end`. A row has 8 lanes, `lanes` of them
// a modality. `slot`: a row's place among the four. `real`: this lane's row and modality exist. `present`: and its frame
// is there, which may be known long before the gate.
struct GateLane {
  int lane, lanes, modality;
  int64_t row;
  bool real, present;

  __device__ __forceinline__ GateLane(const ReliabilityFusionForward& params, int64_t base, int64_t end) {
    const int M = params.modalities;
    lane = int(threadIdx.x) % kWarp;
    lanes = M > 4 ? 1 : M > 2 ? 2 : M > 1 ? 4 : 8;
    modality = lane % kGateLanes / lanes;
    row = base + lane / kGateLanes;
    real = row < end && modality < M;
    present = real && (!params.present || params.present[row * M + modality]);
  }
  __device__ __forceinline__ int lane_of(int slot, int of) const { return slot * kGateLanes + of * lanes; }
  __device__ __forceinline__ bool serves(int slot, int of) const {
    return lane / kGateLanes == slot && modality == of;
  }
};

// The gates of four rows; each lane holds the results of its row and modality.
template <class A>
struct Gate : GateLane {
  StageLanes stages;
  Logits<A> logit;
  StageRow<A> stage;
  A confidence, log_odds, weight;

  __device__ __forceinline__ Gate(const ReliabilityFusionForward& params, const Tables<A>& tables,
                                  const GateLane& own)
      : GateLane(own) {
    const int M = params.modalities, S = params.stages;
    const bool any_present = __ballot_sync(kFull, present) >> lane / kGateLanes * kGateLanes & 0xffu;
    stages = {lane % lanes, lanes};
    logit = {present ? static_cast<const A*>(params.reliability) + (row * M + modality) * S : nullptr,
             tables.scale + modality * S, tables.bias + modality * S, S};
    // a frame with no modality does not need a stage
    stage = {any_present && params.stage ? static_cast<const A*>(params.stage) + row * S : nullptr,
             A(1) / A(S), S};

    const Reliability<A> r = reliability<A>(S, logit, stage, stages);
    confidence = present ? r.confidence : A(0);
    log_odds = r.log_odds;
    const A score = log_odds * (real ? tables.sharpness[modality] : A(0));
    modality_weights(1, &score, &present, &weight, modalities());
  }
  __device__ __forceinline__ ModalityLanes modalities() const { return {lanes}; }
  __device__ __forceinline__ bool first() const { return stages.first == 0; }
};

template <class A>
__device__ __forceinline__ void write_gate(const ReliabilityFusionForward& params, const Gate<A>& gate) {
  if (!gate.real || !gate.first()) return;
  static_cast<A*>(params.weights)[gate.row * params.modalities + gate.modality] = gate.weight;
  static_cast<A*>(params.confidence)[gate.row * params.modalities + gate.modality] = gate.confidence;
}

// -------------------------------------------------------------------------------------------------------- backward
// From the gradients of this lane's modality's weight and confidence those of the gate's inputs. `sums`: running sums
// of the gate's parameters in shared memory, this lane's row's own: log_temperature, bias, sharpness.
template <class A>
__device__ __forceinline__ void gate_backward(const ReliabilityFusionBackward& params,
                                              const Tables<A>& tables, const Gate<A>& gate, A grad_weight,
                                              A grad_confidence, A* sums) {
  const int M = params.forward.modalities, S = params.forward.stages;
  A grad_score = grad_weight;
  modality_weights_adjoint(1, &gate.weight, &gate.present, &grad_score, gate.modalities());
  if (gate.present && gate.first()) sums[2 * M * S + gate.modality] += grad_score * gate.log_odds;
  const A sharpness = gate.real ? tables.sharpness[gate.modality] : A(0);
  reliability_adjoint<A>(
      S, gate.logit, gate.stage, gate.present ? grad_confidence : A(0), grad_score * sharpness, gate.stages,
      [&](int s, A to_logit, A to_stage) {
        const bool inside = s < S;
        const int i = gate.modality * S + s;
        A to_raw(0);
        if (gate.present && inside) {
          to_raw = to_logit * tables.scale[i];
          sums[i] -= to_raw * gate.logit.raw[s];
          sums[M * S + i] += to_logit;
        }
        if (gate.real && inside)
          static_cast<A*>(params.grad_reliability)[(gate.row * M + gate.modality) * S + s] = to_raw;
        const A all = gate.modalities().sum(gate.present ? to_stage : A(0));
        if (params.grad_stage && gate.real && gate.modality == 0 && inside)
          static_cast<A*>(params.grad_stage)[gate.row * S + s] = all;
      });
}

// This lane's number of an (N, M) tensor; 0 without one.
template <class A>
__device__ __forceinline__ A given(const void* p, const Gate<A>& gate, int modalities) {
  return p && gate.real ? static_cast<const A*>(p)[gate.row * modalities + gate.modality] : A(0);
}

// -------------------------------------------------------------------------------------------------------- launching
inline Call call_of(const char* op, const ReliabilityFusionForward& params, Exec exec) {
  Call call = {exec.where, static_cast<cudaStream_t>(exec.stream), ""};
  snprintf(call.text, sizeof call.text, "%s of %d x (%lld, %lld), %d stages, %s", op, params.modalities,
           (long long)params.rows, (long long)params.dim, params.stages, dtype_name(params.dtype));
  return call;
}

template <class T>
unsigned fast_bits_of(const ReliabilityFusionForward& params, const void* row_of_values) {
  const int64_t size = int64_t(sizeof(T)), affine = params.dim * int64_t(sizeof(ArithmeticOf<T>));
  unsigned bits = aligned(row_of_values, params.dim * size) ? kFusedFast : 0;
  for (int m = 0; m < params.modalities; ++m)
    bits |= aligned(params.values[m], params.row_stride[m] * size) ? 1u << m : 0;
  if (aligned(params.norm_weight, affine) && aligned(params.norm_bias, affine)) bits |= kAffineFast;
  return bits;
}

// Whether all tensors of a call, in backward without the gradients of values, may be read and written 16 bytes at a time.
inline bool all_fast(unsigned fast_bits, int modalities) {
  const unsigned all = kFusedFast | kAffineFast | ((1u << modalities) - 1);
  return (fast_bits & all) == all;
}

// Calls all<storage type>(params, call).
#define SAGE_BY_TYPE(dtype, all, params)       \
  switch (dtype) {                             \
    case DType::f32:                           \
      return all<float>(params, call);         \
    case DType::f64:                           \
      return all<double>(params, call);        \
    case DType::f16:                           \
      return all<__half>(params, call);        \
    case DType::bf16:                          \
      return all<__nv_bfloat16>(params, call); \
  }

}  // namespace sage::cuda
