// The one list of entry points: a params struct an op, and beside each other its cpu:: and cuda:: launchers.
// Everything below this header is plain C++: raw pointers, sizes, no torch, no Python, no STL in the interfaces. All
// tensors are dense and row-major unless a stride says otherwise; a null pointer is an absent optional argument.
//
// B sequences, T frames, N rows, M modalities, S stages, D features, C channels; beside each op's name stands its
// section of docs/math.md. In the kernel files `params` is the struct of the call, and in a backward `forward` is that
// part of it which forward was given.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sage {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

constexpr int kMaxModalities = 8;
constexpr int kMaxStages = 16;

// Where to run: on the CPU a thread count; on a GPU a device index and the caller's stream.
struct Exec {
  int where;  // threads (cpu) or device index (cuda)
  void* stream;
};

// ---------------------------------------------------------------------------------- stage_filter ("Stage filter")
struct StageFilterForward {
  DType dtype;  // f32 or f64, of every tensor here
  int64_t batch, frames;
  int stages;
  const void* emission;    // (B, T, S)
  const void* transition;  // (S, S) logits
  const void* initial;     // (S,) or (B, S), or null: uniform
  int64_t initial_stride;  // S, or 0 where one row serves all
  const uint8_t* mask;     // (B, T) or null
  void* posterior;         // (B, T, S)
  void* belief;            // (B, T, S) log posterior; null: not wanted (no backward will follow)
  void* final_belief;      // (B, S)
};

struct StageFilterBackward {
  DType dtype;
  int64_t batch, frames;
  int stages;
  const void* emission;  // read only to find the logits that count as log 0: they have no gradient
  const void* transition;
  const void* initial;
  int64_t initial_stride;
  const uint8_t* mask;
  const void* posterior;       // from forward
  const void* belief;          // from forward
  const void* grad_posterior;  // (B, T, S) or null: zero
  const void* grad_final;      // (B, S) or null: zero
  void* grad_emission;         // (B, T, S)
  void* grad_transition;       // (S, S)
  void* grad_initial;          // (B, S) or null; summed over B by the caller where one row served all
  double* workspace;           // stage_filter_workspace() doubles
};
// A GPU cuts sequences of more than kStageWholeFrames, by their length alone, into chunks of kStageChunkFrames (the
// last one up to twice as many).
constexpr int64_t kStageChunkFrames = 256, kStageWholeFrames = 1024;
inline int64_t stage_cuda_chunks(int64_t frames) {
  return frames <= kStageWholeFrames ? 1 : frames / kStageChunkFrames;
}
// (S, S) flows of each sequence or, on a GPU, each chunk
inline int64_t stage_filter_workspace(int64_t batch, int64_t frames, int stages) {
  return batch * stage_cuda_chunks(frames) * stages * stages;
}

// --------------------------------------------------------------- reliability_fusion ("Reliability-weighted fusion")
struct ReliabilityFusionForward {
  DType dtype;  // of values, fused and their gradients; the other tensors are f64 where that is f64, else f32
  int64_t rows, dim;
  int modalities, stages;
  const void* values[kMaxModalities];  // (N, D) each
  int64_t row_stride[kMaxModalities];  // elements from row to row of values[m]
  const void* reliability;             // (N, M, S)
  const void* stage;                   // (N, S) or null: uniform
  const void* log_temperature;         // (M, S) or null: 0
  const void* bias;                    // (M, S) or null: 0
  const void* sharpness;               // (M,) or null: 1
  const uint8_t* present;              // (N, M) or null: all
  const void* norm_weight;             // (M, D), or null: no normalisation (both or neither)
  const void* norm_bias;               // (M, D)
  double eps;
  void* fused;       // (N, D)
  void* weights;     // (N, M)
  void* confidence;  // (N, M)
  void* stats;       // (N, M, 2) mean and 1/std for backward; null: not wanted
};

