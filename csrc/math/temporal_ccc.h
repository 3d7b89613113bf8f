// Running moments of temporal_ccc's cumulative and half-life modes, one frame at a time (docs/math.md, "Temporal CCC").
//
// The past decays when a valid frame arrives, by the frames gone since the last valid one: as ccc does not change when all
// weights are scaled alike, a long gap changes nothing and underflows nothing.
#pragma once
#include "ccc.h"

namespace sage {

struct Decay {
  double rate, log_rate;  // of one frame: 0.5 ** (1 / halflife), or 1; and its logarithm
};

template <class V>
struct Running {
  Moments<V> m;  // weights as of the last valid frame
  V seen, gap;   // valid frames so far; frames since the last valid one
};

// Takes in frame (x, y), valid 0 or 1. Returns what it applied to the past: 1 where the frame is not valid.
template <class V>
SAGE_FN V running_step(Running<V>& past, const Decay& decay, V valid, V x, V y) {
  using T = typename ScalarOf<V>::Type;
  const V one(T(1)), zero(T(0));
  const auto counts = valid > zero, late = past.gap > zero;
  V applied{T(decay.rate)};
  if (decay.rate < 1 && any(late))
    applied = select(late, exp((past.gap + one) * V(T(decay.log_rate))), applied);
  applied = select(counts, applied, one);
  past.m = push(past.m, applied, valid, x, y);
  past.seen += valid;
  past.gap = select(counts, zero, past.gap + one);
  return applied;
}

}  // namespace sage
