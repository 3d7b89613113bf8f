// A session: the packed model and the state of `rows` streams, on some device. Everything is allocated when it is made.
#pragma once
#include <atomic>

#include "model.h"

namespace sage::stream {

// One frame of every stream. features[m]: (rows, in_dim[m]); present (rows, M) or null: all; active (rows) or null: all.
struct Frame {
  const float* features[kMaxModalities];
  const uint8_t *present, *active;
};
// (rows, ...) each, on the host; those of inactive rows stay as they were.
struct Outputs {
  float *prediction, *unimodal, *weights, *confidence, *stage;
};
// Since the session was made, over all rows.
struct Totals {
  int64_t frames, absent[kMaxModalities], refused[kMaxModalities];
};

class Session {
 public:
  virtual ~Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void step(const Frame& frame, const Outputs& outputs, Exec exec);
  void reset(const int64_t* which, int64_t count);
  // Numbers of one row's state, and the state itself, oldest frame first, whatever the place in the rings:
  // for each own block (M, span, dim), for each fused block (1 + M, span, dim); with reliability belief (S), energy and
  // counted (window - 1, M, 2) each; the last inputs, modality after modality; their repeats (M) where frames can be stuck;
  // the memory (1 + M, averages, dim + 1), each weighted sum with its sum of weights behind it.
  int64_t state_size();
  void read(const int64_t* which, int64_t count, float* state, int64_t* frames);
  void write(const int64_t* which, int64_t count, const float* state, const int64_t* frames);
  virtual Totals totals() = 0;
  int64_t rows() const { return rows_; }
  const Shape& shape() const { return model_.shape; }

 protected:
  // Throws std::invalid_argument.
  Session(const Shape& shape, int64_t rows);
  void expect(const float* parameters, int64_t count) const;  // as many as the model was found to have

  struct Row {
    float* state;
    int64_t* frames;
  };
  // A row's state as it is now, where the host can read and write it until take_back(), which makes changes real.
  virtual Row lend(int64_t row) = 0;
  virtual void take_back(int64_t row) = 0;
  virtual void run(const Frame& frame, const Outputs& outputs, Exec exec) = 0;

  Model model_ = {};
  int64_t rows_;

 private:
  struct Busy;
  template <class Part>
  void walk(float* state, int64_t frames, Part&& part) const;
  std::atomic<bool> busy_{false};
};

}  // namespace sage::stream

// `parameters` in the order of sage_ext/stream.py, `count` of them. `where`: the most threads that a step may be given, or
// the device's index. Throws std::invalid_argument, std::bad_alloc, std::runtime_error.
#define SAGE_OPEN(backend)                                                                          \
  namespace sage::backend {                                                                         \
  stream::Session* open_session(const stream::Shape& shape, const float* parameters, int64_t count, \
                                int64_t rows, int where);                                           \
  }
SAGE_OPEN(cpu)
SAGE_OPEN(cuda)
#undef SAGE_OPEN
