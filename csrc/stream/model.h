// One frame of the SAGE model for each of many streams: the model as the engines see it, and the CPU engine's interface
// (csrc/cpu/stream.cpp computes, csrc/cpu/session.cpp owns). The CUDA engine is csrc/cuda/stream.cu.
//
// A stream is a row. A row's result is a function of its own numbers alone, to the bit: every sum runs in an order
// that neither the batch, nor the row's place in it, nor the thread count changes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../math/scalar.h"
#include "../ops.h"

namespace sage::stream {

constexpr int kMaxBlocks = 12;
constexpr int kMaxMemory = 8;
constexpr int kGroup = 12;  // rows that share each load of a weight
constexpr int64_t kPad =
    16;  // floats: rows of every buffer start on a cache line, whatever the instruction set
constexpr int kTypicality = 4;     // numbers a modality that typicality adds to its evidence
constexpr float kNormEps = 1e-5f;  // of every LayerNorm
SAGE_FN int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

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
  int memory;  // averages of the precision-weighted memory; 0: none
  int stuck;  // a modality that repeats its frame for the stuck-th time is missing; 0: it may repeat for ever
};

// y = W x + b. How the matrix is packed is the engine's affair.
struct Linear {
  const void* weight;
  const float* bias;
  int64_t inputs, outputs;
  int lanes, columns, depth, slices, tasks;  // CUDA: how the product is shared out
};
struct Norm {
  const float *weight, *bias;
};
struct Block {
  Norm norm;
  const float *taps, *bias;  // (kernel, dim) oldest first; (dim)
  Linear pointwise;
  int64_t dilation, span;  // span = (kernel - 1) * dilation frames of history,
  int64_t ring;  // that lie here in a row's state; frame f in slot f % span. A block after the fusion has
                 // 1 + M rings, one behind the other: of the fused frames, and of each modality alone
};
struct Modality {
  const float *mean, *scale;
  Linear project;
  Block block[kMaxBlocks];
  Norm norm;
  Linear value;
  Norm value_norm;
  Linear evidence, reliability[2];
  float typical_mean[2], typical_std[2];
  float logit_scale[kMaxStages], logit_bias[kMaxStages];
  int64_t last;  // in a row's state: the last frame's standardised input
};
struct alignas(16) Model {
  Shape shape;
  Modality modality[kMaxModalities];
  Linear emission[2];
  float log_a[kMaxStages * kMaxStages], a[kMaxStages * kMaxStages];  // log_softmax(transition), softmax
  float sharpness;
  Block fused[kMaxBlocks];
  float decay[kMaxMemory], prior[kMaxMemory];
  Linear recall;  // of the averages side by side
  Norm norm;
  Linear head[2];
  // A row's state: belief (stages), the typicality ring of window - 1 frames of (energy, counted) x (modality, 2), the last
  // inputs, the convolutions' rings, how often each modality's last input has repeated (at most `stuck`), and a track's
  // memory: for each average the weighted sum of its frames, then the sums of the weights. Offsets and size in floats.
  int64_t belief, typicality, repeats, memory, row_floats;
  int64_t scratch_floats;  // of one thread
  // What pack() took and needs.
  int64_t parameters;
  size_t bytes;
};

// Of one track's memory in a row's state.
SAGE_FN int64_t memory_floats(const Shape& s) {
  return s.memory ? s.memory * padded(s.dim) + padded(s.memory) : 0;
}

// One call. Tensors are dense; features (rows, in_dim[m]) each, and the outputs of inactive rows are not touched.
struct Step {
  const float* features[kMaxModalities];
  const uint8_t* present;  // (rows, M) or null: all
  int64_t first, count;    // of `order`: the rows to do in this call
  const int64_t* order;
  float* state;     // (rows, row_floats)
  int64_t* frames;  // (rows) since the reset
  int64_t *absent,
      *refused;  // (rows, M) counters: frames without the modality; among them, those that were not finite
  float *prediction, *unimodal, *weights, *confidence, *stage;
  float* scratch;
};

}  // namespace sage::stream

namespace sage::cpu {
#define SAGE_STREAM(isa)                                                                                \
  namespace isa {                                                                                       \
  /* Reads the parameters in the order of sage_ext/stream.py; memory null: only counts and measures. */ \
  void stream_pack(stream::Model& model, const float* parameters, void* memory);                        \
  void stream_step(const stream::Model& model, const stream::Step& step);                               \
  }
SAGE_STREAM(baseline)
SAGE_STREAM(avx2)
SAGE_STREAM(avx512)
#undef SAGE_STREAM
}  // namespace sage::cpu
