// csrc/stream without Python, for the sanitizers (test_sanitizers.py): every buffer is a heap block of exactly the size
// that csrc/stream/model.h promises, rows are stepped by several threads, and what a Session computes meanwhile, with streams moved
// to another Session half way, must be the same bits. Exit status 0, or a line saying what differs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "stream/describe.h"
#include "stream/session.h"

using namespace sage;
using namespace sage::stream;

namespace {

uint64_t seed = 1;
double uniform() {  // [0, 1)
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return double(seed >> 40) / double(1 << 24);
}

// The tensors of a model, each a heap block of exactly its size.
struct Drawn : Visitor {
  std::vector<std::string> names;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<std::vector<float>> data;
  std::vector<Tensor> all;

  explicit Drawn(const Shape& s, int stuck) {
    Model model = {};
    model.shape = s;
    describe(model, *this);
    for (size_t i = 0; i < names.size(); ++i) {
      for (size_t m = 0; names[i] == "stuck_limit" && m < data[i].size(); ++m)  // one in three is never stuck
        data[i][m] = m % 3 == 1 ? 0.0f : float(stuck + m);
      all.push_back({names[i].c_str(), shapes[i].data(), int(shapes[i].size()), data[i].data()});
    }
  }
  Tensors tensors() const { return {all.data(), int64_t(all.size())}; }
  void add(const std::string& name, Extents shape) {
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;
    names.push_back(name), shapes.emplace_back(shape), data.emplace_back(count);
    for (float& x : data.back()) x = float(0.05 + 0.1 * uniform());
  }
  void rows(const std::string& name, Extents shape, const float*&) { add(name, shape); }
  void numbers(const std::string& name, Extents shape, float*) { add(name, shape); }
  void linear(const std::string& name, int64_t inputs, int64_t outputs, Linear&) {
    add(name + ".weight", {outputs, inputs}), add(name + ".bias", {outputs});
  }
};

struct Estimates {
  std::vector<float> prediction, unimodal, weights, confidence, stage;
  std::vector<uint8_t> present;
  Estimates(const Shape& s, int64_t rows)
      : prediction(rows * s.targets),
        unimodal(rows * s.modalities * s.targets),
        weights(rows * s.modalities),
        confidence(rows * s.modalities),
        stage(rows * s.stages),
        present(rows * s.modalities) {}
  Outputs addresses() {
    return {prediction.data(), unimodal.data(), weights.data(),
            confidence.data(), stage.data(),    present.data()};
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
bool same(const Estimates& a, const Estimates& b) {
  return same(a.prediction, b.prediction) && same(a.unimodal, b.unimodal) && same(a.weights, b.weights) &&
         same(a.confidence, b.confidence) && same(a.stage, b.stage) && a.present == b.present;
}

void call(Session& session, const std::vector<std::vector<float>>& x, const uint8_t* present,
          const uint8_t* active, const float* quality, Estimates& o) {
  Frame frame = {{}, quality, present, active};
  for (size_t m = 0; m < x.size(); ++m) frame.features[m] = x[m].data();
  session.step(frame, o.addresses(), {1, nullptr});
}

int run(const char* name, const Shape& s, int stuck, int64_t rows, int threads) {
  const Matrices matrices = {cpu::baseline::stream_matrix_bytes, cpu::baseline::stream_matrix_write};
  const Drawn drawn(s, stuck);
  Model model = {};
  model.shape = s;
  measure(model, matrices);
  std::unique_ptr<char[]> packed(new char[model.bytes]);
  pack(model, matrices, drawn.tensors(), packed.get(), packed.get());
  std::vector<float> state(rows * model.row_floats);
  for (int64_t r = 0; r < rows && s.reliability; ++r) {
    for (int j = 0; j < s.stages; ++j)
      state[r * model.row_floats + model.belief.at + j] = -std::log(float(s.stages));
    for (int h = 0; h <= s.modalities && s.foreign; ++h)
      state[r * model.row_floats + model.foreign.at + h] = model.foreign_initial[h];
  }
  std::vector<int64_t> frames(rows), absent(rows * s.modalities), refused(rows * s.modalities);
  std::vector<std::vector<float>> scratch(threads);
  for (auto& one : scratch) one.resize(cpu::baseline::stream_scratch(s));

  std::unique_ptr<Session> session(cpu::open_session(s, drawn.tensors(), rows, 1));
  Estimates ours(s, rows), theirs(s, rows);
  for (int t = 0; t < 40; ++t) {
    std::vector<std::vector<float>> x(s.modalities);
    for (int m = 0; m < s.modalities; ++m) {
      x[m].resize(rows * s.in_dim[m]);
      const bool still = m == 0 && t % 16 > 6;
      for (float& v : x[m]) v = still ? 0.25f : uniform() < 0.002 ? std::nanf("") : float(uniform() - 0.5);
    }
    std::vector<float> quality(rows * s.qualities());
    for (float& v : quality) v = uniform() < 0.2 ? std::nanf("") : float(uniform() - 0.5);
    const float* told = s.qualities() && t % 5 ? quality.data() : nullptr;
    std::vector<uint8_t> present(rows * s.modalities), active(rows);
    for (auto& p : present) p = uniform() < 0.8;
    for (auto& a : active) a = uniform() < 0.8;
    std::vector<int64_t> order;
    for (int64_t r = 0; r < rows; ++r)
      if (active[r]) order.push_back(r);
    Step q = {};
    for (int m = 0; m < s.modalities; ++m) q.features[m] = x[m].data();
    q.quality = told, q.present = present.data(), q.order = order.data(), q.state = state.data(),
    q.frames = frames.data();
    q.absent = absent.data(), q.refused = refused.data();
    q.out = ours.addresses();
    std::vector<std::thread> workers;
    const int64_t count = int64_t(order.size());
    for (int k = 0; k < threads; ++k) {
      Step part = q;
      part.first = count * k / threads, part.count = count * (k + 1) / threads - part.first;
      part.scratch = scratch[k].data();
      workers.emplace_back([&model, part] { cpu::baseline::stream_step(model, part); });
    }
    for (auto& w : workers) w.join();

    call(*session, x, present.data(), active.data(), told, theirs);
    if (!same(ours, theirs)) return std::printf("%s: frame %d differs\n", name, t), 1;
    for (float v : ours.prediction)
      if (!std::isfinite(v)) return std::printf("%s: frame %d is not finite\n", name, t), 1;
    if (t == 20) {  // all streams to another session, through exact buffers
      std::vector<int64_t> which(rows), at(rows);
      for (int64_t r = 0; r < rows; ++r) which[r] = r;
      std::vector<float> flat(rows * session->state_size());
      session->read(which.data(), rows, flat.data(), at.data());
      std::unique_ptr<Session> next(cpu::open_session(s, drawn.tensors(), rows, 1));
      Estimates blanked(s, rows);
      next->write(which.data(), rows, flat.data(), at.data(), blanked.addresses());
      session = std::move(next);
    }
  }
  const int64_t first = 0;
  session->reset(&first, 1, theirs.addresses());
  return 0;
}

Shape shape(int modalities, int64_t in_dim, int64_t dim, int stages, int64_t evidence, int kernel, int own,
            int fused, bool reliability, bool bf16, int memory, bool stuck, bool joint = true,
            int quality = 0, bool foreign = false) {
  Shape s = {};
  s.modalities = modalities;
  for (int m = 0; m < modalities; ++m) s.in_dim[m] = in_dim + m;
  s.dim = dim, s.targets = 2, s.own_blocks = own, s.fused_blocks = fused, s.kernel = kernel;
  s.reliability = reliability, s.stages = reliability ? stages : 1, s.evidence = reliability ? evidence : 0;
  s.window = reliability ? 16 : 1, s.value_norm = true, s.hide_missing = false, s.bf16 = bf16;
  s.memory = memory, s.stuck = stuck, s.joint = joint, s.foreign = foreign;
  for (int m = 0; m < modalities; m += 2) s.quality_dim[m] = quality;
  return s;
}

}  // namespace

int main() {
  int wrong = 0;
  for (bool bf16 : {false, true}) {
    wrong += run("common", shape(2, 40, 64, 4, 32, 5, 2, 2, true, bf16, 3, true), 4, 29, 3);
    wrong += run("odd", shape(3, 7, 19, 3, 5, 4, 1, 2, true, bf16, 2, true, true, 2, true), 1, 14, 2);
    wrong += run("small", shape(1, 1, 1, 1, 1, 1, 1, 0, true, bf16, 1, true, false, 1), 2, 3, 2);
    wrong += run("wide", shape(8, 3, 100, 16, 17, 2, 1, 1, true, bf16, 8, true, false, 3, true), 3, 7, 2);
    wrong += run("seven", shape(7, 3, 33, 16, 17, 2, 1, 1, true, bf16, 8, true, true, 1, true), 3, 7, 2);
    wrong += run("uniform", shape(2, 17, 48, 1, 0, 3, 1, 3, false, bf16, 0, false), 0, 13, 3);
  }
  return wrong;
}
