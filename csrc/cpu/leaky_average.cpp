// leaky_average on the CPU.
//
// A task is a sequence. First come the numbers that have no channels: weight, count and scale of each average, R a frame,
// one average after another, so that the divisions run over whole vectors of frames. Then the frames: forward in order of
// time, backward against it, lanes along D, with the R running sums (R D numbers) in the first-level cache, so memory is
// walked once and in order.
//
// What looks both ways needs, at every frame, one side's sums while the other side's are running. They are kept at the
// edges of chunks of kLeakyChunkFrames frames, and between edges found again, a chunk at a time.
//
// Bytes: forward reads D and writes R D numbers a frame, backward reads (2 R + 1) D and writes D. The floor is to move
// those; looking both ways reads x (backward: the gradient) three times, twice of them from cache where a chunk fits.
#include "../ops.h"
#include "isa.h"
#include "parallel.h"
#include "../math/leaky_average.h"

namespace sage::cpu::SAGE_ISA {
namespace {

constexpr int64_t kChunk = kLeakyChunkFrames;
constexpr int64_t kSerialNumbers = 32768;  // a smaller problem stays on one thread

int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

// One sequence: where its tensors and its part of the workspace begin. T: of x and average; A: of all else.
template <class T>
struct Sequence {
  using A = typename Arithmetic<T>::Type;
  using V = Lanes<A>;
  static constexpr int W = V::width;

  const LeakyAverageForward& params;
  int64_t frames, dim, line;  // line: numbers from one average's sums to the next's
  int averages;
  const T* x;
  T* average;
  const A *precision, *state_in;
  A decay[kMaxAverages], prior[kMaxAverages];
  A *weight, *count, *scale, *dot;  // (R, T) each
  A *sums, *edges, *chunk;          // (R, line), (chunks + 1, R, line), (kChunk, R, line)

  Sequence(const LeakyAverageForward& p, int64_t sequence)
      : params(p), frames(p.frames), dim(p.dim), line(padded(p.dim)), averages(p.averages) {
    const int64_t state = averages * (dim + 2), numbers = frames * averages;
    x = (const T*)p.x + sequence * frames * dim;
    average = (T*)p.average + sequence * numbers * dim;
    precision = (const A*)p.precision + sequence * frames;
    state_in = p.state_in ? (const A*)p.state_in + sequence * state : nullptr;
    for (int r = 0; r < averages; ++r) {
      decay[r] = A(__builtin_exp2(-1.0 / double(((const A*)p.halflife)[r])));
      prior[r] = ((const A*)p.prior)[r];
    }
    // The first `batch * averages` doubles are the gradients of each sequence's priors.
    const int64_t own = leaky_average_workspace(1, frames, dim, averages, p.causal) - averages;
    A* space = (A*)(p.workspace + p.batch * averages + sequence * own);
    weight = space, count = weight + numbers, scale = count + numbers, dot = scale + numbers;
    sums = dot + 2 * numbers, edges = sums + averages * line;
    chunk = edges + ((frames + kChunk - 1) / kChunk + 1) * averages * line;
  }

  SAGE_FN A* edge(int64_t c) const { return edges + c * averages * line; }
  SAGE_FN A* in_chunk(int64_t frame) const { return chunk + frame % kChunk * averages * line; }
  int64_t chunks() const { return (frames + kChunk - 1) / kChunk; }
  int64_t chunk_end(int64_t c) const { return (c + 1) * kChunk < frames ? (c + 1) * kChunk : frames; }
  void clear(A* to) const { std::memset(to, 0, size_t(averages * line) * sizeof(A)); }
  void copy(const A* from, A* to) const { std::memcpy(to, from, size_t(averages * line) * sizeof(A)); }

  // The sums' part of a state (R, dim + 2), to and from `sums`.
  void read_state(const A* state) const {
    clear(sums);
    for (int r = 0; state && r < averages; ++r)
      std::memcpy(sums + r * line, state + r * (dim + 2), size_t(dim) * sizeof(A));
  }
  void write_state(A* state) const {
    for (int r = 0; r < averages; ++r)
      std::memcpy(state + r * (dim + 2), sums + r * line, size_t(dim) * sizeof(A));
  }

