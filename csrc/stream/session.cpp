#include "session.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "describe.h"

namespace sage::stream {
namespace {

void check(bool fits, const std::string& message) {
  if (!fits) throw std::invalid_argument("stream: " + message);
}

template <class Sizes>
std::string text(const Sizes& sizes) {
  std::string all;
  for (const int64_t n : sizes) all += (all.empty() ? "" : ", ") + std::to_string(n);
  return "(" + all + ")";
}

// Lays out the state and, with tensors, packs them: one visitor, so that counting and writing cannot differ.
struct Packer : Visitor {
  const Matrices& matrices;
  bool bf16;
  const Tensors* tensors;  // null: measure
  char* out;
  const char* address;
  int64_t taken = 0, floats = 0;
  size_t used = 0;

  Packer(const Model& model, const Matrices& how, const Tensors* from, char* to, const char* there)
      : matrices(how), bf16(model.shape.bf16), tensors(from), out(to), address(there) {}

  // The next tensor, which must be this one; null when measuring.
  const float* take(const std::string& name, Extents shape) {
    if (!tensors) return nullptr;
    const std::string expected = "expected '" + name + "' " + text(shape) + ", got ";
    check(taken < tensors->count, expected + "no more tensors");
    const Tensor& next = tensors->all[taken++];
    const std::vector<int64_t> sizes(next.shape, next.shape + next.dims);
    check(name == next.name && std::vector<int64_t>(shape) == sizes,
          expected + "'" + next.name + "' " + text(sizes));
    check(next.data, "no data for '" + name + "'");
    return next.data;
  }
  size_t room(size_t bytes) {
    const size_t at = used;
    used += (bytes + 63) / 64 * 64;
    return at;
  }
  void rows(const std::string& name, Extents shape, const float*& where) {
    const float* from = take(name, shape);
    const int64_t n = *(shape.end() - 1), rows = shape.size() > 1 ? *shape.begin() : 1;
    const size_t at = room(size_t(padded(n) * rows) * sizeof(float));
    if (!from) return;
    float* to = reinterpret_cast<float*>(out + at);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < padded(n); ++d) to[r * padded(n) + d] = d < n ? from[r * n + d] : 0.0f;
    where = reinterpret_cast<const float*>(address + at);
  }
  void numbers(const std::string& name, Extents shape, float* to) {
    const float* from = take(name, shape);
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;
    if (from) std::memcpy(to, from, size_t(count) * sizeof(float));
  }
  void linear(const std::string& name, int64_t inputs, int64_t outputs, Linear& to) {
    to.inputs = inputs, to.outputs = outputs;
    const float* from = take(name + ".weight", {outputs, inputs});
    const size_t at = room(matrices.bytes(bf16, inputs, outputs));
    if (from) {
      matrices.write(bf16, from, inputs, outputs, out + at);
      to.weight = address + at;
    }
    rows(name + ".bias", {outputs}, to.bias);
  }
  void state(const std::string&, Extents, Part* parts, int count) {
    for (int i = 0; i < count; ++i) {
      parts[i].at = floats;
      floats += padded(parts[i].array(parts[i].count) - parts[i].at);
    }
  }
};

struct Parts : Visitor {
  std::vector<Part> all;
  void state(const std::string&, Extents, Part* parts, int count) {
    all.insert(all.end(), parts, parts + count);
  }
};

}  // namespace

void check_shape(const Shape& s) {
  check(s.modalities >= 1 && s.modalities <= kMaxModalities, "1..8 modalities");
  for (int m = 0; m < s.modalities; ++m) check(s.in_dim[m] >= 1, "in_dims");
  check(s.stages >= 1 && s.stages <= kMaxStages, "1..16 stages");
  check(s.dim >= 1 && s.targets >= 1 && s.kernel >= 1 && s.window >= 1 && s.evidence >= 0, "sizes");
  check(s.own_blocks >= 0 && s.fused_blocks >= 0 && s.own_blocks + s.fused_blocks <= kMaxBlocks, "blocks");
  check(s.memory >= 0 && s.memory <= kMaxMemory, "memory");
  check(s.experts() <= kMaxModalities, "a joint expert with 8 modalities");
  for (int m = 0; m < s.modalities; ++m) check(s.quality_dim[m] >= 0, "quality_dims");
  check(s.reliability || (s.qualities() == 0 && !s.foreign), "quality and doubt need reliability");
}

void measure(Model& model, const Matrices& matrices) {
  Packer packer(model, matrices, nullptr, nullptr, nullptr);
  describe(model, packer);
  model.row_floats = packer.floats, model.bytes = packer.used;
}

