// What a streaming model is made of, said once. describe(model, visitor) goes through every tensor under its name in
// SAGE's state_dict (or, if it is folded from others before it gets here, under a name of its own), through every matrix,
// and through every part of a row's state. Packing, the layout of the
// state and the lists that sage_ext/stream.py goes by are visitors. Not for the files that are compiled
// once for each instruction set: it uses the STL.
#pragma once
#include <initializer_list>
#include <string>

#include "model.h"

namespace sage::stream {

using Extents = std::initializer_list<int64_t>;

// Does nothing with anything: a visitor derives from it and hides what it wants to see.
struct Visitor {
  // A tensor (n) or (rows, n), kept as rows padded with zeros, at `where`.
  void rows(const std::string&, Extents, const float*&) {}
  // A small tensor, kept inside the model.
  void numbers(const std::string&, Extents, float*) {}
  // name.weight (outputs, inputs) and name.bias (outputs).
  void linear(const std::string&, int64_t, int64_t, Linear&) {}
  // A part of the state: what a caller sees, (shape), is the frames of these `count` parts one after another, oldest first.
  void state(const std::string&, Extents, Part*, int) {}
};

template <class Visit>
class Description {
 public:
  Description(Model& model, Visit& visit) : model_(model), s_(model.shape), visit_(visit) {}

  void go() {
    const int M = s_.modalities, own = s_.own_blocks;
    for (int m = 0; m < M; ++m) {
      const std::string index = std::to_string(m), encoder = "encoders." + index;
      Modality& to = model_.modality[m];
      visit_.rows("input_mean_" + index, {s_.in_dim[m]}, to.mean);
      visit_.rows("input_scale_" + index, {s_.in_dim[m]}, to.scale);
      visit_.linear(encoder + ".project", s_.in_dim[m], s_.dim, to.project);
      if (s_.reliability)
        visit_.linear("fusion.typicality.project_" + index, s_.in_dim[m], s_.components(m), to.components);
      for (int b = 0; b < own; ++b) block(encoder + ".blocks." + std::to_string(b), b, to.block[b]);
      norm(encoder + ".norm", {s_.dim}, to.norm);
    }
    for (int b = 0; b < own; ++b) {
      Part& rings = model_.history[b];
      const int64_t span = model_.modality[0].block[b].span;
      state("history." + std::to_string(b), {M, span, s_.dim}, {0, M, span, s_.dim}, rings);
      for (int m = 0; m < M; ++m) model_.modality[m].block[b].ring = rings.array(m);
    }

    const int K = s_.experts();
    for (int m = 0; m < M; ++m)
      visit_.linear("fusion.value." + std::to_string(m), s_.dim, s_.dim, model_.modality[m].value);
    if (s_.joint) {
      visit_.linear("fusion.joint.0", M * s_.dim, s_.dim, model_.joint[0]);
      visit_.linear("fusion.joint.2", s_.dim, s_.dim, model_.joint[1]);
    }
    if (s_.value_norm) {
      visit_.rows("fusion.norm_weight", {K, s_.dim}, model_.value_norm.weight);
      visit_.rows("fusion.norm_bias", {K, s_.dim}, model_.value_norm.bias);
    }
    if (s_.reliability)
      reliability();
    else
      model_.sharpness = 1;

    for (int b = 0; b < s_.fused_blocks; ++b) {
      const std::string index = std::to_string(b);
      Block& to = model_.fused[b];
      block("fused_blocks." + index, own + b, to);
      Part& rings = model_.fused_history[b];
      state("fused." + index, {K, to.span, s_.dim}, {0, K, to.span, s_.dim}, rings);
      to.ring = rings.at;
    }
    if (s_.reliability) {
      const int64_t history = s_.window - 1;
      state("belief", {s_.stages}, {0, 1, 1, s_.stages}, model_.belief);
      state("energy", {history, M, kEnergies}, {0, 1, history, kEnergies * M}, model_.energy);
      state("counted", {history, M, kEnergies}, {0, 1, history, kEnergies * M}, model_.counted);
      if (const int64_t Q = s_.qualities()) state("quality", {Q, 3}, {0, 1, 1, 3 * Q}, model_.quality);
    }
    int64_t inputs = 0;
    for (int m = 0; m < M; ++m)
      model_.last[m] = {model_.last[m].at, 1, 1, s_.in_dim[m]}, inputs += s_.in_dim[m];
    visit_.state("last", {inputs}, model_.last, M);
    if (s_.stuck) {
      visit_.numbers("stuck_limit", {M}, model_.stuck_limit);
      state("repeats", {M}, {0, 1, 1, M}, model_.repeats);
    }
    if (s_.memory) {
      visit_.numbers("memory.decay", {s_.memory}, model_.decay);
      visit_.numbers("memory.prior", {s_.memory}, model_.prior);
      visit_.linear("memory.mix", s_.memory * s_.dim, s_.dim, model_.recall);
      state("memory", {K, s_.memory, s_.dim + 2}, {0, K * s_.memory, 1, s_.dim + 2}, model_.memory);
    }
    norm("norm", {s_.dim}, model_.norm);
    visit_.linear("head.0", s_.dim, s_.dim, model_.head[0]);
    visit_.linear("head.3", s_.dim, s_.targets, model_.head[1]);
    if (s_.foreign) {
      const int64_t H = 1 + M;
      visit_.rows("foreign.gain", {M * s_.targets}, model_.own_gain);
      visit_.rows("foreign.shift", {M * s_.targets}, model_.own_shift);
      visit_.numbers("foreign.pace", {}, &model_.foreign_pace);
      visit_.numbers("foreign.initial", {H}, model_.foreign_initial);
      visit_.numbers("foreign.log_a", {H, H}, model_.foreign_log_a);
      visit_.numbers("foreign.a", {H, H}, model_.foreign_a);
      state("foreign", {H}, {0, 1, 1, H}, model_.foreign);
    }
  }