  // Weight, count and scale of every frame. `state_out`: receives the causal weight and count after the last one, or null.
  void total(A* state_out) const {
    for (int r = 0; r < averages; ++r) {
      A *weights = weight + r * frames, *counts = count + r * frames, *scales = scale + r * frames;
      A w = state_in ? state_in[r * (dim + 2) + dim] : A(0),
        n = state_in ? state_in[r * (dim + 2) + dim + 1] : A(0);
      for (int64_t t = 0; t < frames; ++t) {
        weights[t] = w = leaky_weight(decay[r], w, precision[t]);
        counts[t] = n = leaky_count(decay[r], n, precision[t]);
      }
      if (state_out) state_out[r * (dim + 2) + dim] = w, state_out[r * (dim + 2) + dim + 1] = n;
      if (!params.causal) {
        A later_w(0), later_n(0);  // of the frames behind t, as t sees them
        for (int64_t t = frames - 1; t >= 0; --t) {
          weights[t] += later_w, counts[t] += later_n;
          later_w = decay[r] * leaky_weight(A(1), later_w, precision[t]);
          later_n = decay[r] * leaky_count(A(1), later_n, precision[t]);
        }
      }
      for_each_vector<W>(frames, [&](int64_t t, auto at) {
        at.write(scales + t,
                 leaky_scale(V(prior[r]), at.read(weights + t), at.read(counts + t), params.relative));
      });
    }
  }
};

// S: the number of averages where it is known to the compiler, else 0.
template <class T, int S>
struct Forward : Sequence<T> {
  using Base = Sequence<T>;
  using Base::averages, Base::decay, Base::dim, Base::frames, Base::line, Base::sums;
  using Base::Base;
  using typename Base::A;
  using typename Base::V;

  SAGE_FN int all() const { return S ? S : averages; }

  // `each(d, access, r, offset, term)` of every average and vector of channels of a frame.
  template <class Each>
  SAGE_FN void over_channels(int64_t frame, Each each) const {
    const V precision(this->precision[frame]);
    const T* row = this->x + frame * dim;
    for_each_vector<Base::W>(dim, [&](int64_t d, auto at) {
      const V term = leaky_term(precision, at.read(row + d));
      for (int r = 0; r < all(); ++r) each(d, at, r, r * line + d, term);
    });
  }

  // What the frames behind each chunk come to, at its last frame's right: edge(c).
  void look_back() const {
    this->clear(sums);
    for (int64_t c = this->chunks() - 1; c >= 0; --c) {
      this->copy(sums, this->edge(c));
      for (int64_t t = this->chunk_end(c) - 1; t >= c * kChunk; --t)
        over_channels(t, [&](int64_t, auto, int r, int64_t i, V term) {
          store(sums + i, V(decay[r]) * (load(sums + i) + term));
        });
    }
  }
  // The same inside chunk c: at each frame, what the frames behind it come to as that frame sees them.
  void look_back_in(int64_t c) const {
    A* running = this->edge(c);
    for (int64_t t = this->chunk_end(c) - 1; t >= c * kChunk; --t) {
      this->copy(running, this->in_chunk(t));
      over_channels(t, [&](int64_t, auto, int r, int64_t i, V term) {
        store(running + i, V(decay[r]) * (load(running + i) + term));
      });
    }
  }

  void run(A* state_out) const {
    this->total(state_out);
    const bool causal = this->params.causal;
    if (!causal) look_back();
    this->read_state(this->state_in);
    for (int64_t t = 0; t < frames; ++t) {
      if (!causal && t % kChunk == 0) look_back_in(t / kChunk);
      const A* behind = this->in_chunk(t);
      T* out = this->average + t * averages * dim;
      V scale[kMaxAverages];
      for (int r = 0; r < all(); ++r) scale[r] = V(this->scale[r * frames + t]);
      over_channels(t, [&](int64_t d, auto at, int r, int64_t i, V term) {
        const V sum = fma(V(decay[r]), load(sums + i), term);
        store(sums + i, sum);
        at.write(out + r * dim + d, (causal ? sum : sum + load(behind + i)) * scale[r]);
      });
    }
    this->write_state(state_out);
  }
};

template <class T, int S>
struct Backward : Sequence<T> {
  using Base = Sequence<T>;
  using Base::averages, Base::decay, Base::dim, Base::frames, Base::line, Base::sums;
  using typename Base::A;
  using typename Base::V;

