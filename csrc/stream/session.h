// A session: the packed model and the state of `rows` streams. Everything is allocated by the constructor.
#pragma once
#include <atomic>

#include "stream.h"

namespace sage::stream {

class Session {
 public:
  // `parameters` in the order of sage_ext/stream.py, `count` of them; `threads`: the most that step() may be given.
  // Throws std::invalid_argument, std::bad_alloc.
  Session(const Shape& shape, const float* parameters, int64_t count, int64_t rows, int threads);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // features[m]: (rows, in_dim[m]); present (rows, M) or null; active (rows) or null: all. Outputs (rows, ...).
  void step(const float* const* features, const uint8_t* present, const uint8_t* active, float* prediction,
            float* unimodal, float* weights, float* confidence, float* stage, int threads);

  void reset(const int64_t* which, int64_t count);
  // Numbers of one row's state, and the state itself, oldest frame first, whatever the place in the rings:
  // for each own block (M, span, dim), for each fused block (span, dim); with reliability belief (S), energy and
  // counted (window - 1, M, 2) each; the last inputs, modality after modality.
  int64_t state_size() const { return state_size_; }
  void read(const int64_t* which, int64_t count, float* state, int64_t* frames);
  void write(const int64_t* which, int64_t count, const float* state, const int64_t* frames);
  // (rows, M) each, since the construction
  const int64_t* absent() const { return absent_; }
  const int64_t* refused() const { return refused_; }
  int64_t stepped() const { return stepped_; }  // frames of all rows, since the construction
  int64_t rows() const { return rows_; }
  int modalities() const { return model_.shape.modalities; }

 private:
  struct Busy;
  template <class Part>
  void walk(int64_t row, int64_t frames, Part&& part);

  Model model_ = {};
  int64_t rows_ = 0, state_size_ = 0, stepped_ = 0;
  int threads_ = 1;
  void (*step_)(const Model&, const Step&) = nullptr;
  void* memory_ = nullptr;
  float *state_ = nullptr, *scratch_ = nullptr;
  int64_t *frames_ = nullptr, *absent_ = nullptr, *refused_ = nullptr, *order_ = nullptr;
  std::atomic<bool> busy_{false};
};

}  // namespace sage::stream
