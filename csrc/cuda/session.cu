// The session on a GPU: the model packed and laid out for stream.cu's kernel, the state of all rows on the device.
#include <cstring>
#include <memory>
#include <vector>

#include "stream.cuh"
#include "../stream/describe.h"

namespace sage::cuda {
namespace {

using namespace sage::stream;

constexpr Matrices kMatrices = {[](bool bf16, int64_t inputs, int64_t outputs) {
                                  return bf16 ? Vectors<__nv_bfloat16>::bytes(inputs, outputs)
                                              : Vectors<float>::bytes(inputs, outputs);
                                },
                                [](bool bf16, const float* from, int64_t inputs, int64_t outputs, void* to) {
                                  if (bf16)
                                    Vectors<__nv_bfloat16>::write(from, inputs, outputs, to);
                                  else
                                    Vectors<float>::write(from, inputs, outputs, to);
                                }};

// -------------------------------------------------------------------------------------------------------- the plan
// What is multiplied at once.
struct Jobs {
  std::vector<Linear*> products;
  bool tracks = false;
};
struct Phases : Visitor {
  std::vector<Jobs> all;
  void linear(const std::string&, int64_t, int64_t, Phase phase, Linear& f) {
    if (size_t(phase.number) >= all.size()) all.resize(size_t(phase.number) + 1);
    all[size_t(phase.number)].products.push_back(&f), all[size_t(phase.number)].tracks = phase.tracks;
  }
};
std::vector<Jobs> phases(Model& model) {
  Phases found;
  describe(model, found);
  return found.all;
}

int share(const Jobs& phase, int depth) {
  int tasks = 0;
  for (Linear* f : phase.products) tasks += share_out(*f, depth);
  return tasks;
}

// Warps of a block, and the slices of every product: as many as there are warps, or fewer.
int plan(Model& model) {
  int warps = 4;
  for (const Jobs& phase : phases(model))
    while (warps < kMostWarps && share(phase, 2 * kTile) > warps) warps *= 2;
  for (const Jobs& phase : phases(model)) {
    int deepest = 0;
    for (const Linear* f : phase.products)
      if (tiled(f->inputs) > deepest) deepest = tiled(f->inputs);
    int depth = kTile;
    while (depth < deepest && share(phase, depth) > warps) depth += kTile;
    share(phase, depth);
  }
  return warps;
}

StreamLayout lay_out(Model& model, int R) {
  const Shape& s = model.shape;
  const int M = s.modalities, K = s.experts();
  StreamLayout at = {};
  int64_t used = 0;
  const auto take = [&](int64_t rows, int64_t stride) {
    const int64_t from = used;
    used += rows * tiled(stride);
    if (used > (1 << 28)) throw std::invalid_argument("stream: the model is too large for one GPU block");
    return int(from);
  };
  int64_t deepest = 0, most_signs = 0;
  for (int m = 0; m < M; ++m) {
    at.input[m] = take(R, s.in_dim[m]), at.in_dim[m] = int(s.in_dim[m]);
    deepest = s.components(m) > deepest ? s.components(m) : deepest;
    most_signs = s.signs(m) > most_signs ? s.signs(m) : most_signs;
  }
  if (!s.reliability) deepest = most_signs = 0;
  at.modalities = M, at.qualities = s.qualities();
  at.dim = tiled(s.dim), at.sided = tiled(s.joint ? M * s.dim : 0), at.deep = tiled(deepest);
  at.told = tiled(most_signs), at.all_told = tiled(s.reliability && s.joint ? s.all_signs() : 0);
  at.joined = tiled(s.reliability ? M * s.evidence + s.all_signs() : 0), at.narrow = tiled(s.evidence);
  at.recall = tiled(s.memory * s.dim), at.targets = tiled(s.targets);
  at.encoded = take(M * R, at.dim), at.mixed = take(K * R, at.dim), at.tracks = take(K * R, at.dim);
  at.side = take(R, at.sided), at.components = take(M * R, at.deep);
  at.signs = take(M * R, at.told), at.all_signs = take(R, at.all_told), at.joint = take(R, at.joined);
  at.hidden = take((K + 1) * R, at.narrow), at.recalled = take(K * R, at.recall);
  at.zeroed = int(used);
  at.logits = take(K * R, 2 * kMaxStages), at.emission = take(R, kMaxStages);
  at.belief = take(R, kMaxStages), at.prior = take(R, kMaxStages), at.now = take(R, kMaxStages);
  at.square = take(R, kEnergies * kMaxModalities);
  at.log_odds = take(R, kMaxModalities), at.confidence = take(R, kMaxModalities);
  at.precision = take(1, K * R), at.estimates = take(K * R, at.targets);
  at.quality = take(1, R * at.qualities);
  at.given = take(R, kMaxModalities), at.present = take(R, kMaxModalities), at.row = take(R, 4);
  int64_t most = 0;
  for (const Jobs& phase : phases(model)) {
    int64_t sums = 0;
    for (const Linear* f : phase.products)
      sums += int64_t(f->slices) * tiled(f->outputs) * (phase.tracks ? track_rows(R) : R);
    most = most > sums ? most : sums;
  }
  at.part = take(1, most);
  at.size = int(used);
  return at;
}

// -------------------------------------------------------------------------------------------------------- session
struct FreeDevice {
  void operator()(char* p) const { cudaFree(p); }
};
struct FreeHost {
  void operator()(char* p) const { cudaFreeHost(p); }
};
struct FreeStream {
  void operator()(cudaStream_t s) const { cudaStreamDestroy(s); }
};
struct FreeEvent {
  void operator()(cudaEvent_t e) const { cudaEventDestroy(e); }
};
template <class Handle, class Free>
using Held = std::unique_ptr<std::remove_pointer_t<Handle>, Free>;

// Pieces of one allocation: first counted, then cut from `base`.
struct Pieces {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    const size_t at = used;
    used += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

class CudaSession final : public Session {
 public:
  CudaSession(const Shape& shape, Tensors tensors, int64_t rows, int device)
      : Session(shape, kMatrices, rows), call_{device, nullptr, ""} {
    snprintf(call_.text, sizeof call_.text, "streaming session of %lld rows", (long long)rows);
    const DeviceGuard guard(device);
    blocks_.warps = plan(model_);
    choose_group();

    const auto lay = [&](Pieces& there, Pieces& here) {
      q_.model = there.take<Model>(1);
      packed_ = there.take<char>(int64_t(model_.bytes));
      q_.state = there.take<float>(rows * model_.row_floats);
      q_.frames = there.take<int64_t>(rows), q_.counts = there.take<int64_t>(rows * counters());
      for (int m = 0; m < shape.modalities; ++m)
        staged_.features[m] = here.take<float>(rows * shape.in_dim[m]);
      staged_.quality = here.take<float>(rows * shape.qualities());
      staged_.present = here.take<uint8_t>(rows * shape.modalities),
      staged_.active = here.take<uint8_t>(rows);
      for_each_output(shape, q_.out, [&](auto*& to, int64_t numbers) {
        to = here.take<std::remove_reference_t<decltype(*to)>>(rows * numbers);
      });
      row_ = {here.take<float>(model_.row_floats), here.take<int64_t>(1)};
    };
    Pieces there = {nullptr}, here = {nullptr};
    lay(there, here);
    void* memory = nullptr;
    check(cudaMalloc(&memory, there.used));
    device_.reset(static_cast<char*>(memory));
    check(cudaHostAlloc(&memory, here.used, cudaHostAllocMapped));
    host_.reset(static_cast<char*>(memory));
    std::memset(host_.get(), 0, here.used);
    Pieces on_device = {device_.get()}, on_host = {host_.get()};
    lay(on_device, on_host);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    stream_.reset(stream), call_.stream = stream;
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    event_.reset(event);

    const std::unique_ptr<char[]> packed(new char[model_.bytes]);
    pack(model_, kMatrices, tensors, packed.get(), packed_);
    copy(packed_, packed.get(), model_.bytes, cudaMemcpyHostToDevice);
    copy(const_cast<Model*>(q_.model), &model_, sizeof model_, cudaMemcpyHostToDevice);
    check(cudaMemsetAsync(q_.state, 0, size_t(rows * model_.row_floats) * 4, stream));
    check(cudaMemsetAsync(q_.frames, 0, size_t(rows) * 8, stream));
    check(cudaMemsetAsync(q_.counts, 0, size_t(rows * counters()) * 8, stream));
    settle();
    reset_all();
  }
  ~CudaSession() override {
    const DeviceGuard guard(call_.device);
    event_.reset(), stream_.reset(), host_.reset(), device_.reset();
  }