 private:
  // Where a part lies is the visitor's to say.
  void state(const std::string& name, Extents shape, Part layout, Part& to) {
    layout.at = to.at, to = layout;
    visit_.state(name, shape, &to, 1);
  }
  void norm(const std::string& name, Extents shape, Norm& to) {
    visit_.rows(name + ".weight", shape, to.weight), visit_.rows(name + ".bias", shape, to.bias);
  }
  void block(const std::string& name, int index, Block& to) {
    to.dilation = int64_t(1) << index, to.span = (s_.kernel - 1) * to.dilation;
    norm(name + ".norm", {s_.dim}, to.norm);
    visit_.rows(name + ".weight", {s_.kernel, s_.dim}, to.taps);
    visit_.rows(name + ".bias", {s_.dim}, to.bias);
    visit_.linear(name + ".pointwise", s_.dim, s_.dim, to.pointwise);
  }
  void reliability() {
    const int M = s_.modalities, K = s_.experts();
    const int64_t S = s_.stages, E = s_.evidence, signs = s_.all_signs();
    for (int m = 0; m < M; ++m) {
      const std::string index = std::to_string(m);
      Modality& to = model_.modality[m];
      visit_.linear("fusion.evidence." + index + ".0", s_.dim, E, to.evidence);
      visit_.linear("fusion.typicality.rebuild_" + index, s_.components(m), s_.in_dim[m], to.rebuild);
    }
    for (int k = 0; k < K; ++k) {
      const std::string head = "fusion.reliability." + std::to_string(k);
      const int m = k - (K - M);
      visit_.linear(head + ".0", m < 0 ? signs : s_.signs(m), E, model_.head_of[k][0]);
      visit_.linear(head + ".2", E, 2 * S, model_.head_of[k][1]);
    }
    visit_.linear("fusion.emission.0", M * E + signs, E, model_.emission[0]);
    visit_.linear("fusion.emission.2", E, S, model_.emission[1]);
    visit_.numbers("fusion.typicality.mean", {M, kEnergies}, model_.typical_mean);
    visit_.numbers("fusion.typicality.std", {M, kEnergies}, model_.typical_std);
    if (const int64_t Q = s_.qualities()) {
      visit_.rows("fusion.quality.mean", {Q}, model_.quality_mean);
      visit_.rows("fusion.quality.scale", {Q}, model_.quality_scale);
      visit_.numbers("fusion.quality.decay", {}, &model_.quality_decay);
    }
    visit_.numbers("fusion.logit_scale", {K, S}, model_.logit_scale);
    visit_.numbers("fusion.bias", {K, S}, model_.logit_bias);
    visit_.numbers("fusion.log_a", {S, S}, model_.log_a), visit_.numbers("fusion.a", {S, S}, model_.a);
    visit_.numbers("fusion.sharpness", {}, &model_.sharpness);
  }

  Model& model_;
  const Shape& s_;
  Visit& visit_;
};

// model.shape in; pointers, offsets and numbers as the visitor sets them, everything else filled in.
template <class Visit>
void describe(Model& model, Visit& visit) {
  Description<Visit>(model, visit).go();
}

}  // namespace sage::stream