void pack(Model& model, const Matrices& matrices, Tensors tensors, char* out, const char* address) {
  Packer packer(model, matrices, &tensors, out, address);
  describe(model, packer);
  if (packer.taken < tensors.count)
    check(false, std::string("'") + tensors.all[packer.taken].name + "' is none of this model's tensors");
}

struct Session::Busy {
  std::atomic<bool>& flag;
  explicit Busy(std::atomic<bool>& f) : flag(f) {
    if (flag.exchange(true, std::memory_order_acquire))
      throw std::runtime_error("the session is in use by another thread");
  }
  ~Busy() { flag.store(false, std::memory_order_release); }
};

Session::Session(const Shape& s, const Matrices& matrices, int64_t rows) : rows_(rows) {
  check(rows >= 1, "at least one row");
  check_shape(s);
  model_.shape = s;
  measure(model_, matrices);
  Parts parts;
  describe(model_, parts);
  parts_ = parts.all;
}

void Session::step(const Frame& frame, const Outputs& outputs, Exec exec) {
  const Busy busy(busy_);
  run(frame, outputs, exec);
}

Totals Session::totals() {
  const Busy busy(busy_);
  return tally();
}

// each(row's state, its frame count, its place in `which`) of these rows, as many at a time as are lent at once.
template <class Each>
void Session::for_each_row(const int64_t* which, int64_t count, bool filled, Each&& each) {
  Row rows[kLent];
  for (int64_t first = 0; first < count; first += kLent) {
    const int64_t some = count - first < kLent ? count - first : kLent;
    lend(which + first, some, filled, rows);
    for (int64_t i = 0; i < some; ++i) {
      if (filled) std::memset(rows[i].state, 0, size_t(model_.row_floats) * 4);
      each(rows[i].state, *rows[i].frames, first + i);
    }
    if (filled) take_back(which + first, some);
  }
}

void Session::begin(const int64_t* which, int64_t count) {
  const Shape& s = model_.shape;
  for_each_row(which, count, true, [&](float* state, int64_t& frames, int64_t) {
    if (s.reliability)
      for (int j = 0; j < s.stages; ++j) state[model_.belief.at + j] = -std::log(float(s.stages));
    if (s.foreign)
      std::memcpy(state + model_.foreign.at, model_.foreign_initial,
                  size_t(1 + s.modalities) * sizeof(float));
    frames = 0;
  });
}

void Session::reset_all() {
  std::vector<int64_t> all(static_cast<size_t>(rows_));
  for (int64_t row = 0; row < rows_; ++row) all[size_t(row)] = row;
  begin(all.data(), rows_);
}

void Session::reset(const int64_t* which, int64_t count, const Outputs& outputs) {
  const Busy busy(busy_);
  begin(which, count);
  for (int64_t i = 0; i < count; ++i) blank(which[i], outputs);
}

void Session::blank(int64_t row, const Outputs& outputs) const {
  Outputs to = outputs;
  for_each_output(model_.shape, to, [&](auto* first, int64_t numbers) {
    std::memset(first + row * numbers, 0, size_t(numbers) * sizeof *first);
  });
}

// piece(address, numbers) of each frame of each part, oldest first. Where it lies depends on the frame count alone, so
// reading and writing share this.
template <class Piece>
void Session::walk(float* state, int64_t frames, Piece&& piece) const {
  for (const Part& part : parts_)
    for (int64_t i = 0; i < part.count; ++i)
      for (int64_t f = 0; f < part.slots; ++f)
        piece(state + part.array(i) + (frames + f) % part.slots * part.line(), part.numbers);
}

int64_t Session::state_size() const {
  int64_t size = 0;
  for (const Part& part : parts_) size += part.count * part.slots * part.numbers;
  return size;
}

void Session::read(const int64_t* which, int64_t count, float* to, int64_t* frames) {
  const Busy busy(busy_);
  for_each_row(which, count, false, [&](float* state, int64_t& taken, int64_t i) {
    frames[i] = taken;
    walk(state, taken, [&](const float* from, int64_t numbers) {
      std::memcpy(to, from, size_t(numbers) * 4);
      to += numbers;
    });
  });
}

void Session::write(const int64_t* which, int64_t count, const float* from, const int64_t* frames,
                    const Outputs& outputs) {
  const Busy busy(busy_);
  for_each_row(which, count, true, [&](float* state, int64_t& taken, int64_t i) {
    taken = frames[i];
    walk(state, taken, [&](float* to, int64_t numbers) {
      std::memcpy(to, from, size_t(numbers) * 4);
      from += numbers;
    });
  });
  for (int64_t i = 0; i < count; ++i) blank(which[i], outputs);
}

}  // namespace sage::stream
