// From the estimates of one frame's experts to its prediction (docs/math.md, "Confidence as explained variance" and "Foreign
// streams"). Scalars of one row; the K experts are a joint one, where there is one, then the modalities.
#pragma once
#include <cstdint>

#include "reliability_fusion.h"
#include "stage_filter.h"

namespace sage {

constexpr double kForeignMargin =
    0.02;  // confidence is kept this far from 0 and 1: no disagreement is beyond doubt

// The log-likelihood ratio of "one of the two is foreign" against "both are mine", of one pair of estimates that explain the
// shares r and t of the targets' variance; gap(c): their difference in standard deviations of target c.
template <class Gap>
SAGE_FN float foreign_evidence(float r, float t, int targets, const Gap& gap) {
  const float apart = r + t, mine = apart - 2 * r * t;
  const float slope = 1 / mine - 1 / apart, level = log(mine / apart);
  float sum = 0;
#if defined(SAGE_SHORT_CODE)
#pragma unroll 1
#endif
  for (int c = 0; c < targets; ++c) {
    const float d = gap(c);
    sum += d * d * slope + level;
  }
  return sum / 2;
}

// As the filter takes a confidence.
SAGE_FN float within_doubt(float confidence) {
  const float margin = float(kForeignMargin);
  return min(max(confidence, margin), 1 - margin);
}

// One frame of the filter over 1 + M hypotheses: belief and p, their log-probabilities and probabilities, move on. scaled (M,
// targets): estimates put to scale; confidence (M); here (M): which modalities have something to say.
SAGE_FN void foreign_step(int modalities, int targets, const float* scaled, const float* confidence,
                          const bool* here, float pace, const float* log_a, const float* a, float* belief,
                          float* p) {
  float emission[kMaxStages] = {}, r[kMaxModalities];
  for (int m = 0; m < modalities; ++m) r[m] = within_doubt(confidence[m]);
  for (int m = 0; m < modalities; ++m)
    for (int n = 0; n < m; ++n) {
      if (!here[m] || !here[n]) continue;
      const float told = foreign_evidence(
          r[m], r[n], targets, [&](int c) { return scaled[m * targets + c] - scaled[n * targets + c]; });
      emission[1 + m] += told, emission[1 + n] += told;
    }
  for (int h = 1; h <= modalities; ++h) emission[h] /= pace;
  for (int h = 0; h <= modalities; ++h) p[h] = exp(belief[h]);
  stage_step(1 + modalities, log_a, a, static_cast<const float*>(emission), belief, p);
}

// An expert that explains nothing with probability `doubt`, and otherwise what its log-odds say.
SAGE_FN Reliability<float> doubted(float log_odds, float doubt) {
  const float n = 1 / (1 + exp(log_odds)), r = 1 / (1 + exp(-log_odds)), tiny = 1e-30f;
  const float left = r * (1 - doubt);
  return {left, log(max(left, tiny)) - log(max(n + r * doubt, tiny))};
}

// The share of one modality among all of them, which have `all` between them.
SAGE_FN float share_among(float share, float all) { return all > 1.2e-38f ? share / all : 0.0f; }

// prediction (targets) = sum of share times estimate over the experts that count; weights (M): the modalities' shares among
// themselves. estimates: `targets` numbers of each expert, `stride` apart.
SAGE_FN void mix_experts(int experts, int modalities, int targets, float sharpness, const float* estimates,
                         int64_t stride, const float* log_odds, const bool* counts, float* prediction,
                         float* weights) {
  float share[kMaxModalities], own = 0;
  for (int k = 0; k < experts; ++k) share[k] = log_odds[k] * sharpness;
  modality_weights(experts, static_cast<const float*>(share), counts, share);
  for (int c = 0; c < targets; ++c) {
    float sum = 0;
    for (int k = 0; k < experts; ++k) sum = fma(share[k], estimates[k * stride + c], sum);
    prediction[c] = sum;
  }
  const float* of_modality = share + (experts - modalities);
  for (int m = 0; m < modalities; ++m) own += of_modality[m];
  for (int m = 0; m < modalities; ++m) weights[m] = share_among(of_modality[m], own);
}

}  // namespace sage
