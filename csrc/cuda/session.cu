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

// ------------------------------------------------------------------------------------------------------- the plan
// The greatest power of two that is not above n, as its exponent.
int bits(int n) {
  int found = 0;
  while (2 << found <= n) ++found;
  return found;
}

constexpr int kMostFloats = 1 << 28;
[[noreturn]] void too_large() {
  throw std::invalid_argument("stream: the model is too large for one GPU block");
}

// Shared memory of a block for R streams, but for what depends on how the products are cut.
StreamLayout lay_out(const Model& model, int R) {
  const Shape& s = model.shape;
  const int M = s.modalities, K = s.experts();
  StreamLayout at = {};
  int64_t used = 0;
  if (model.row_floats > kMostFloats) too_large();
  const auto take = [&](int64_t rows, int64_t stride) {
    const int64_t from = used;
    used += rows * tiled(stride);
    if (used > kMostFloats) too_large();
    return int(from);
  };
  int64_t deepest = 0, most_signs = 0;
  for (int m = 0; m < M; ++m) {
    at.input[m] = take(R, s.in_dim[m]), at.in_dim[m] = int(s.in_dim[m]);
    deepest = s.components(m) > deepest ? s.components(m) : deepest;
    most_signs = s.signs(m) > most_signs ? s.signs(m) : most_signs;
  }
  if (!s.reliability) deepest = most_signs = 0;
  for (int m = 0; m < M; ++m)
    at.signs_before[m] = s.signs_before(m), at.quality_before[m] = s.quality_before(m);
  while ((1 << at.stage_bits) < s.stages) ++at.stage_bits;
  at.modalities = M, at.qualities = s.qualities();
  at.dim = tiled(s.dim), at.sided = tiled(s.joint ? M * s.dim : 0), at.deep = tiled(deepest);
  at.told = tiled(most_signs), at.all_told = tiled(s.reliability && s.joint ? s.all_signs() : 0);
  at.joined = tiled(s.reliability ? M * s.evidence + s.all_signs() : 0), at.narrow = tiled(s.evidence);
  at.recall = tiled(s.memory * s.dim), at.targets = tiled(s.targets);
  at.encoded = take(M * R, at.dim), at.mixed = take(K * R, at.dim), at.tracks = take(K * R, at.dim);
  at.side = take(R, at.sided), at.components = take(M * R, at.deep);
  at.signs = take(M * R, at.told), at.all_signs = take(R, at.all_told), at.joint = take(R, at.joined);
  at.learnt = at.joint + M * int(s.evidence);
  at.hidden = take((K + 1) * R, at.narrow), at.recalled = take(K * R, at.recall);
  at.zeroed = int(used);
  at.logits = take(K * R, 2 * kMaxStages), at.emission = take(R, kMaxStages);
  at.prior = take(R, kMaxStages), at.now = take(R, kMaxStages);
  at.square = take(R, kEnergies * kMaxModalities);
  at.log_odds = take(R, kMaxModalities), at.confidence = take(R, kMaxModalities);
  at.precision = take(1, K * R), at.estimates = take(K * R, at.targets);
  at.quality = take(1, R * at.qualities);
  at.past = take((M * s.own_blocks + K * s.fused_blocks) * R, at.dim);
  const int64_t from = s.reliability ? model.belief.at : model.last[0].at;
  at.from = int(from), at.rests = int(model.row_floats - from), at.rest = take(R, at.rests);
  at.given = take(R, kMaxModalities), at.present = take(R, kMaxModalities);
  at.slots = take(R, kSlots), at.row = take(R, 8), at.counts = take(1, R * 2 * (1 + 2 * M));
  at.size = int(used);
  return at;
}

// A step as phases of products, R streams a block.
class Plan {
 public:
  StreamLayout at;
  int warps = 4;  // of a block
  std::vector<Phase> phases;
  std::vector<Job> jobs;

