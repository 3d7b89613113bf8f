// One frame of the SAGE model for each of many streams: the model as the engines see it, and the CPU engine's interface
// (csrc/cpu/stream.cpp computes, csrc/cpu/session.cpp owns). The CUDA engine is csrc/cuda/stream.cu and session.cu. What
// tensors the model is made of, and what a row's state consists of, is said once, in describe.h.
//
// A stream is a row. A row's result is a function of its own numbers alone, to the bit: every sum runs in an order
// that neither the batch, nor the row's place in it, nor the thread count changes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../math/frame.h"
#include "../ops.h"

namespace sage::stream {

constexpr int kMaxBlocks = 12;
constexpr int kMaxMemory = 8;
constexpr int kGroup = 12;  // rows that share each load of a weight
constexpr int64_t kPad =
    16;  // floats: rows of every buffer start on a cache line, whatever the instruction set
constexpr int kTypicality = 2 * kEnergies;  // numbers a modality that typicality says
constexpr int kQuality = 3;                 // numbers that a column of quality says
constexpr int kMaxComponents = 32;          // of a modality
constexpr double kNormEps = 1e-5;           // of every LayerNorm
SAGE_FN constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
constexpr int64_t kEnergyLanes = padded(kEnergies * kMaxModalities);  // whole vectors of energies

struct Shape {
  int modalities;
  int64_t in_dim[kMaxModalities];
  int64_t dim;
  int targets;
  int own_blocks,
      fused_blocks;  // dilation 1, 2, 4, ... through the own blocks, then on through the fused ones
  int kernel;        // taps of a block's convolution
  bool reliability;  // false: equal weights over the present modalities, and the next three are 1, 0, 1
  int stages;
  int64_t evidence;
  int window;       // frames of the typicality average
  bool value_norm;  // LayerNorm on the fused values
  bool
      hide_missing;  // the fusion is not told what is missing: a missing modality is a frame of zeros like any other
  bool bf16;         // matrices are kept as bfloat16
  bool joint;                       // an expert that sees all modalities, before those of each alone
  int quality_dim[kMaxModalities];  // columns of quality
  bool foreign;                     // streams may be somebody else's: a filter says so
  int memory;                       // averages of the precision-weighted memory; 0: none
  bool stuck;  // a modality that repeats its frame too often is missing; false: each may repeat for ever

