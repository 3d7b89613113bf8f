// What the kernel of a streaming step (stream.cu) and the session that launches it (session.cu) share.
#pragma once
#include "device.cuh"
#include "product.cuh"
#include "../stream/session.h"

namespace sage::cuda {

using stream::Frame;
using stream::Model;
using stream::Outputs;

constexpr int kMostWarps = 16;
// Rows that share each load of a weight after the fusion: with two modalities all three experts of one or two streams; more
// would not fit the registers.
__host__ __device__ constexpr int track_rows(int R) { return R == 1 ? 3 : 6; }

// Where things lie in a block's shared memory, in floats, behind the model. Row r of modality m or expert k is number
// m R + r of its kind.
struct StreamLayout {
  int modalities, in_dim[kMaxModalities];
  int input[kMaxModalities];        // R rows of tiled(in_dim) each, one modality behind the other
  int encoded, mixed, tracks, dim;  // rows of tiled(dim): M R, K R, K R
  int rebuilt[kMaxModalities];      // as `input`
  int components, component;        // rows of tiled(components): M R; that stride
  int side, beside;                 // rows of tiled(M dim): R; that stride
  int signs, all_signs, joint, hidden;  // rows of tiled(widest signs): M R, tiled(all signs): R, tiled(M evidence + signs): R,
                                        // tiled(evidence): (1 + K) R
  int width, spread, joined, narrow;     // those strides
  int recalled, recall;                 // rows of tiled(memory dim): K R; that stride
  int logits, emission, belief, prior, now;  // rows of 2 kMaxStages: K R; of kMaxStages: R each
  int square;                                // rows of kEnergies kMaxModalities: R
  int log_odds, confidence, precision;       // K R each
  int said, saying, scaled;                  // rows of tiled(targets): K R; that stride; rows of M targets: R
  int given, present, row;                   // int: rows of kMaxModalities, R each; (live, frame) int64: 2 R
  int part;                                  // slices' sums
  int zeroed, size;  // what lies before zeroed begins as zeros or inputs: what pads rows must be finite
};

struct StreamLaunch {
  const Model* model;
  Frame frame;
  Outputs out;
  float* state;
  int64_t *frames, *counts;  // (rows); (rows, 1 + 2 M): frames taken, absent, refused
  int64_t rows;
  StreamLayout at;
};

// How a launch is cut: streams a block (1, 2 or 4), warps a block, bytes of shared memory a block.
struct StreamBlocks {
  int streams, warps;
  size_t shared;
};
void launch_stream(const Call& call, const StreamLaunch& q, bool bf16, const StreamBlocks& blocks);

}  // namespace sage::cuda