struct ReliabilityFusionBackward {
  // As given to forward, whose stats it holds; fused, weights and confidence are unused.
  ReliabilityFusionForward forward;
  const void* grad_fused;             // (N, D) or null: zero
  const void* grad_weights;           // (N, M) or null: zero
  const void* grad_confidence;        // (N, M) or null: zero
  void* grad_values[kMaxModalities];  // (N, D) dense each; null: not wanted
  void* grad_reliability;             // (N, M, S)
  void* grad_stage;                   // (N, S) or null
  // reliability_fusion_param_count() numbers: norm_weight, norm_bias (M, D) each if given, then log_temperature,
  // bias (M, S) each, sharpness (M,)
  void* grad_params;
  double* workspace;  // reliability_fusion_workspace() doubles
};
inline int64_t reliability_fusion_param_count(int64_t dim, int modalities, int stages, bool norm) {
  return modalities * ((norm ? 2 * dim : 0) + 2 * stages + 1);
}
// Rows are cut into chunks by the row count alone, so parameter gradients do not depend on the thread count.
constexpr int64_t kFusionChunks = 64, kFusionChunkRows = 64;
inline int64_t reliability_fusion_chunk_rows(int64_t rows) {
  int64_t per = (rows + kFusionChunks - 1) / kFusionChunks;
  return per < kFusionChunkRows ? kFusionChunkRows
                                : (per + kFusionChunkRows - 1) / kFusionChunkRows * kFusionChunkRows;
}
inline int64_t reliability_fusion_chunks(int64_t rows) {
  return (rows + reliability_fusion_chunk_rows(rows) - 1) / reliability_fusion_chunk_rows(rows);
}
// On a GPU a chunk is the rows of one block.
inline int64_t reliability_fusion_cuda_chunk_rows(int64_t rows) {
  const int64_t per = (rows + 1023) / 1024;
  return (per + 15) / 16 * 16;  // four rows at a time for each of a block's four warps
}
inline int64_t reliability_fusion_workspace(int64_t rows, int64_t dim, int modalities, int stages,
                                            bool norm) {
  // CPU: a chunk's sums in double, and beside them its running sums in the arithmetic type. GPU: a chunk's sums.
  const int64_t per = reliability_fusion_cuda_chunk_rows(rows), cpu = 2 * reliability_fusion_chunks(rows),
                cuda = (rows + per - 1) / per;
  return (cpu > cuda ? cpu : cuda) * reliability_fusion_param_count(dim, modalities, stages, norm);
}

// ------------------------------------------------------------------------------------------ ccc ("Concordance")
enum class Mask : int { none = 0, frame = 1, element = 2 };  // none, or one byte a frame or a number

struct CccForward {
  DType dtype;             // of pred and target: f32 or f64
  int64_t groups, frames;  // groups of `frames` consecutive frames
  int channels;
  const void* pred;     // (G, F, C)
  const void* target;   // (G, F, C)
  const uint8_t* mask;  // of mask_kind's shape, or null
  Mask mask_kind;
  double* moments;    // (G, C, 6): count, mean_p, mean_t, M2_p, M2_t, C_pt
  void* ccc;          // (G, C) of dtype, or null
  double* workspace;  // ccc_workspace() doubles
};

struct CccBackward {
  CccForward forward;          // moments hold forward's result
  const void* grad_ccc;        // (G, C) of dtype; exactly one of grad_ccc and grad_moments is given
  const double* grad_moments;  // (G, C, 6)
  void* grad_pred;             // (G, F, C) or null
  void* grad_target;           // (G, F, C) or null
};
constexpr int64_t kCccChunkFrames = 2048;
inline int64_t ccc_chunks(int64_t frames) { return (frames + kCccChunkFrames - 1) / kCccChunkFrames; }
inline int64_t ccc_workspace(int64_t groups, int64_t frames, int channels) {
  return groups * ccc_chunks(frames) * channels * 6;
}

// --------------------------------------------------------------------------------- temporal_ccc ("Temporal CCC")
// State of the cumulative and half-life modes, 8 numbers a (sequence, channel):
//   valid frames, weight, mean_p, mean_t, M2_p, M2_t, C_pt, frames since the last valid one.
// State of the window mode: the last `history` <= window - 1 frames as (pred, target, valid).
constexpr int kTemporalState = 8;
constexpr int kTemporalCoefficients = 5;

struct TemporalCccForward {
  DType dtype;  // of pred, target, rho
  int64_t batch, frames;
  int channels;
  const void* pred;    // (B, T, C)
  const void* target;  // (B, T, C)
  const uint8_t* mask;
  Mask mask_kind;
  int64_t window;          // 0: no window
  double decay;            // 0.5 ** (1 / halflife); 1: cumulative
  int64_t history;         // window mode: frames in state_in
  int64_t history_out;     // window mode: frames in state_out = min(window - 1, history + frames)
  const double* state_in;  // (B, C, 8), or (B, history, C, 3); null: empty
  double* state_out;       // (B, C, 8), or (B, history_out, C, 3)
  void* rho;               // (B, T, C)
  uint8_t* defined;        // (B, T, C): two valid frames or more and a denominator above 0
  double* workspace;       // temporal_ccc_workspace() doubles, on every backend
};

