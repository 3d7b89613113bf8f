// A session: the packed model and the state of `rows` streams, on some device. Everything is allocated when it is made.
#pragma once
#include <atomic>
#include <vector>

#include "model.h"

namespace sage::stream {

// One frame of every stream. features[m]: (rows, in_dim[m]); present (rows, M) or null: all; active (rows) or null: all.
// `on_device`: bit m where features[m] lies on the session's GPU, then one each for quality, present and active.
struct Frame {
  const float* features[kMaxModalities];
  const float* quality;  // (rows, columns of all modalities) or null: unknown
  const uint8_t *present, *active;
  uint32_t on_device;
};
// Since the session was made, over all rows.
struct Totals {
  int64_t frames, absent[kMaxModalities], refused[kMaxModalities];
};

// A tensor of the model as the caller has it: dense float32, on the host.
struct Tensor {
  const char* name;
  const int64_t* shape;
  int dims;
  const float* data;
};
struct Tensors {
  const Tensor* all;  // in the order of describe()
  int64_t count;
};

// How an engine keeps a matrix, (outputs, inputs) row after row as it comes.
struct Matrices {
  size_t (*bytes)(bool bf16, int64_t inputs, int64_t outputs);
  void (*write)(bool bf16, const float* from, int64_t inputs, int64_t outputs, void* to);
};

void check_shape(const Shape& shape);  // throws std::invalid_argument
// model.shape in, the rest of it out: how a row's state is laid out, and the bytes that the packed tensors take.
void measure(Model& model, const Matrices& matrices);
// The tensors into `out`, model.bytes of it, to be read at `address`: the same memory, or its copy on a device.
// Throws std::invalid_argument that names the tensor which is missing, in another's place or of another shape.
void pack(Model& model, const Matrices& matrices, Tensors tensors, char* out, const char* address);

// visit(address in outputs, numbers a row) of each output.
constexpr int kOutputs = 6;
template <class Visit>
void for_each_output(const Shape& s, Outputs& outputs, Visit&& visit) {
  visit(outputs.prediction, s.targets), visit(outputs.unimodal, int64_t(s.modalities) * s.targets);
  visit(outputs.weights, s.modalities), visit(outputs.confidence, s.modalities);
  visit(outputs.stage, s.stages), visit(outputs.present, s.modalities);
}

// One call at a time: while a thread is inside step(), reset(), read(), write() or totals(), any of them throws
// std::runtime_error in another.
class Session {
 public:
  virtual ~Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void step(const Frame& frame, const Outputs& outputs, Exec exec);
  // The rows' state is that before a first frame, their outputs zeros.
  void reset(const int64_t* which, int64_t count, const Outputs& outputs);
  // Numbers of one row's state, and the state itself: the parts of describe() one behind another, oldest frame first,
  // whatever the place in the rings. Writing zeros the rows' outputs.
  int64_t state_size() const;
  void read(const int64_t* which, int64_t count, float* state, int64_t* frames);
  void write(const int64_t* which, int64_t count, const float* state, const int64_t* frames,
             const Outputs& outputs);
  Totals totals();
  int64_t rows() const { return rows_; }
  const Shape& shape() const { return model_.shape; }

 protected:
  // Throws std::invalid_argument.
  Session(const Shape& shape, const Matrices& matrices, int64_t rows);

  struct Row {
    float* state;
    int64_t* frames;
  };
  // The state of `count` rows, at most kLent, where the host can read and write it: as it is now or, to be `filled` from
  // nothing, whatever is there, until take_back() makes it the rows' state and their outputs zeros.
  static constexpr int64_t kLent = 64;
  virtual void lend(const int64_t* which, int64_t count, bool filled, Row* rows) = 0;
  virtual void take_back(const int64_t* which, int64_t count) = 0;
  virtual void run(const Frame& frame, const Outputs& outputs, Exec exec) = 0;
  virtual Totals tally() = 0;
  void reset_all();  // by the constructor of a derived class
  void blank(int64_t row, const Outputs& outputs) const;

  Model model_ = {};
  int64_t rows_;

 private:
  struct Busy;
  template <class Piece>
  void walk(float* state, int64_t frames, Piece&& piece) const;
  template <class Each>
  void for_each_row(const int64_t* which, int64_t count, bool filled, Each&& each);
  void begin(const int64_t* which, int64_t count);
  std::vector<Part> parts_;  // of a row's state
  std::atomic<bool> busy_{false};
};

}  // namespace sage::stream

// `where`: the most threads that a step may be given, or the device's index. Throws std::invalid_argument,
// std::bad_alloc, std::runtime_error.
#define SAGE_OPEN(backend)                                                                         \
  namespace sage::backend {                                                                        \
  stream::Session* open_session(const stream::Shape& shape, stream::Tensors tensors, int64_t rows, \
                                int where);                                                        \
  }
SAGE_OPEN(cpu)
SAGE_OPEN(cuda)
#undef SAGE_OPEN
