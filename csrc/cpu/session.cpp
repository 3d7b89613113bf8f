// The session on the CPU: rows shared out over threads, each thread's part one call into stream.cpp.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../stream/session.h"
#include "dispatch.h"

namespace sage::stream {
namespace {

constexpr int64_t kTaskRows = 4;  // fewer are not worth a thread
constexpr size_t kLine = 64;

struct Variant {
  Matrices matrices;
  int64_t (*scratch)(const Shape&);
  void (*step)(const Model&, const Step&);
};
// Of the instruction set in use now. A session keeps the one that it was made with: its matrices are packed for it.
Variant variant() {
#define SAGE_VARIANT(isa)                                                                       \
  {                                                                                             \
    {isa::stream_matrix_bytes, isa::stream_matrix_write}, isa::stream_scratch, isa::stream_step \
  }
#if defined(SAGE_X86_ISAS)
  if (cpu::isa() == 2) return SAGE_VARIANT(cpu::avx512);
  if (cpu::isa() == 1) return SAGE_VARIANT(cpu::avx2);
#endif
  return SAGE_VARIANT(cpu::baseline);
#undef SAGE_VARIANT
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};

class CpuSession final : public Session {
 public:
  CpuSession(const Variant& engine, const Shape& shape, Tensors tensors, int64_t rows, int threads)
      : Session(shape, engine.matrices, rows), step_(engine.step), scratch_floats_(engine.scratch(shape)) {
    const int64_t most = (rows + kTaskRows - 1) / kTaskRows;
    threads_ = int(threads < 1 ? 1 : threads < most ? threads : most);

    const int64_t counters = rows * shape.modalities;
    size_t used = 0;
    const auto room = [&](size_t bytes) {
      const size_t at = used;
      used += (bytes + kLine - 1) / kLine * kLine;
      return at;
    };
    const size_t packed = room(model_.bytes), state = room(size_t(rows * model_.row_floats) * 4),
                 scratch = room(size_t(threads_ * scratch_floats_) * 4), frames = room(size_t(rows) * 8),
                 absent = room(size_t(counters) * 8), refused = room(size_t(counters) * 8),
                 order = room(size_t(rows) * 8);
    memory_.reset(static_cast<char*>(std::aligned_alloc(kLine, used)));
    if (!memory_) throw std::bad_alloc();
    char* base = memory_.get();
    std::memset(base, 0, used);
    pack(model_, engine.matrices, tensors, base + packed, base + packed);
    state_ = reinterpret_cast<float*>(base + state), scratch_ = reinterpret_cast<float*>(base + scratch);
    frames_ = reinterpret_cast<int64_t*>(base + frames), absent_ = reinterpret_cast<int64_t*>(base + absent);
    refused_ = reinterpret_cast<int64_t*>(base + refused), order_ = reinterpret_cast<int64_t*>(base + order);
    for (int64_t r = 0; r < rows; ++r) order_[r] = r;
    reset_all();
  }

 private:
  Totals tally() override {
    Totals t = {};
    t.frames = stepped_;
    const int modalities = model_.shape.modalities;
    for (int64_t i = 0; i < rows_ * modalities; ++i) {
      t.absent[i % modalities] += absent_[i];
      t.refused[i % modalities] += refused_[i];
    }
    return t;
  }

  void lend(const int64_t* which, int64_t count, bool, Row* rows) override {
    for (int64_t i = 0; i < count; ++i) rows[i] = {state_ + which[i] * model_.row_floats, frames_ + which[i]};
  }
  void take_back(const int64_t*, int64_t) override {}

  void run(const Frame& frame, const Outputs& outputs, Exec exec) override {
    int64_t count = 0;
    for (int64_t r = 0; r < rows_; ++r)
      if (!frame.active || frame.active[r]) order_[count++] = r;
    stepped_ += count;
    Step q = {};
    for (int m = 0; m < model_.shape.modalities; ++m) q.features[m] = frame.features[m];
    q.quality = frame.quality, q.present = frame.present, q.order = order_;
    q.state = state_, q.frames = frames_, q.absent = absent_, q.refused = refused_;
    q.out = outputs;
    int64_t tasks = (count + kTaskRows - 1) / kTaskRows;
    tasks = tasks < exec.where ? tasks : exec.where;
    tasks = tasks < threads_ ? tasks : threads_;
    const auto task = [&](int64_t t) {
      Step part = q;
      part.first = count * t / tasks, part.count = count * (t + 1) / tasks - part.first;
      part.scratch = scratch_ + t * scratch_floats_;
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

  int threads_ = 1;
  int64_t stepped_ = 0;
  void (*step_)(const Model&, const Step&);
  int64_t scratch_floats_;
  std::unique_ptr<char, Free> memory_;
  float *state_ = nullptr, *scratch_ = nullptr;
  int64_t *frames_ = nullptr, *absent_ = nullptr, *refused_ = nullptr, *order_ = nullptr;
};

}  // namespace
}  // namespace sage::stream

namespace sage::cpu {

stream::Session* open_session(const stream::Shape& shape, stream::Tensors tensors, int64_t rows,
                              int threads) {
  return new stream::CpuSession(stream::variant(), shape, tensors, rows, threads);
}

}  // namespace sage::cpu
