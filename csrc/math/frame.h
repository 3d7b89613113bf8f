// What one frame of a stream says about itself (docs/math.md, "Typicality", "Quality" and "Precision of a frame"): whether a
// modality's frame counts, how usual its energies are, what its quality says, and its precision. `sage_ext.nn` and
// `sage_ext.models.sage` compute the same of whole sequences, and take their constants from here.
#pragma once
#include <cstdint>

#include "leaky_average.h"
#include "scalar.h"

namespace sage {

constexpr double kEnergyFloor = 1e-8;     // added to a mean square before its log
constexpr double kVarianceFloor = 1e-6;   // the least variance that an average is held against
constexpr double kTypicalityLimit = 4.0;  // of asinh of a z-score, and of the z-score of quality
constexpr int kEnergies = 3;  // of a modality's frame: its own, that of its step, that of its residual
constexpr double kQualityHalflife = 8.0;  // frames, of the average of quality
constexpr double kLogPrecisionLimit = 10.0;
constexpr double kLargestSum = 3.4028235e38;  // of float32: a sum of squares above it has overflowed

// ------------------------------------------------------------------------------------------- does a frame count?
// Sums over the features of one standardised frame and of its step from the frame before; what several lanes or threads
// have of them adds up.
template <class V>
struct FrameSums {
  V squares, steps, moved;  // of x^2, of (x - before)^2, of |x - before|

  SAGE_FN void add(V x, V before) {
    const V step = x - before;
    squares = fma(x, x, squares);
    steps = fma(step, step, steps);
    moved += abs(step);
  }
};

struct FrameVerdict {
  bool here;      // it counts
  bool stuck;     // it does not, for it repeats the last one for the `limit`-th time or more
  float repeats;  // how often the last frame has been repeated, at most `limit`
};
// A frame counts if it was given, is finite with its squares (NaN, Inf and overflow are not) and is not stuck; limit, of the
// frame's modality, 0: it may repeat for ever.
SAGE_FN FrameVerdict judge_frame(bool given, float squares, float moved, float repeats, float limit) {
  const bool finite = given && squares <= float(kLargestSum);  // false for NaN
  repeats = limit > 0 && finite && moved == 0 ? min(repeats + 1.0f, limit) : 0.0f;
  const bool stuck = limit > 0 && repeats >= limit;
  return {finite && !stuck, stuck, repeats};
}

// ------------------------------------------------------------------------------------------------------ typicality
template <class V>
SAGE_FN V log_energy(V mean_square) {
  using T = typename ScalarOf<V>::Type;
  return log(mean_square + V(T(kEnergyFloor)));
}

// Sums of the log energies in the window, and of how many there are.
template <class V>
struct EnergyWindow {
  V energy, count;
};
// The current frame's (energy, counted: 1 or 0) behind `history` frames in a ring, the oldest in slot `start`:
// past(slot) gives those of a slot. A sum runs from the oldest frame to the current one.
template <class V, class Past>
SAGE_FN EnergyWindow<V> sum_window(int history, int start, const Past& past, EnergyWindow<V> now) {
  using T = typename ScalarOf<V>::Type;
  EnergyWindow<V> total = {V(T(0)), V(T(0))};
  int slot = start;
#if defined(__CUDACC__)
#pragma unroll 2
#endif
  for (int f = 0; f < history; ++f) {
    const EnergyWindow<V> one = past(slot);
    total.energy += one.energy, total.count += one.count;
    slot = slot + 1 == history ? 0 : slot + 1;
  }
  total.energy += now.energy, total.count += now.count;
  return total;
}

template <class V>
struct Typicality {
  V signed_level, level;  // asinh of the z-score of the window's average, within +-kTypicalityLimit; its size
};
// 0 where nothing is in the window, or the current frame does not count (here).
template <class V, class Mask>
SAGE_FN Typicality<V> typicality(EnergyWindow<V> window, Mask here, V mean, V std) {
  using T = typename ScalarOf<V>::Type;
  const V zero(T(0)), one(T(1));
  const V z = select(here & (window.count > zero), (window.energy / window.count - mean) / std, zero);
  const V far = abs(z), level = min(log(far + sqrt(fma(far, far, one))), V(T(kTypicalityLimit)));
  return {select(z < zero, -level, level), level};
}

// ------------------------------------------------------------------------------------------------------- precision
// Kept where one frame does not outweigh thousands.
template <class V>
SAGE_FN V frame_precision(V log_precision) {
  using T = typename ScalarOf<V>::Type;
  const V limit = V(T(kLogPrecisionLimit));
  return exp(min(max(log_precision, -limit), limit));
}

// --------------------------------------------------------------------------------------------------------- quality
// What one column of quality says in a frame: its z-score and its average of late, and 1 where it is known.
struct QualitySigns {
  float now, average, known;
};
// sums: weighted sum, weight and count of the average, which move on by this frame.
SAGE_FN QualitySigns quality_signs(float value, bool here, float mean, float scale, float decay,
                                   float* sums) {
  const bool known = here && value - value == 0;  // false for NaN and Inf
  const float limit = float(kTypicalityLimit);
  const float z = known ? min(max((value - mean) * scale, -limit), limit) : 0.0f,
              weight = known ? 1.0f : 0.0f;
  sums[0] = leaky_sum(decay, sums[0], weight, z);
  sums[1] = leaky_weight(decay, sums[1], weight);
  sums[2] = leaky_count(decay, sums[2], weight);
  return {z, sums[0] * leaky_scale(1.0f, sums[1]), weight};
}

}  // namespace sage