  const T* grad_average;
  const A* grad_state_out;
  T* grad_x;
  A *grad_precision, *grad_state_in;
  double* grad_prior;  // (R) of this sequence

  Backward(const LeakyAverageBackward& p, int64_t sequence) : Base(p.forward, sequence) {
    const int64_t state = averages * (dim + 2);
    grad_average = p.grad_average ? (const T*)p.grad_average + sequence * frames * averages * dim : nullptr;
    grad_state_out = p.grad_state_out ? (const A*)p.grad_state_out + sequence * state : nullptr;
    grad_x = (T*)p.grad_x + sequence * frames * dim;
    grad_precision = (A*)p.grad_precision + sequence * frames;
    grad_state_in = p.grad_state_in ? (A*)p.grad_state_in + sequence * state : nullptr;
    grad_prior = p.forward.workspace + sequence * averages;
  }
  SAGE_FN int all() const { return S ? S : averages; }

  // The gradient that reaches a frame's sum of average r: that of the average, scaled.
  template <class At>
  SAGE_FN V grad_sum(int64_t frame, int r, int64_t d, At at) const {
    return at.read(grad_average + (frame * averages + r) * dim + d) * V(this->scale[r * frames + frame]);
  }
  template <class Each>
  SAGE_FN void over_channels(int64_t frame, Each each) const {
    for_each_vector<Base::W>(dim, [&](int64_t d, auto at) {
      for (int r = 0; r < all(); ++r) each(r, r * line + d, grad_sum(frame, r, d, at));
    });
  }

  // As Forward's look_back, towards the frames before: x reached their averages too.
  void look_ahead() const {
    this->clear(sums);
    for (int64_t c = 0; c < this->chunks(); ++c) {
      this->copy(sums, this->edge(c));
      for (int64_t t = c * kChunk; t < this->chunk_end(c); ++t)
        over_channels(
            t, [&](int r, int64_t i, V grad) { store(sums + i, V(decay[r]) * (load(sums + i) + grad)); });
    }
  }
  void look_ahead_in(int64_t c) const {
    A* running = this->edge(c);
    for (int64_t t = c * kChunk; t < this->chunk_end(c); ++t) {
      this->copy(running, this->in_chunk(t));
      over_channels(
          t, [&](int r, int64_t i, V grad) { store(running + i, V(decay[r]) * (load(running + i) + grad)); });
    }
  }

  // Gradient of x, the inner products that the scalars' gradients need, and the gradient of the sums before the first
  // frame. `sums` holds what the later frames send to frame t.
  void run_channels() const {
    const bool causal = this->params.causal;
    if (!causal && grad_average) look_ahead();
    this->read_state(grad_state_out);
    for (int64_t t = frames - 1; t >= 0; --t) {
      const A precision = this->precision[t];
      const bool seen = !(precision <= A(0));
      const T *row = this->x + t * dim, *out = this->average + t * averages * dim;
      if (!causal && grad_average && (t == frames - 1 || (t + 1) % kChunk == 0)) look_ahead_in(t / kChunk);
      const A* before = this->in_chunk(t);
      V to_precision(A(0)), dot[kMaxAverages], scale[kMaxAverages];
      for (int r = 0; r < all(); ++r) dot[r] = V(A(0)), scale[r] = V(this->scale[r * frames + t]);
      for_each_vector<Base::W>(dim, [&](int64_t d, auto at) {
        V whole(A(0));  // gradient of the term that this frame adds to every average's sum
        for (int r = 0; r < all(); ++r) {
          const int64_t i = r * line + d;
          V grad = load(sums + i);
          if (grad_average) {
            const V given = at.read(grad_average + (t * averages + r) * dim + d);
            dot[r] = fma(given, at.read(out + r * dim + d), dot[r]);
            grad = fma(given, scale[r], grad);
            if (!causal) whole += load(before + i);
          }
          store(sums + i, V(decay[r]) * grad);
          whole += grad;
        }
        at.write(grad_x + t * dim + d, leaky_term(V(precision), whole));
        if (seen) to_precision = fma(whole, at.read(row + d), to_precision);
      });
      grad_precision[t] = sum(to_precision);
      for (int r = 0; r < all(); ++r) this->dot[r * frames + t] = sum(dot[r]);
    }
    if (grad_state_in) this->write_state(grad_state_in);
  }

