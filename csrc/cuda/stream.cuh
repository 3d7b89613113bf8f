// What the kernel of a streaming step (stream.cu) and the session that launches it (session.cu) share.
#pragma once
#include "device.cuh"
#include "product.cuh"
#include "../stream/session.h"

namespace sage::cuda {

using stream::Frame;
using stream::kMaxBlocks;
using stream::Model;
using stream::Outputs;

constexpr int kMostWarps = 16;
constexpr int kNormRows = 3;  // of weights that a row's LayerNorm and convolution take
constexpr int kSlots = 16;    // of a stream: one of each block, and one of typicality's window
static_assert(kSlots > kMaxBlocks);
// Rows that share each load of a weight after the fusion: with two modalities all three experts of one or two streams; more
// would not fit the registers.
__host__ __device__ constexpr int track_rows(int R) { return R == 1 ? 3 : 6; }

// What happens to all rows before a phase's products; a phase may have none.
enum class Before : int {
  nothing,
  standardise,
  own_block,
  encode,
  assess,
  gate,
  fused_block,
  remember,
  norm,
  weigh
};
struct Phase {
  Before before;
  int index;   // of the block
  int jobs;    // its products: so many of the table's next
  int tracks;  // whether their rows are those of all experts
};

// The place in a ring of `span` frames: frame % span, of a frame below 2^62.
struct Ring {
  uint64_t magic;  // floor((2^64 - 1) / span)
  int span;

  Ring(int64_t n = 1) : magic(~uint64_t(0) / uint64_t(n)), span(int(n)) {}
  __device__ __forceinline__ int slot(int64_t frame) const {
    const uint64_t turns = uint64_t((unsigned __int128)(uint64_t(frame)) * magic >> 64);  // or one too few
    const int left = int(uint64_t(frame) - turns * uint64_t(span));
    return left >= span ? left - span : left;
  }
};

// Where things lie in a block's shared memory, in floats, behind what is read of StreamLaunch::plan. Row r of modality m or
// expert k is number m R + r or k R + r of its kind; K experts.
struct StreamLayout {
  int modalities, in_dim[kMaxModalities], qualities;
  int input[kMaxModalities];        // R rows of tiled(in_dim) each, one modality behind the other
  int encoded, mixed, tracks, dim;  // rows of tiled(dim): M R, K R, K R
  int side, sided;  // the encoded modalities side by side, rows of tiled(M dim): R; that stride
  int components,
      deep;         // on the principal components, rows of the most that a modality has: M R; that stride
  int signs, told;  // rows of the most that one modality has: M R; that stride
  int all_signs, all_told;  // those of all modalities: R; that stride
  int joint, joined,
      learnt;  // what is learnt from all modalities, then, from `learnt` on, the signs of all: R; that stride
  int hidden, narrow;        // rows of tiled(evidence): (K + 1) R; that stride
  int recalled, recall;      // rows of tiled(memory dim): K R; that stride
  int logits;                // rows of 2 kMaxStages: K R
  int emission, prior, now;  // rows of kMaxStages: R each
  int square;                // rows of kEnergies kMaxModalities: R
  int log_odds, confidence;  // rows of kMaxModalities: R each
  int precision;             // K R
  int estimates, targets;    // rows of tiled(targets): K R; that stride
  int quality;               // R qualities
  int past;  // what the convolutions say of the frames before, rows of dim: M R of each block before the fusion, then K R
  int rest, rests, from;  // a row's state behind the rings: R; its floats; where it begins in the row
  int given, present;     // int: rows of kMaxModalities, R each
  int slots;              // int: rows of kSlots, R
  int row, counts;        // int64: see Group::now; rows of 1 + 2 M counters; R each
  int part;               // slices' sums, and before them the weights of LayerNorms, means and scales
  int ahead;              // features of a row whose means and scales fit there: whole warps
  int zeroed, size;       // what lies before zeroed begins as zeros or inputs: what pads rows must be finite
  // Warps that share a row: 2^these. Of a convolution before the fusion, after it, and of the frames before.
  int own_bits, fused_bits, past_bits;
  int stage_bits;  // lanes of an expert, one a stage: 2^this
  int signs_before[kMaxModalities], quality_before[kMaxModalities];  // of the modalities before
};

struct StreamLaunch {
  const void* plan;  // the Model, `phases` Phases, the Jobs of all of them: plan_bytes, in whole 16 bytes
  int plan_bytes, phases;
  int64_t row_floats;  // of a row's state
  Frame frame;
  Outputs out;
  float* state;
  int64_t *frames, *counts;  // (rows); (rows, 1 + 2 M): frames taken, absent, refused
  int64_t rows;
  Ring rings[kMaxBlocks + 1];  // of each block; of typicality's window
  StreamLayout at;
};

// How a launch is cut: streams a block (1, 2 or 4), warps a block, bytes of shared memory a block.
struct StreamBlocks {
  int streams, warps;
  size_t shared;
};
void launch_stream(const Call& call, const StreamLaunch& q, bool bf16, const StreamBlocks& blocks);

}  // namespace sage::cuda