 private:
  Totals tally() override {
    const DeviceGuard guard(call_.device);
    const int M = model_.shape.modalities;
    const std::unique_ptr<int64_t[]> counts(new int64_t[size_t(rows_ * counters())]);
    copy(counts.get(), q_.counts, size_t(rows_ * counters()) * 8, cudaMemcpyDeviceToHost);
    settle();
    Totals t = {};
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t* row = counts.get() + r * counters();
      t.frames += row[0];
      for (int m = 0; m < M; ++m) t.absent[m] += row[1 + m], t.refused[m] += row[1 + M + m];
    }
    return t;
  }

  int64_t counters() const { return 1 + 2 * model_.shape.modalities; }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) raise(call_, error);
  }
  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) const {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()));
  }
  void settle() const { check(cudaStreamSynchronize(stream_.get())); }

  // As few streams a block as let every block have a multiprocessor, and as fit.
  void choose_group() {
    int processors = 0, room = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call_.device));
    check(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, call_.device));
    for (int R = 1; R <= 4; R *= 2) {
      const StreamLayout at = lay_out(model_, R);
      const size_t bytes = sizeof(Model) + size_t(at.size) * 4;
      if (bytes > size_t(room)) {
        if (!blocks_.streams)
          throw std::invalid_argument("stream: a step of this model (its in_dims, dim, evidence_dim) takes " +
                                      std::to_string(bytes) + " bytes of shared memory, cuda:" +
                                      std::to_string(call_.device) + " has " + std::to_string(room));
        break;
      }
      blocks_.streams = R, q_.at = at, blocks_.shared = bytes;
      if ((rows_ + R - 1) / R <= processors) break;
    }
    q_.rows = rows_;
  }

  // Where the kernel reads `from`: there, if the device can, else from a copy in pinned memory.
  const void* reach(const void* from, const void* staged, int64_t bytes, bool& ordered) const {
    if (!from) return nullptr;
    cudaPointerAttributes found;
    check(cudaPointerGetAttributes(&found, from));
    if (found.type == cudaMemoryTypeUnregistered) {
      std::memcpy(const_cast<void*>(staged), from, size_t(bytes));
      return staged;
    }
    if (found.type == cudaMemoryTypeDevice && found.device != call_.device)
      throw std::invalid_argument("stream: an input lies on another GPU");
    ordered = ordered || found.type != cudaMemoryTypeHost;
    return found.devicePointer;
  }

  void run(const Frame& frame, const Outputs& outputs, Exec exec) override {
    const Shape& s = model_.shape;
    const DeviceGuard guard(call_.device);
    bool ordered = false;
    const auto from = [&](const auto*& to, const auto* given, const auto* staged, int64_t numbers) {
      to = static_cast<decltype(given)>(reach(given, staged, numbers * int64_t(sizeof *given), ordered));
    };
    for (int m = 0; m < s.modalities; ++m)
      from(q_.frame.features[m], frame.features[m], staged_.features[m], rows_ * s.in_dim[m]);
    from(q_.frame.quality, frame.quality, staged_.quality, rows_ * s.qualities());
    from(q_.frame.present, frame.present, staged_.present, rows_ * s.modalities);
    from(q_.frame.active, frame.active, staged_.active, rows_);
    if (ordered) {  // after what the caller's stream is still to write
      check(cudaEventRecord(event_.get(), static_cast<cudaStream_t>(exec.stream)));
      check(cudaStreamWaitEvent(stream_.get(), event_.get(), 0));
    }
    launch_stream(call_, q_, s.bf16, blocks_);
    settle();
    void* to[kOutputs];
    int i = 0;
    Outputs given = outputs;
    for_each_output(s, given, [&](auto* address, int64_t) { to[i++] = address; });
    i = 0;
    for_each_output(s, q_.out, [&](auto* staged, int64_t numbers) {
      std::memcpy(to[i++], staged, size_t(rows_ * numbers) * sizeof *staged);
    });
  }
  Row lend(int64_t row) override {
    const DeviceGuard guard(call_.device);
    copy(row_.state, q_.state + row * model_.row_floats, size_t(model_.row_floats) * 4,
         cudaMemcpyDeviceToHost);
    copy(row_.frames, q_.frames + row, 8, cudaMemcpyDeviceToHost);
    settle();
    return row_;
  }
  void take_back(int64_t row) override {
    const DeviceGuard guard(call_.device);
    copy(q_.state + row * model_.row_floats, row_.state, size_t(model_.row_floats) * 4,
         cudaMemcpyHostToDevice);
    copy(q_.frames + row, row_.frames, 8, cudaMemcpyHostToDevice);
    settle();
    blank(row, q_.out);
  }

  Call call_;
  StreamLaunch q_ = {};
  StreamBlocks blocks_ = {};
  char* packed_ = nullptr;
  Frame staged_ = {};  // pinned copies of inputs; outputs are pinned in q_.out
  Row row_ = {};       // a pinned copy of one row's state
  Held<char*, FreeDevice> device_;
  Held<char*, FreeHost> host_;
  Held<cudaStream_t, FreeStream> stream_;
  Held<cudaEvent_t, FreeEvent> event_;
};

}  // namespace

stream::Session* open_session(const stream::Shape& shape, stream::Tensors tensors, int64_t rows, int device) {
  return new CudaSession(shape, tensors, rows, device);
}

}  // namespace sage::cuda