// Frames of the CPU's window stack.
inline int64_t temporal_ccc_stack(int64_t frames, int64_t window, int64_t history) {
  return window == 0 ? 0 : window < history + frames ? window : history + frames;
}
// Enough for every backend: (sequence, channel) lanes in eights; in window mode 6 moments a frame (a GPU keeps all of
// them); for backward 5 slopes and a decay a frame, or, in window mode, the slopes and their running sums.
inline int64_t temporal_ccc_workspace(int64_t batch, int64_t frames, int channels, int64_t window,
                                      int64_t history, bool backward) {
  const int64_t lanes = (batch * channels + 7) / 8 * 8;
  return lanes * (window ? 6 * (history + frames) + (backward ? 10 * frames : 0) : backward ? 6 * frames : 0);
}

struct TemporalCccBackward {
  TemporalCccForward forward;  // rho, defined and state_out (null) are unused
  const void* grad_rho;        // (B, T, C)
  void* grad_pred;             // (B, T, C) or null
  void* grad_target;           // (B, T, C) or null
};

// ------------------------------------------------------------------------------- leaky_average ("Leaky average")
constexpr int kMaxAverages = 8;

struct LeakyAverageForward {
  DType dtype;  // of x and average; all other tensors: f64 for f64, else f32
  int64_t batch, frames, dim;
  int averages;           // R
  bool causal;            // frame t sees no later frame
  bool relative;          // the prior is in units of the mean precision
  const void* x;          // (B, T, D)
  const void* precision;  // (B, T), at least 0
  const void* halflife;   // (R) in frames, above 0
  const void* prior;      // (R), at least 0
  const void* state_in;   // (B, R, D + 2): sum, weight, count before the first frame; null: nothing was seen
  void* average;          // (B, T, R, D)
  void* state_out;        // (B, R, D + 2) after the last frame
  double* workspace;      // leaky_average_workspace() doubles
};

struct LeakyAverageBackward {
  LeakyAverageForward forward;  // as given to forward, whose average it holds; state_out is unused
  const void* grad_average;     // (B, T, R, D) or null: zero
  const void* grad_state_out;   // (B, R, D + 2) or null: zero
  void* grad_x;                 // (B, T, D)
  void* grad_precision;         // (B, T)
  void* grad_prior;             // (R)
  void* grad_state_in;          // (B, R, D + 2) or null
};
// What looks both ways remembers one side's sums at the edges of chunks of so many frames.
constexpr int64_t kLeakyChunkFrames = 32;
// On a GPU a block takes so many channels of a sequence.
constexpr int64_t kLeakyChannels = 32;
inline int64_t leaky_average_workspace(int64_t batch, int64_t frames, int64_t dim, int averages,
                                       bool causal) {
  const int64_t padded = (dim + 31) / 32 * 32, chunks = (frames + kLeakyChunkFrames - 1) / kLeakyChunkFrames;
  const int64_t scalars =
      5 * frames * averages;  // weight, count, scale, dot, one more where both sides are summed
  const int64_t sums = averages * padded * (causal ? 1 : 2 + chunks + kLeakyChunkFrames);
  const int64_t partial = (averages + 1) * frames * (padded / kLeakyChannels);  // of a GPU's blocks
  return batch * (scalars + sums + partial + averages);
}

// X(op, Params): every kernel entry point of the library. A new op is two lines here, two files csrc/cpu/OP.cpp and
// csrc/cuda/OP.cu in CMakeLists.txt, and its functions in bindings.cpp's bind_backend.
#define SAGE_OPS(X)                                         \
  X(stage_filter_forward, StageFilterForward)               \
  X(stage_filter_backward, StageFilterBackward)             \
  X(reliability_fusion_forward, ReliabilityFusionForward)   \
  X(reliability_fusion_backward, ReliabilityFusionBackward) \
  X(ccc_forward, CccForward)                                \
  X(ccc_backward, CccBackward)                              \
  X(temporal_ccc_forward, TemporalCccForward)               \
  X(temporal_ccc_backward, TemporalCccBackward)             \
  X(leaky_average_forward, LeakyAverageForward)             \
  X(leaky_average_backward, LeakyAverageBackward)

#define SAGE_DECLARE(op, Params) void op(const Params&, Exec);
namespace cpu {
SAGE_OPS(SAGE_DECLARE)
namespace baseline {
SAGE_OPS(SAGE_DECLARE)
}
namespace avx2 {
SAGE_OPS(SAGE_DECLARE)
}
namespace avx512 {
SAGE_OPS(SAGE_DECLARE)
}
}  // namespace cpu
namespace cuda {
SAGE_OPS(SAGE_DECLARE)
}
#undef SAGE_DECLARE

}  // namespace sage