  SAGE_FN int experts() const { return modalities + (joint ? 1 : 0); }
  SAGE_FN int qualities() const { return quality_before(modalities); }
  // Columns of quality of the modalities before m; numbers that typicality and quality say of m, and of those before it.
  SAGE_FN int quality_before(int m) const {
    int sum = 0;
    for (int i = 0; i < m; ++i) sum += quality_dim[i];
    return sum;
  }
  SAGE_FN int signs(int m) const { return kTypicality + kQuality * quality_dim[m]; }
  SAGE_FN int signs_before(int m) const { return kTypicality * m + kQuality * quality_before(m); }
  SAGE_FN int all_signs() const { return signs_before(modalities); }
  // Rows of the matrix of principal components.
  SAGE_FN int64_t components(int m) const {
    const int64_t most = in_dim[m] > 2 ? in_dim[m] - 1 : 1;
    return most < kMaxComponents ? most : kMaxComponents;
  }
};

// y = W x + b. How the matrix is packed is the engine's affair.
struct Linear {
  const void* weight;
  const float* bias;
  int64_t inputs, outputs;
};
struct Norm {
  const float *weight, *bias;
};
// One part of a row's state: `count` arrays of `slots` frames of `numbers` floats, each frame from a cache line on. The
// arrays lie behind one another, frame f of each in slot f % slots.
struct Part {
  int64_t at;  // in a row's state, in floats
  int64_t count, slots, numbers;
  SAGE_FN int64_t line() const { return padded(numbers); }
  SAGE_FN int64_t array(int64_t index) const { return at + index * slots * line(); }
};
struct Block {
  Norm norm;
  const float *taps, *bias;  // (kernel, dim) oldest first; (dim)
  Linear pointwise;
  int64_t dilation, span;  // span = (kernel - 1) * dilation frames of history,
  int64_t
      ring;  // from here on in a row's state. A block after the fusion has such a ring for each expert, one behind
             // the other
};
struct Modality {
  const float *mean, *scale;
  Linear project;
  Block block[kMaxBlocks];
  Norm norm;
  Linear value, evidence;
  Linear components, rebuild;  // onto the principal components, and back
};
struct alignas(16) Model {
  Shape shape;
  Modality modality[kMaxModalities];
  Norm value_norm;  // (K, dim), rows padded
  Linear joint[2];  // the joint expert's value
  // (M, energies): of the log energies
  float typical_mean[kEnergyLanes], typical_std[kEnergyLanes];
  const float *quality_mean, *quality_scale;  // of the columns of all modalities
  float quality_decay;
  Linear head_of[kMaxModalities]
                [2];  // of each expert: signs -> logits of reliability, then of a frame's log precision
  // (K, stages): a calibrated logit is scale * logit + bias
  float logit_scale[kMaxModalities * kMaxStages], logit_bias[kMaxModalities * kMaxStages];
  Linear emission[2];
  float log_a[kMaxStages * kMaxStages], a[kMaxStages * kMaxStages];  // log_softmax(transition), softmax
  float sharpness;                                                   // 1 without reliability
  // (M): the number of repeats from which on a modality is missing; 0: it may repeat for ever
  float stuck_limit[kMaxModalities];
  Block fused[kMaxBlocks];
  // Of the modalities: an estimate put to scale is gain * estimate + shift, in standard deviations of the targets, (M, targets).
  const float *own_gain, *own_shift;
  float foreign_pace, foreign_initial[1 + kMaxModalities];
  float foreign_log_a[(1 + kMaxModalities) * (1 + kMaxModalities)],
      foreign_a[(1 + kMaxModalities) * (1 + kMaxModalities)];
  float decay[kMaxMemory], prior[kMaxMemory];
  Linear recall;  // of the averages side by side
  Norm norm;
  Linear head[2];
  // A row's state: the blocks' normed frames, of each modality before the fusion and of each expert after it; the log-belief
  // over stages; the log energies in typicality's window but for the current frame, and which of them count; the sums behind
  // the averages of quality; each modality's last standardised input, and how often it has repeated (at most its limit); of
  // each expert and average the weighted sum of its frames, with the sum of the weights and the count behind it; the log-belief
  // over whose streams they are.
  Part history[kMaxBlocks], fused_history[kMaxBlocks];
  Part belief, energy, counted, quality, last[kMaxModalities], repeats, memory, foreign;
  int64_t row_floats;
  size_t bytes;  // of the packed tensors
};

// (rows, ...) each, on the host; those of inactive rows stay as they were.
struct Outputs {
  float *prediction, *unimodal, *weights, *confidence, *stage;
  uint8_t* present;  // (rows, M): the modality's frame counted
};

// One call. Tensors are dense; features (rows, in_dim[m]) each.
struct Step {
  const float* features[kMaxModalities];
  const float* quality;    // (rows, columns of all modalities), or null: unknown
  const uint8_t* present;  // (rows, M) or null: all
  int64_t first, count;    // of `order`: the rows to do in this call
  const int64_t* order;
  float* state;     // (rows, row_floats)
  int64_t* frames;  // (rows) since the reset
  int64_t *absent,
      *refused;  // (rows, M) counters: frames without the modality; among them, those that were not finite
  Outputs out;
  float* scratch;  // of this thread: stream_scratch() floats
};

}  // namespace sage::stream

namespace sage::cpu {
#define SAGE_STREAM(isa)                                                                             \
  namespace isa {                                                                                    \
  /* How this engine keeps a matrix, (outputs, inputs) row after row as it comes. */                 \
  size_t stream_matrix_bytes(bool bf16, int64_t inputs, int64_t outputs);                            \
  void stream_matrix_write(bool bf16, const float* from, int64_t inputs, int64_t outputs, void* to); \
  int64_t stream_scratch(const stream::Shape& shape);                                                \
  void stream_step(const stream::Model& model, const stream::Step& step);                            \
  }
SAGE_STREAM(baseline)
SAGE_STREAM(avx2)
SAGE_STREAM(avx512)
#undef SAGE_STREAM
}  // namespace sage::cpu