  Plan(const Model& model, int R) : at(lay_out(model, R)) {
    const Shape& s = model.shape;
    const int M = s.modalities, K = s.experts(), E = int(s.evidence);
    const auto row = [](int base, int stride, int index = 0) { return Rows{base + index * stride, stride}; };
    const auto of = [&](Rows rows, int index) {
      return Rows{rows.at + index * R * rows.stride, rows.stride};
    };
    const Rows encoded = row(at.encoded, at.dim), mixed = row(at.mixed, at.dim),
               tracks = row(at.tracks, at.dim);
    const Rows joined = row(at.joint, at.joined), hidden = row(at.hidden, at.narrow);
    const auto input = [&](int m) { return row(at.input[m], tiled(s.in_dim[m])); };
    const auto components = [&](int m) { return of(row(at.components, at.deep), m); };

    begin(Before::standardise);
    for (int m = 0; m < M; ++m) {
      add(model.modality[m].project, input(m), of(encoded, m));
      if (s.reliability) add(model.modality[m].components, input(m), components(m));
    }
    for (int b = 0; b < s.own_blocks; ++b) {
      begin(Before::own_block, b);
      for (int m = 0; m < M; ++m)
        add(model.modality[m].block[b].pointwise, of(mixed, m), of(encoded, m), Activation::none, Store::add);
    }

    // Values; the joint expert's first layer; evidence, and what is left of the inputs outside their principal components.
    begin(Before::encode);
    for (int m = 0; m < M; ++m) add(model.modality[m].value, of(encoded, m), of(tracks, K - M + m));
    if (s.joint) add(model.joint[0], row(at.side, at.sided), mixed, Activation::silu);
    for (int m = 0; s.reliability && m < M; ++m) {
      add(model.modality[m].evidence, of(encoded, m), Rows{joined.at + m * E, joined.stride},
          Activation::gelu);
      jobs.back().mask = at.present + m;
      add(model.modality[m].rebuild, components(m), input(m), Activation::none, Store::subtract);
    }
    // The heads and the stages' emissions; the joint expert's second layer.
    begin(s.reliability ? Before::assess : Before::nothing);
    for (int k = 0; s.reliability && k < K; ++k) {
      const int m = k - (K - M);
      add(model.head_of[k][0], m < 0 ? row(at.all_signs, at.all_told) : of(row(at.signs, at.told), m),
          of(hidden, k), Activation::gelu);
    }
    if (s.reliability) add(model.emission[0], joined, of(hidden, K), Activation::gelu);
    if (s.joint) add(model.joint[1], mixed, tracks);
    if (s.reliability) {
      begin(Before::nothing);
      for (int k = 0; k < K; ++k)
        add(model.head_of[k][1], of(hidden, k), of(row(at.logits, 2 * kMaxStages), k));
      add(model.emission[1], of(hidden, K), row(at.emission, kMaxStages));
    }
    begin(Before::gate);

    for (int b = 0; b < s.fused_blocks; ++b) {
      begin(Before::fused_block, b, true);
      add(model.fused[b].pointwise, mixed, tracks, Activation::none, Store::add);
    }
    if (s.memory) {
      begin(Before::remember, 0, true);
      add(model.recall, row(at.recalled, at.recall), tracks, Activation::none, Store::add);
    }
    begin(Before::norm, 0, true);
    add(model.head[0], tracks, mixed, Activation::silu);
    begin(Before::nothing, 0, true);
    add(model.head[1], mixed, row(at.estimates, at.targets), Activation::tanh);
    begin(Before::weigh);
    share_out(s, R);
  }

  // As the kernel reads it, behind the model, which comes first.
  size_t bytes() const { return sizeof(Model) + phases.size() * sizeof(Phase) + jobs.size() * sizeof(Job); }
  void write(const Model& model, char* to) const {
    std::memcpy(to, &model, sizeof model), to += sizeof model;
    std::memcpy(to, phases.data(), phases.size() * sizeof(Phase)), to += phases.size() * sizeof(Phase);
    std::memcpy(to, jobs.data(), jobs.size() * sizeof(Job));
  }

