#include "session.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "../cpu/dispatch.h"

namespace sage::stream {
namespace {

constexpr int64_t kTaskRows = 4;  // fewer are not worth a thread
constexpr size_t kLine = 64;

struct Variant {
  void (*pack)(Model&, const float*, void*);
  void (*step)(const Model&, const Step&);
};
Variant
variant() {  // of the instruction set in use now: a session keeps it, for its matrices are packed for it
#if defined(SAGE_X86_ISAS)
  if (cpu::isa() == 2) return {cpu::avx512::stream_pack, cpu::avx512::stream_step};
  if (cpu::isa() == 1) return {cpu::avx2::stream_pack, cpu::avx2::stream_step};
#endif
  return {cpu::baseline::stream_pack, cpu::baseline::stream_step};
}

void check(bool fits, const char* message) {
  if (!fits) throw std::invalid_argument(std::string("stream: ") + message);
}

void check_shape(const Shape& s) {
  check(s.modalities >= 1 && s.modalities <= kMaxModalities, "1..8 modalities");
  for (int m = 0; m < s.modalities; ++m) check(s.in_dim[m] >= 1, "in_dims");
  check(s.stages >= 1 && s.stages <= kMaxStages, "1..16 stages");
  check(s.dim >= 1 && s.targets >= 1 && s.kernel >= 1 && s.window >= 1 && s.evidence >= 0, "sizes");
  check(s.own_blocks >= 0 && s.fused_blocks >= 0 && s.own_blocks + s.fused_blocks <= kMaxBlocks, "blocks");
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

Session::Session(const Shape& shape, const float* parameters, int64_t count, int64_t rows, int threads) {
  check_shape(shape);
  check(rows >= 1, "at least one row");
  model_.shape = shape;
  const Variant engine = variant();
  engine.pack(model_, nullptr, nullptr);
  check(parameters && count == model_.parameters,
        ("expected " + std::to_string(model_.parameters) + " parameters, got " + std::to_string(count))
            .c_str());
  rows_ = rows;
  const int64_t most = (rows + kTaskRows - 1) / kTaskRows;
  threads_ = int(threads < 1 ? 1 : threads < most ? threads : most);
  step_ = engine.step;

  const int64_t counters = rows * shape.modalities;
  size_t used = 0;
  const auto room = [&](size_t bytes) {
    const size_t at = used;
    used += (bytes + kLine - 1) / kLine * kLine;
    return at;
  };
  const size_t packed = room(model_.bytes), state = room(size_t(rows * model_.row_floats) * 4),
               scratch = room(size_t(threads_ * model_.scratch_floats) * 4), frames = room(size_t(rows) * 8),
               absent = room(size_t(counters) * 8), refused = room(size_t(counters) * 8),
               order = room(size_t(rows) * 8);
  memory_ = std::aligned_alloc(kLine, used);
  if (!memory_) throw std::bad_alloc();
  std::memset(memory_, 0, used);
  char* base = static_cast<char*>(memory_);
  engine.pack(model_, parameters, base + packed);
  state_ = reinterpret_cast<float*>(base + state), scratch_ = reinterpret_cast<float*>(base + scratch);
  frames_ = reinterpret_cast<int64_t*>(base + frames), absent_ = reinterpret_cast<int64_t*>(base + absent);
  refused_ = reinterpret_cast<int64_t*>(base + refused), order_ = reinterpret_cast<int64_t*>(base + order);
  walk(0, 0, [&](float*, int64_t numbers) { state_size_ += numbers; });
  for (int64_t r = 0; r < rows; ++r) order_[r] = r;
  reset(order_, rows);
}

Session::~Session() { std::free(memory_); }

void Session::step(const float* const* features, const uint8_t* present, const uint8_t* active,
                   float* prediction, float* unimodal, float* weights, float* confidence, float* stage,
                   int threads) {
  const Busy busy(busy_);
  int64_t count = 0;
  for (int64_t r = 0; r < rows_; ++r)
    if (!active || active[r]) order_[count++] = r;
  stepped_ += count;
  Step q = {};
  for (int m = 0; m < model_.shape.modalities; ++m) q.features[m] = features[m];
  q.present = present, q.order = order_;
  q.state = state_, q.frames = frames_, q.absent = absent_, q.refused = refused_;
  q.prediction = prediction, q.unimodal = unimodal, q.weights = weights, q.confidence = confidence,
  q.stage = stage;
  int64_t tasks = (count + kTaskRows - 1) / kTaskRows;
  tasks = tasks < threads ? tasks : threads;
  tasks = tasks < threads_ ? tasks : threads_;
  const auto task = [&](int64_t t) {
    Step part = q;
    part.first = count * t / tasks, part.count = count * (t + 1) / tasks - part.first;
    part.scratch = scratch_ + t * model_.scratch_floats;
    step_(model_, part);
  };
#if defined(_OPENMP)
  if (tasks > 1) {
#pragma omp parallel for schedule(static) num_threads(int(tasks))
    for (int64_t t = 0; t < tasks; ++t) task(t);
    return;
  }
#endif
  if (count > 0) {
    tasks = 1;
    task(0);
  }
}

void Session::reset(const int64_t* which, int64_t count) {
  const Busy busy(busy_);
  const Shape& s = model_.shape;
  for (int64_t i = 0; i < count; ++i) {
    float* state = state_ + which[i] * model_.row_floats;
    std::memset(state, 0, size_t(model_.row_floats) * 4);
    if (s.reliability)
      for (int j = 0; j < s.stages; ++j) state[model_.belief + j] = -std::log(float(s.stages));
    frames_[which[i]] = 0;
  }
}

// The parts of a row's state in the order that read() documents: part(address, numbers). Where every part lies depends on
// the frame count alone, so reading and writing share this.
template <class Part>
void Session::walk(int64_t row, int64_t frames, Part&& part) {
  const Shape& s = model_.shape;
  float* state = state_ + row * model_.row_floats;
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
}

void Session::read(const int64_t* which, int64_t count, float* to, int64_t* frames) {
  const Busy busy(busy_);
  for (int64_t i = 0; i < count; ++i) {
    frames[i] = frames_[which[i]];
    walk(which[i], frames[i], [&](const float* from, int64_t numbers) {
      std::memcpy(to, from, size_t(numbers) * 4);
      to += numbers;
    });
  }
}

void Session::write(const int64_t* which, int64_t count, const float* from, const int64_t* frames) {
  const Busy busy(busy_);
  for (int64_t i = 0; i < count; ++i) {
    frames_[which[i]] = frames[i];
    walk(which[i], frames[i], [&](float* to, int64_t numbers) {
      std::memcpy(to, from, size_t(numbers) * 4);
      from += numbers;
    });
  }
}

}  // namespace sage::stream
