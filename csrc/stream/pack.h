// How the parameters of sage_ext/stream.py, one flat array, become a Model: the order is here alone, for every backend.
#pragma once
#include "model.h"

namespace sage::stream {

// Matrix: bytes(inputs, outputs) and write(from, inputs, outputs, to) of one (outputs, inputs) matrix.
template <class Matrix>
struct Packer {
  const float* in;      // null: measure
  char* out;            // written here,
  const char* address;  // to be read there: the same memory, or its copy on a device
  const Shape& shape;
  int64_t read = 0, state = 0;
  size_t used = 0;

  size_t room(size_t bytes) {
    const size_t at = used;
    used += (bytes + 63) / 64 * 64;
    return at;
  }
  const float* next(int64_t count) {
    const float* at = in ? in + read : nullptr;
    read += count;
    return at;
  }
  const float* stored(size_t at) const { return out ? (const float*)(address + at) : nullptr; }
  // `rows` rows of n numbers, each padded with zeros
  const float* vector(int64_t n, int64_t rows = 1) {
    const float* from = next(n * rows);
    const size_t at = room(size_t(padded(n) * rows) * sizeof(float));
    float* to = out ? (float*)(out + at) : nullptr;
    for (int64_t r = 0; to && r < rows; ++r)
      for (int64_t d = 0; d < padded(n); ++d) to[r * padded(n) + d] = d < n ? from[r * n + d] : 0.0f;
    return stored(at);
  }
  Norm norm(int64_t n) {
    Norm f;
    f.weight = vector(n), f.bias = vector(n);
    return f;
  }
  Linear linear(int64_t inputs, int64_t outputs) {
    Linear f = {};
    f.inputs = inputs, f.outputs = outputs;
    const float* from = next(inputs * outputs);
    const size_t at = room(Matrix::bytes(inputs, outputs));
    if (out) Matrix::write(from, inputs, outputs, out + at);
    f.weight = stored(at);
    f.bias = vector(outputs);
    return f;
  }
  int64_t kept(int64_t floats) {  // of a row's state
    const int64_t at = state;
    state += padded(floats);
    return at;
  }
  Block block(int index, int tracks = 1) {
    Block b;
    b.dilation = int64_t(1) << index, b.span = (shape.kernel - 1) * b.dilation;
    b.norm = norm(shape.dim);
    b.taps = vector(shape.dim, shape.kernel), b.bias = vector(shape.dim);
    b.pointwise = linear(shape.dim, shape.dim);
    b.ring = kept(tracks * b.span * padded(shape.dim));
    return b;
  }
  void numbers(int count, float* to) {
    const float* from = next(count);
    for (int i = 0; from && i < count; ++i) to[i] = from[i];
  }
};

// model.shape in, the rest of it out. out null: only counts and measures.
template <class Matrix>
void pack(Model& model, const float* parameters, char* out, const char* address) {
  const Shape& s = model.shape;
  Packer<Matrix> pack = {parameters, out, address, s};
  const int S = s.stages;
  model.belief = pack.kept(s.reliability ? S : 0);
  model.typicality = pack.kept(s.reliability ? int64_t(s.window - 1) * 4 * s.modalities : 0);
  for (int m = 0; m < s.modalities; ++m) {
    Modality& to = model.modality[m];
    to.last = pack.kept(s.in_dim[m]);
    to.mean = pack.vector(s.in_dim[m]), to.scale = pack.vector(s.in_dim[m]);
    to.project = pack.linear(s.in_dim[m], s.dim);
    for (int b = 0; b < s.own_blocks; ++b) to.block[b] = pack.block(b);
    to.norm = pack.norm(s.dim);
  }
  if (s.reliability) {
    const int64_t width = s.evidence + kTypicality;
    for (int m = 0; m < s.modalities; ++m) {
      Modality& to = model.modality[m];
      to.evidence = pack.linear(s.dim, s.evidence);
      to.reliability[0] = pack.linear(width, s.evidence), to.reliability[1] = pack.linear(s.evidence, S);
      pack.numbers(2, to.typical_mean), pack.numbers(2, to.typical_std);
      pack.numbers(S, to.logit_scale), pack.numbers(S, to.logit_bias);
    }
    model.emission[0] = pack.linear(s.modalities * width, s.evidence);
    model.emission[1] = pack.linear(s.evidence, S);
    pack.numbers(S * S, model.log_a), pack.numbers(S * S, model.a);
    pack.numbers(1, &model.sharpness);
  }
  for (int m = 0; m < s.modalities; ++m) {
    model.modality[m].value = pack.linear(s.dim, s.dim);
    if (s.value_norm) model.modality[m].value_norm = pack.norm(s.dim);
  }
  for (int b = 0; b < s.fused_blocks; ++b) model.fused[b] = pack.block(s.own_blocks + b, 1 + s.modalities);
  model.repeats = pack.kept(s.stuck ? s.modalities : 0);
  model.memory = pack.kept((1 + s.modalities) * memory_floats(s));
  if (s.memory) {
    pack.numbers(s.memory, model.decay), pack.numbers(s.memory, model.prior);
    model.recall = pack.linear(s.memory * s.dim, s.dim);
  }
  model.norm = pack.norm(s.dim);
  model.head[0] = pack.linear(s.dim, s.dim), model.head[1] = pack.linear(s.dim, s.targets);
  model.row_floats = pack.state;
  model.parameters = pack.read;
  model.bytes = pack.used;
}

}  // namespace sage::stream