 private:
  struct Rows {
    int at, stride;
  };
  void begin(Before before, int index = 0, bool tracks = false) {
    phases.push_back({before, index, 0, tracks});
  }
  void add(const Linear& f, Rows x, Rows y, Activation activation = Activation::none,
           Store store = Store::set) {
    Job job = {};
    job.weight = f.weight, job.bias = f.bias;
    job.x = x.at, job.x_stride = x.stride, job.y = y.at, job.y_stride = y.stride;
    job.mask = -1, job.activation = activation, job.store = store;
    job.inputs = tiled(f.inputs), job.outputs = int(f.outputs), job.wide = Divisor(tiled(f.outputs));
    jobs.push_back(job), ++phases.back().jobs;
  }
  // Shares the products out over warps, as many as there is work for: a product then has as many slices as there are warps,
  // or fewer.
  void share_out(const Shape& s, int R) {
    for_each_phase([&](Job* first, const Phase& phase) {
      while (warps < kMostWarps && share(first, phase, 2 * kTile) > warps) warps *= 2;
    });
    // Numbers that the slices' sums of a phase take, or before them the weights of its LayerNorms, or means and scales.
    const int rows = s.modalities * R;
    int64_t most = int64_t(kNormRows) * at.dim * R * s.experts();
    if (most < 2 * kWarp * rows) most = 2 * kWarp * rows;
    for_each_phase([&](Job* first, const Phase& phase) {
      int deepest = 0, depth = kTile;
      for (int j = 0; j < phase.jobs; ++j) deepest = deepest > first[j].inputs ? deepest : first[j].inputs;
      while (depth < deepest && share(first, phase, depth) > warps) depth += kTile;
      share(first, phase, depth);
      int64_t sums = 0;
      for (int j = 0; j < phase.jobs; ++j) sums += int64_t(first[j].slices) * first[j].wide.by;
      sums *= phase.tracks ? track_rows(R) : R;
      most = most > sums ? most : sums;
    });
    at.part = at.size;
    at.ahead = int(most / (2 * rows)) / kWarp * kWarp;
    if (most > kMostFloats - at.size) too_large();
    at.size += int(most);
    at.own_bits = bits(warps / (s.modalities * R)), at.fused_bits = bits(warps / (s.experts() * R));
    while ((kWarp << at.past_bits) < s.dim && (2 << at.past_bits) <= warps) ++at.past_bits;
  }
  template <class Visit>
  void for_each_phase(const Visit& visit) {
    Job* first = jobs.data();
    for (const Phase& phase : phases) visit(first, phase), first += phase.jobs;
  }
  static int share(Job* first, const Phase& phase, int depth) {
    int tasks = 0;
    for (int j = 0; j < phase.jobs; ++j) tasks += cuda::share_out(first[j], depth);
    return tasks;
  }
};
static_assert(sizeof(Phase) % 16 == 0 && sizeof(Job) % 16 == 0 && sizeof(Model) % 16 == 0,
              "copied by 16 bytes");

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
    choose_group();

    const size_t plan_bytes = size_t(q_.plan_bytes);
    const auto lay = [&](Pieces& there, Pieces& here) {
      q_.plan = there.take<char>(int64_t(plan_bytes));
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
      const int64_t lent = rows < kLent ? rows : kLent;
      lent_ = {here.take<float>(lent * model_.row_floats), here.take<int64_t>(lent)};
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
    const std::unique_ptr<char[]> table(new char[plan_bytes]);
    Plan(model_, blocks_.streams).write(model_, table.get());
    copy(const_cast<void*>(q_.plan), table.get(), plan_bytes, cudaMemcpyHostToDevice);
    check(cudaMemsetAsync(q_.state, 0, size_t(rows * model_.row_floats) * 4, stream));
    check(cudaMemsetAsync(q_.frames, 0, size_t(rows) * 8, stream));
    check(cudaMemsetAsync(q_.counts, 0, size_t(rows * counters()) * 8, stream));
    settle();
    reset_all();
  }
  ~CudaSession() override {
    const DeviceGuard guard(call_.device, false);
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
    const int processors = multiprocessors(call_);
    int room = 0;
    check(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, call_.device));
    for (int R = 1; R <= 4; R *= 2) {
      const Plan plan(model_, R);
      const size_t bytes = plan.bytes() + size_t(plan.at.size) * 4;
      if (bytes > size_t(room)) {
        if (!blocks_.streams)
          throw std::invalid_argument("stream: a step of this model (its in_dims, dim, evidence_dim) takes " +
                                      std::to_string(bytes) + " bytes of shared memory, cuda:" +
                                      std::to_string(call_.device) + " has " + std::to_string(room));
        break;
      }
      q_.at = plan.at, q_.plan_bytes = int(plan.bytes()), q_.phases = int(plan.phases.size());
      blocks_ = {R, plan.warps, bytes};
      if ((rows_ + R - 1) / R <= processors) break;
    }
    q_.rows = rows_, q_.row_floats = model_.row_floats;
    const Shape& s = model_.shape;
    for (int b = 0; b < s.own_blocks + s.fused_blocks; ++b) {
      const int64_t span = int64_t(s.kernel - 1) << b;
      if (span) q_.rings[b] = Ring(span);
    }
    if (s.window > 1) q_.rings[kMaxBlocks] = Ring(s.window - 1);
  }

  // Where the kernel reads `from`, which lies on the device or else on the host: there, if the device can, else from a copy in
  // pinned memory. To ask whether the host's memory is pinned takes as long as to copy some kilobytes.
  const void* reach(const void* from, bool on_device, const void* staged, int64_t bytes) const {
    constexpr int64_t kCopied = 16384;
    if (!from || on_device) return from;
    cudaPointerAttributes found = {};
    if (bytes > kCopied) check(cudaPointerGetAttributes(&found, from));
    if (found.type == cudaMemoryTypeHost) return found.devicePointer;
    std::memcpy(const_cast<void*>(staged), from, size_t(bytes));
    return staged;
  }

  void run(const Frame& frame, const Outputs& outputs, Exec exec) override {
    const Shape& s = model_.shape;
    const DeviceGuard guard(call_.device);
    int bit = 0;
    const auto from = [&](const auto*& to, const auto* given, const auto* staged, int64_t numbers) {
      const bool on_device = frame.on_device >> bit++ & 1;
      to = static_cast<decltype(given)>(reach(given, on_device, staged, numbers * int64_t(sizeof *given)));
    };
    for (int m = 0; m < s.modalities; ++m)
      from(q_.frame.features[m], frame.features[m], staged_.features[m], rows_ * s.in_dim[m]);
    from(q_.frame.quality, frame.quality, staged_.quality, rows_ * s.qualities());
    from(q_.frame.present, frame.present, staged_.present, rows_ * s.modalities);
    from(q_.frame.active, frame.active, staged_.active, rows_);
    if (frame.on_device) {  // after what the caller's stream is still to write
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
  // All rows under way before any is waited for.
  void lend(const int64_t* which, int64_t count, bool filled, Row* rows) override {
    const DeviceGuard guard(call_.device);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = {lent_.state + i * model_.row_floats, lent_.frames + i};
      if (filled) continue;
      copy(rows[i].state, q_.state + which[i] * model_.row_floats, row_bytes(), cudaMemcpyDeviceToHost);
      copy(rows[i].frames, q_.frames + which[i], 8, cudaMemcpyDeviceToHost);
    }
    if (!filled) settle();
  }
  void take_back(const int64_t* which, int64_t count) override {
    const DeviceGuard guard(call_.device);
    for (int64_t i = 0; i < count; ++i) {
      copy(q_.state + which[i] * model_.row_floats, lent_.state + i * model_.row_floats, row_bytes(),
           cudaMemcpyHostToDevice);
      copy(q_.frames + which[i], lent_.frames + i, 8, cudaMemcpyHostToDevice);
    }
    settle();
    for (int64_t i = 0; i < count; ++i) blank(which[i], q_.out);
  }
  size_t row_bytes() const { return size_t(model_.row_floats) * sizeof(float); }

  Call call_;
  StreamLaunch q_ = {};
  StreamBlocks blocks_ = {};
  char* packed_ = nullptr;
  Frame staged_ = {};  // pinned copies of inputs; outputs are pinned in q_.out
  Row lent_ = {};      // a pinned copy of some rows' state
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