  // Gradients of precisions, priors and of the weights and counts before the first frame.
  void run_scalars() const {
    for (int r = 0; r < averages; ++r) {
      A *weight = this->weight + r * frames, *count = this->count + r * frames;
      const A *scale = this->scale + r * frames, *dot = this->dot + r * frames;
      double prior = 0;
      for (int64_t t = 0; t < frames; ++t) {  // in place of weight and count come their gradients
        const LeakyScaleGradient<A> grad = leaky_scale_gradient(this->prior[r], weight[t], count[t], scale[t],
                                                                dot[t], this->params.relative);
        weight[t] = grad.weight, count[t] = grad.count;
        prior += double(grad.prior);
      }
      grad_prior[r] = prior;
      const A* last = grad_state_out ? grad_state_out + r * (dim + 2) + dim : nullptr;
      A to_weight = last ? last[0] : A(0), to_count = last ? last[1] : A(0);
      for (int64_t t = frames - 1; t >= 0; --t) {
        to_weight += weight[t], to_count += count[t];
        grad_precision[t] += to_weight;
        to_weight *= decay[r], to_count *= decay[r];
      }
      if (grad_state_in) {
        grad_state_in[r * (dim + 2) + dim] = to_weight;
        grad_state_in[r * (dim + 2) + dim + 1] = to_count;
      }
      if (this->params.causal) continue;
      A earlier(0);
      for (int64_t t = 0; t < frames; ++t) {
        grad_precision[t] += earlier;
        earlier = decay[r] * (earlier + weight[t]);
      }
    }
    for (int64_t t = 0; t < frames; ++t)  // what was not read has no gradient
      grad_precision[t] = this->precision[t] <= A(0) ? A(0) : grad_precision[t];
  }

  void run() const {
    this->total(nullptr);
    run_channels();
    run_scalars();
  }
};

int threads_for(const LeakyAverageForward& params, int threads) {
  return params.batch * params.frames * params.dim * params.averages < kSerialNumbers ? 1 : threads;
}

template <class T, int S>
void forward_all(const LeakyAverageForward& params, int threads) {
  using A = typename Arithmetic<T>::Type;
  const int64_t state = params.averages * (params.dim + 2);
  parallel_for(params.batch, threads_for(params, threads),
               [&](int64_t b) { Forward<T, S>(params, b).run((A*)params.state_out + b * state); });
}
template <class T, int S>
void backward_all(const LeakyAverageBackward& params, int threads) {
  const LeakyAverageForward& forward = params.forward;
  parallel_for(forward.batch, threads_for(forward, threads),
               [&](int64_t b) { Backward<T, S>(params, b).run(); });
  for (int r = 0; r < forward.averages; ++r) {  // sequences in order
    double total = 0;
    for (int64_t b = 0; b < forward.batch; ++b) total += forward.workspace[b * forward.averages + r];
    ((typename Arithmetic<T>::Type*)params.grad_prior)[r] = (typename Arithmetic<T>::Type)total;
  }
}

}  // namespace

// Three averages are what the reference model keeps.
#define SAGE_BY_TYPE(all, params)                                                                   \
  switch (dtype) {                                                                                  \
    case DType::f32:                                                                                \
      return averages == 3 ? all<float, 3>(params, exec.where) : all<float, 0>(params, exec.where); \
    case DType::f64:                                                                                \
      return all<double, 0>(params, exec.where);                                                    \
    case DType::f16:                                                                                \
      return averages == 3 ? all<f16, 3>(params, exec.where) : all<f16, 0>(params, exec.where);     \
    case DType::bf16:                                                                               \
      return averages == 3 ? all<bf16, 3>(params, exec.where) : all<bf16, 0>(params, exec.where);   \
  }

void leaky_average_forward(const LeakyAverageForward& params, Exec exec) {
  const DType dtype = params.dtype;
  const int averages = params.averages;
  SAGE_BY_TYPE(forward_all, params)
}
void leaky_average_backward(const LeakyAverageBackward& params, Exec exec) {
  const DType dtype = params.forward.dtype;
  const int averages = params.forward.averages;
  SAGE_BY_TYPE(backward_all, params)
}

}  // namespace sage::cpu::SAGE_ISA
