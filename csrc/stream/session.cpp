#include "session.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sage::stream {
namespace {

void check(bool fits, const std::string& message) {
  if (!fits) throw std::invalid_argument("stream: " + message);
}

}  // namespace

// One call at a time: the GIL is released inside step().
struct Session::Busy {
  std::atomic<bool>& flag;
  explicit Busy(std::atomic<bool>& f) : flag(f) {
    if (flag.exchange(true, std::memory_order_acquire))
      throw std::runtime_error("the session is in use by another thread");
  }
  ~Busy() { flag.store(false, std::memory_order_release); }
};

Session::Session(const Shape& s, int64_t rows) : rows_(rows) {
  check(s.modalities >= 1 && s.modalities <= kMaxModalities, "1..8 modalities");
  for (int m = 0; m < s.modalities; ++m) check(s.in_dim[m] >= 1, "in_dims");
  check(s.stages >= 1 && s.stages <= kMaxStages, "1..16 stages");
  check(s.dim >= 1 && s.targets >= 1 && s.kernel >= 1 && s.window >= 1 && s.evidence >= 0, "sizes");
  check(s.own_blocks >= 0 && s.fused_blocks >= 0 && s.own_blocks + s.fused_blocks <= kMaxBlocks, "blocks");
  check(s.memory >= 0 && s.memory <= kMaxMemory && s.stuck >= 0, "memory");
  check(rows >= 1, "at least one row");
  model_.shape = s;
}

void Session::expect(const float* parameters, int64_t count) const {
  check(parameters && count == model_.parameters,
        "expected " + std::to_string(model_.parameters) + " parameters, got " + std::to_string(count));
}

void Session::step(const Frame& frame, const Outputs& outputs, Exec exec) {
  const Busy busy(busy_);
  run(frame, outputs, exec);
}

void Session::reset(const int64_t* which, int64_t count) {
  const Busy busy(busy_);
  const Shape& s = model_.shape;
  for (int64_t i = 0; i < count; ++i) {
    const Row row = lend(which[i]);
    std::memset(row.state, 0, size_t(model_.row_floats) * 4);
    if (s.reliability)
      for (int j = 0; j < s.stages; ++j) row.state[model_.belief + j] = -std::log(float(s.stages));
    *row.frames = 0;
    take_back(which[i]);
  }
}

// The parts of a row's state in the order that read() documents: part(address, numbers). Where every part lies depends on
// the frame count alone, so reading and writing share this.
template <class Part>
void Session::walk(float* state, int64_t frames, Part&& part) const {
  const Shape& s = model_.shape;
  const int64_t stride = padded(s.dim);
  const auto slot = [&](const Block& b, int64_t f, int track = 0) {
    return state + b.ring + (track * b.span + (frames + f) % b.span) * stride;
  };
  for (int b = 0; b < s.own_blocks; ++b)
    for (int m = 0; m < s.modalities; ++m)
      for (int64_t f = 0; f < model_.modality[m].block[b].span; ++f)
        part(slot(model_.modality[m].block[b], f), s.dim);
  for (int b = 0; b < s.fused_blocks; ++b)
    for (int track = 0; track <= s.modalities; ++track)
      for (int64_t f = 0; f < model_.fused[b].span; ++f) part(slot(model_.fused[b], f, track), s.dim);
  if (s.reliability) {
    part(state + model_.belief, s.stages);
    const int64_t history = s.window - 1, pairs = 2 * s.modalities;
    for (int kind = 0; kind < 2; ++kind)
      for (int64_t f = 0; f < history; ++f)
        part(state + model_.typicality + ((frames + f) % history * 2 + kind) * pairs, pairs);
  }
  for (int m = 0; m < s.modalities; ++m) part(state + model_.modality[m].last, s.in_dim[m]);
  if (s.stuck) part(state + model_.repeats, s.modalities);
  for (int track = 0; track <= s.modalities && s.memory; ++track)
    for (int r = 0; r < s.memory; ++r) {
      float* sums = state + model_.memory + track * memory_floats(s);
      part(sums + r * stride, s.dim);
      part(sums + s.memory * stride + r, 1);
    }
}

int64_t Session::state_size() {
  int64_t size = 0;
  walk(nullptr, 0, [&](float*, int64_t numbers) { size += numbers; });
  return size;
}

void Session::read(const int64_t* which, int64_t count, float* to, int64_t* frames) {
  const Busy busy(busy_);
  for (int64_t i = 0; i < count; ++i) {
    const Row row = lend(which[i]);
    frames[i] = *row.frames;
    walk(row.state, frames[i], [&](const float* from, int64_t numbers) {
      std::memcpy(to, from, size_t(numbers) * 4);
      to += numbers;
    });
  }
}

void Session::write(const int64_t* which, int64_t count, const float* from, const int64_t* frames) {
  const Busy busy(busy_);
  for (int64_t i = 0; i < count; ++i) {
    const Row row = lend(which[i]);
    *row.frames = frames[i];
    walk(row.state, frames[i], [&](float* to, int64_t numbers) {
      std::memcpy(to, from, size_t(numbers) * 4);
      from += numbers;
    });
    take_back(which[i]);
  }
}

}  // namespace sage::stream
