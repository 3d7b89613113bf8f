// One frame of SAGE for many streams in one launch (session.cu launches it, product.cuh multiplies).
//
// A block takes R streams through the whole model: standardise, project, temporal blocks, evidence, stage filter, fusion,
// blocks on the fused frames and on each modality's alone, head. What passes between layers stays in shared memory; a
// stream's rings lie in global memory, rows laid out as on the CPU (csrc/stream/model.h).
//
// Bytes: the matrices, once a block (1,168 KB float32, 584 KB bfloat16 with the default sizes), from L2; 34 KB of state and
// 2.6 KB of input a stream. Floor: one multiprocessor takes some 64 bytes a cycle from L2, 11 us for the matrices in float32;
// 33 barriers with what lies between them, some 0.15 us each, come on top. The inputs are read from, and the estimates
// written to, the host's pinned memory by the kernel itself: one launch, no copies.
#include "stream.cuh"
#include "../math/activation.h"
#include "../math/frame.h"
#include "../math/leaky_average.h"
#include "../math/reliability_fusion.h"
#include "../math/stage_filter.h"

namespace sage::cuda {
namespace {

using namespace sage::stream;

constexpr int kAhead = 4;  // inputs that a thread has on their way from the host

// ---------------------------------------------------------------------------------------------------- one warp's row
struct Moments {
  float mean, rstd;
};
__device__ __forceinline__ Moments moments(const float* x, int dim, int lane) {
  float s = 0, drift = 0, ss = 0;
  for (int d = lane; d < dim; d += kWarp) s += x[d];
  const float mean = lanes_sum<1, kWarp>(s) / float(dim);
  for (int d = lane; d < dim; d += kWarp) {
    const float c = x[d] - mean;
    drift += c;
    ss = fma(c, c, ss);
  }
  const NormMoments<float> m =
      norm_moments(mean, lanes_sum<1, kWarp>(drift), lanes_sum<1, kWarp>(ss), float(dim), float(kNormEps));
  return {m.mean, m.rstd};
}
__device__ __forceinline__ float normed(float x, const Moments& m, const Norm& norm, int d) {
  return fma((x - m.mean) * m.rstd, norm.weight[d], norm.bias[d]);
}
__device__ __forceinline__ void layer_norm(const Norm& norm, int dim, int lane, float* x) {
  const Moments m = moments(x, dim, lane);
  for (int d = lane; d < dim; d += kWarp) x[d] = normed(x[d], m, norm, d);
}

// A modality a lane: what modality_weights adds up and compares lies in the lanes of a warp.
struct AcrossWarp {
  __device__ __forceinline__ float sum(float x) const { return lanes_sum<1, kWarp>(x); }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) x = sage::max(x, __shfl_xor_sync(kFull, x, o));
    return x;
  }
};

// --------------------------------------------------------------------------------------------------------- the frame
template <class T, int R>
struct Group {
  const StreamLaunch& q;
  const Model& model;
  float* shared;
  int lane, warp, warps;

  __device__ __forceinline__ Group(const StreamLaunch& launch, const Model& m, float* memory)
      : q(launch),
        model(m),
        shared(memory),
        lane(int(threadIdx.x) % kWarp),
        warp(int(threadIdx.x) / kWarp),
        warps(int(blockDim.x) / kWarp) {}

  // Whether each modality is said to be present, and whether it is taken to be.
  __device__ __forceinline__ int* given(int r) const {
    return reinterpret_cast<int*>(shared + q.at.given) + r * kMaxModalities;
  }
  __device__ __forceinline__ int* present(int r) const {
    return reinterpret_cast<int*>(shared + q.at.present) + r * kMaxModalities;
  }
  // Of stream r: its row (one past the last repeats it), whether it moves in this call, its frames so far.
  __device__ __forceinline__ int64_t row(int r) const {
    const int64_t row = int64_t(blockIdx.x) * R + r;
    return row < q.rows ? row : q.rows - 1;
  }
  __device__ __forceinline__ int64_t* now(int r) const {
    return reinterpret_cast<int64_t*>(shared + q.at.row) + 2 * r;
  }
  __device__ __forceinline__ bool live(int r) const { return now(r)[0] != 0; }
  __device__ __forceinline__ int64_t frame(int r) const { return now(r)[1]; }
  __device__ __forceinline__ float* state(int r) const { return q.state + row(r) * model.row_floats; }
  __device__ __forceinline__ float* stages(int at, int r) const { return shared + at + r * kMaxStages; }

  // Inputs as they come, padded with zeros, kAhead a thread. They may lie in the host's memory, a microsecond away, so all
  // threads ask at once.
  __device__ __forceinline__ void ask(int begin, float (&x)[kAhead]) const {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = begin + k * int(blockDim.x);
      x[k] = 0;
      if (i >= q.at.encoded) continue;
      int m = 0;
      while (m + 1 < q.at.modalities && i >= q.at.input[m + 1]) ++m;
      const int n = q.at.in_dim[m], wide = tiled(n), r = (i - q.at.input[m]) / wide,
                d = (i - q.at.input[m]) % wide;
      if (d < n) x[k] = q.frame.features[m][row(r) * n + d];
    }
  }
  __device__ __forceinline__ void put(int begin, const float (&x)[kAhead]) const {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (begin + k * int(blockDim.x) < q.at.encoded) shared[begin + k * int(blockDim.x)] = x[k];
  }

  // The model, the inputs and the flags into shared memory; zeros elsewhere.
  __device__ __forceinline__ void begin() const {
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    float x[kAhead];
    ask(thread, x);
    if (thread < R * kMaxModalities && thread % kMaxModalities < q.at.modalities) {
      const int64_t flag = row(thread / kMaxModalities) * q.at.modalities + thread % kMaxModalities;
      given(0)[thread] = !q.frame.present || q.frame.present[flag];
    }
    if (thread < R) {
      const int64_t at = row(thread);
      now(thread)[0] = int64_t(blockIdx.x) * R + thread == at && (!q.frame.active || q.frame.active[at]);
      now(thread)[1] = q.frames[at];
    }
    for (int i = thread; i < int(sizeof(Model) / sizeof(uint4)); i += threads)
      reinterpret_cast<uint4*>(shared_memory<unsigned char>())[i] =
          reinterpret_cast<const uint4*>(q.model)[i];
    for (int i = q.at.encoded + thread; i < q.at.zeroed; i += threads) shared[i] = 0;
    put(thread, x);
    for (int at = thread + kAhead * threads; at < q.at.encoded; at += kAhead * threads)
      ask(at, x), put(at, x);
  }

  // Standardised input of each modality, zero where it is missing, and the two mean squares that typicality reads; as the
  // CPU has it. A warp a (modality, stream).
  __device__ __forceinline__ void standardise() const {
    const Shape& s = model.shape;
    for (int i = warp; i < s.modalities * R; i += warps) {
      const int m = i / R, r = i % R;
      const Modality& from = model.modality[m];
      const int n = int(s.in_dim[m]);
      const int64_t at = row(r);
      float *x = shared + q.at.input[m] + r * tiled(n), *last = state(r) + model.last[m].at;
      const bool told = live(r) && given(r)[m];
      const float repeats = s.stuck ? state(r)[model.repeats.at + m] : 0.0f;
      FrameSums<float> sums = {0, 0, 0};
      float blank = 0;  // the step's squares if the frame turns out not to count
#pragma unroll 8
      for (int d = lane; d < n; d += kWarp) {
        const float before = last[d], v = told ? (x[d] - from.mean[d]) * from.scale[d] : 0.0f;
        sums.add(v, before);
        blank = fma(before, before, blank);
        x[d] = v;
      }
      sums = {lanes_sum<1, kWarp>(sums.squares), lanes_sum<1, kWarp>(sums.steps),
              lanes_sum<1, kWarp>(sums.moved)};
      blank = lanes_sum<1, kWarp>(blank);
      const FrameVerdict verdict = judge_frame(told, sums.squares, sums.moved, repeats, model.stuck_limit[m]);
      if (!verdict.here)
        for (int d = lane; d < n; d += kWarp) x[d] = 0;
      if (live(r) && !verdict.stuck)
        for (int d = lane; d < n; d += kWarp) last[d] = x[d];
      if (lane == 0) {
        float* square = shared + q.at.square + r * 2 * kMaxModalities + 2 * m;
        square[0] = verdict.here ? sums.squares / float(n) : 0.0f;
        square[1] = (verdict.here ? sums.steps : blank) / float(n);
        present(r)[m] = verdict.here || s.hide_missing;
        if (live(r)) {
          if (s.stuck) state(r)[model.repeats.at + m] = verdict.repeats;
          q.out.present[at * s.modalities + m] = verdict.here;
        }
        if (live(r) && !verdict.here) {
          int64_t* counts = q.counts + at * (1 + 2 * s.modalities);
          ++counts[1 + m];
          counts[1 + s.modalities + m] += told && !verdict.stuck;
        }
      }
    }
  }

  // mixed = silu(depthwise LayerNorm(x)) of `rows` rows, R streams each of some modalities or tracks, with the normed frame
  // kept in the ring in the place of the oldest. Some warps a row, each with some of the channels.
  template <class BlockOf>
  __device__ __forceinline__ void convolve(const float* from, int rows, int tracks,
                                           const BlockOf& block_of) const {
    const Shape& s = model.shape;
    const int dim = int(s.dim), stride = q.at.dim, taps = s.kernel - 1;
    const int share = rows < warps ? warps / rows : 1;
    for (int i = warp; i < rows * share; i += warps) {
      const int at = i / share, r = at % R;
      const Block& block = block_of(at / R);
      const float* x = from + at * stride;
      float* y = shared + q.at.mixed + at * stride;
      const int64_t line = padded(dim);
      float* ring = state(r) + block.ring + (tracks ? at / R : 0) * block.span * line;
      const int64_t start = block.span ? frame(r) % block.span : 0;
      const auto past = [&](int d) {  // of the sum over taps
        float sum = block.bias[d];
        int64_t slot = start;
#pragma unroll 4
        for (int tap = 0; tap < taps; ++tap) {
          sum = fma(ring[slot * line + d], block.taps[tap * line + d], sum);
          slot += block.dilation;
          slot = slot >= block.span ? slot - block.span : slot;
        }
        return sum;
      };
      int d = i % share * kWarp + lane;
      float sum = d < dim ? past(d) : 0.0f;  // on its way while the moments are taken
      const Moments m = moments(x, dim, lane);
      while (d < dim) {
        const float h = normed(x[d], m, block.norm, d);
        y[d] = silu(fma(h, block.taps[taps * line + d], sum));
        if (block.span && live(r)) ring[start * line + d] = h;
        d += share * kWarp;
        if (d < dim) sum = past(d);
      }
    }
  }

  // The evidence that typicality gives, behind the learnt evidence; and its ring moves on by a frame. A lane a (modality,
  // energy or energy of the step).
  __device__ __forceinline__ void assess_typicality(int r) const {
    const Shape& s = model.shape;
    const int pairs = 2 * s.modalities, m = lane / 2, kind = lane % 2, history = s.window - 1;
    if (lane >= pairs) return;
    float *energies = state(r) + model.energy.at + lane, *counts = state(r) + model.counted.at;
    const int start = history ? int(frame(r) % history) : 0, line = int(model.energy.line());
    const bool here = present(r)[m] != 0;
    bool counted = here;
    if (kind) counted = here && history && counts[(start ? start - 1 : history - 1) * line + 2 * m] > 0;
    counts += lane;
    float energy = 0;
    if (counted) energy = log_energy(shared[q.at.square + r * 2 * kMaxModalities + lane]);
    const auto past = [&](int slot) {
      return EnergyWindow<float>{energies[slot * line], counts[slot * line]};
    };
    const EnergyWindow<float> window =
        sum_window(history, start, past, EnergyWindow<float>{energy, counted ? 1.0f : 0.0f});
    if (history && live(r)) energies[start * line] = energy, counts[start * line] = counted;
    const Typicality<float> found =
        typicality(window, here, model.typical_mean[lane], model.typical_std[lane]);
    put_evidence(r, m, int(s.evidence) + kind, found.signed_level);
    put_evidence(r, m, int(s.evidence) + 2 + kind, found.level);
  }
  // Evidence lies twice: in rows of one modality, and of all together.
  __device__ __forceinline__ void put_evidence(int r, int m, int n, float x) const {
    const int width = int(model.shape.evidence) + kTypicality;
    shared[q.at.evidence + (m * R + r) * q.at.width + n] = x;
    shared[q.at.joint + r * q.at.joined + m * width + n] = x;
  }

  // Stage filter, confidences and weights of one stream: a lane a stage, then a lane a modality.
  __device__ __forceinline__ void gate(int r) const {
    const Shape& s = model.shape;
    const int M = s.modalities, S = s.stages;
    const bool mine = lane < M && present(r)[lane < M ? lane : 0];
    const unsigned all = __ballot_sync(kFull, mine);
    float *now = stages(q.at.now, r), score = 0, weight = 0, confidence = 0;
    if (s.reliability) {
      float *belief = stages(q.at.belief, r), *prior = stages(q.at.prior, r);
      float* kept = state(r) + model.belief.at;
      const bool inside = lane < S;
      if (inside) belief[lane] = kept[lane], prior[lane] = exp(kept[lane]);
      __syncwarp();
      float next = -3e38f;
      if (inside) {
        const float evidence = all ? stages(q.at.emission, r)[lane] : 0.0f;
        next = stage_prior(S, model.log_a, model.a, belief, prior, lane) + evidence;
      }
      const float peak = AcrossWarp{}.max(next);
      const float e = inside ? exp(next - peak) : 0.0f, total = lanes_sum<1, kWarp>(e);
      if (inside) {
        now[lane] = e / total;
        if (live(r)) kept[lane] = next - peak - log(total);
      }
      __syncwarp();
      if (mine) {
        const Reliability<float> found = reliability(
            S, static_cast<const float*>(stages(q.at.logits, lane * R + r)), static_cast<const float*>(now));
        confidence = found.confidence, score = found.log_odds * model.sharpness;
      }
    } else {
      if (mine) confidence = 0.5f;
      if (lane == 0) now[0] = 1.0f;
    }
    modality_weights(1, &score, &mine, &weight, AcrossWarp{});
    if (lane < M) shared[q.at.weight + r * kMaxModalities + lane] = weight;
    if (s.memory) {
      const float own = mine ? frame_precision(confidence, model.sharpness) : 0.0f;
      const float total = lanes_sum<1, kWarp>(own);
      if (lane < M) shared[q.at.precision + (1 + lane) * R + r] = own;
      if (lane == 0) shared[q.at.precision + r] = total;
    }
    if (!live(r)) return;
    const int64_t at = row(r);
    if (lane < M) q.out.weights[at * M + lane] = weight, q.out.confidence[at * M + lane] = confidence;
    if (lane < S) q.out.stage[at * S + lane] = now[lane];
  }

  // The value of one modality of a stream, normed, or zeros where it is missing.
  __device__ __forceinline__ void value(int i) const {
    const Shape& s = model.shape;
    const int m = i / R, r = i % R, dim = int(s.dim);
    float* x = shared + q.at.tracks + (R + i) * q.at.dim;
    if (!present(r)[m]) {
      for (int d = lane; d < dim; d += kWarp) x[d] = 0;
    } else if (s.value_norm) {
      const int64_t line = padded(dim);
      layer_norm({model.value_norm.weight + m * line, model.value_norm.bias + m * line}, dim, lane, x);
    }
  }

  // Row i of the tracks goes into its memory; the memory's averages side by side.
  __device__ __forceinline__ void remember(int i) const {
    const Shape& s = model.shape;
    const int r = i % R, dim = int(s.dim), line = int(model.memory.line());
    float* sums = state(r) + model.memory.array(i / R * s.memory);
    const float precision = shared[q.at.precision + i], *x = shared + q.at.tracks + i * q.at.dim;
    float* to = shared + q.at.recalled + i * q.at.recall;
    for (int h = 0; h < s.memory; ++h) {
      float* kept = sums + h * line;  // the weighted sum, and behind it the sum of the weights
      const float decay = model.decay[h], weight = leaky_weight(decay, kept[dim], precision);
      const float scale = leaky_scale(model.prior[h], weight);
      for (int d = lane; d < dim; d += kWarp) {
        const float sum = leaky_sum(decay, kept[d], precision, x[d]);
        if (live(r)) kept[d] = sum;
        to[h * dim + d] = sum * scale;
      }
      __syncwarp();
      if (lane == 0 && live(r)) kept[dim] = weight;
    }
  }

  __device__ __forceinline__ void fuse() const {
    const int M = model.shape.modalities, dim = q.at.dim;
    float* tracks = shared + q.at.tracks;
    for (int i = int(threadIdx.x); i < R * dim; i += int(blockDim.x)) {
      float sum = 0;
      for (int m = 0; m < M; ++m)
        sum = fma(shared[q.at.weight + i / dim * kMaxModalities + m], tracks[(1 + m) * R * dim + i], sum);
      tracks[i] = sum;
    }
  }

  __device__ __forceinline__ void step() const {
    const Shape& s = model.shape;
    const int M = s.modalities, dim = int(s.dim), stride = q.at.dim, tracks = 1 + M;
    const int narrow = q.at.narrow;
    float *part = shared + q.at.part, *encoded = shared + q.at.encoded, *mixed = shared + q.at.mixed;
    float *fused = shared + q.at.tracks, *hidden = shared + q.at.hidden;
    const auto encoded_of = [&](const Linear& f, int m) { return Job{&f, encoded + m * R * stride, stride}; };

    standardise();
    __syncthreads();
    product<T, R>(
        part, M, R,
        [&](int m) { return Job{&model.modality[m].project, shared + q.at.input[m], tiled(s.in_dim[m])}; },
        [&](int m, int r, int n, float y) { encoded[(m * R + r) * stride + n] = y; });
    for (int b = 0; b < s.own_blocks; ++b) {
      convolve(encoded, M * R, 0, [&](int m) -> const Block& { return model.modality[m].block[b]; });
      __syncthreads();
      product<T, R>(
          part, M, R,
          [&](int m) { return Job{&model.modality[m].block[b].pointwise, mixed + m * R * stride, stride}; },
          [&](int m, int r, int n, float y) { encoded[(m * R + r) * stride + n] += y; });
    }
    for (int i = warp; i < M * R; i += warps)
      layer_norm(model.modality[i / R].norm, dim, lane, encoded + i * stride);
    if (s.reliability)
      for (int r = warp; r < R; r += warps) assess_typicality(r);
    __syncthreads();

    const int assessed = s.reliability ? M : 0;
    product<T, R>(
        part, assessed + M, R,
        [&](int j) {
          const int m = j < assessed ? j : j - assessed;
          return encoded_of(j < assessed ? model.modality[m].evidence : model.modality[m].value, m);
        },
        [&](int j, int r, int n, float y) {
          if (j < assessed)
            put_evidence(r, j, n, present(r)[j] ? gelu(y) : 0.0f);
          else
            fused[((1 + j - assessed) * R + r) * stride + n] = y;
        });
    if (s.reliability) {
      product<T, R>(
          part, M + 1, R,
          [&](int m) {
            return m < M ? Job{&model.modality[m].reliability[0], shared + q.at.evidence + m * R * q.at.width,
                               q.at.width}
                         : Job{&model.emission[0], shared + q.at.joint, q.at.joined};
          },
          [&](int m, int r, int n, float y) { hidden[(m * R + r) * narrow + n] = gelu(y); });
      product<T, R>(
          part, M + 1, R,
          [&](int m) {
            return Job{m < M ? &model.modality[m].reliability[1] : &model.emission[1],
                       hidden + m * R * narrow, narrow};
          },
          [&](int m, int r, int n, float y) {
            if (m < M)
              stages(q.at.logits, m * R + r)[n] =
                  fma(y, model.logit_scale[m * s.stages + n], model.logit_bias[m * s.stages + n]);
            else
              stages(q.at.emission, r)[n] = y;
          });
    }
    for (int i = warp; i < R + M * R; i += warps) {
      if (i < R)
        gate(i);
      else
        value(i - R);
    }
    __syncthreads();
    fuse();
    __syncthreads();
    for (int b = 0; b < s.fused_blocks; ++b) {
      convolve(fused, tracks * R, 1, [&](int) -> const Block& { return model.fused[b]; });
      __syncthreads();
      product<T, track_rows(R)>(
          part, 1, tracks * R, [&](int) { return Job{&model.fused[b].pointwise, mixed, stride}; },
          [&](int, int i, int n, float y) { fused[i * stride + n] += y; });
    }
    if (s.memory) {
      for (int i = warp; i < tracks * R; i += warps) remember(i);
      __syncthreads();
      product<T, track_rows(R)>(
          part, 1, tracks * R, [&](int) { return Job{&model.recall, shared + q.at.recalled, q.at.recall}; },
          [&](int, int i, int n, float y) { fused[i * stride + n] += y; });
    }
    for (int i = warp; i < tracks * R; i += warps) layer_norm(model.norm, dim, lane, fused + i * stride);
    __syncthreads();
    product<T, track_rows(R)>(
        part, 1, tracks * R, [&](int) { return Job{&model.head[0], fused, stride}; },
        [&](int, int i, int n, float y) { mixed[i * stride + n] = silu(y); });
    product<T, track_rows(R)>(
        part, 1, tracks * R, [&](int) { return Job{&model.head[1], mixed, stride}; },
        [&](int, int i, int n, float y) {
          const int r = i % R, m = i / R - 1;
          if (!live(r)) return;
          float* to =
              m < 0 ? q.out.prediction + row(r) * s.targets : q.out.unimodal + (row(r) * M + m) * s.targets;
          to[n] = tanh(y);
        });
  }
};

template <class T, int R>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    stream_kernel(const __grid_constant__ StreamLaunch q) {
  unsigned char* memory = shared_memory<unsigned char>();
  const int thread = int(threadIdx.x);
  const Group<T, R> group(q, *reinterpret_cast<const Model*>(memory),
                          reinterpret_cast<float*>(memory + sizeof(Model)));
  group.begin();
  __syncthreads();
  group.step();
  if (thread < R && group.live(thread)) {
    const int64_t row = group.row(thread);
    ++q.frames[row];
    ++q.counts[row * (1 + 2 * group.model.shape.modalities)];
  }
}

template <class T>
void launch_blocks(const Call& call, const StreamLaunch& q, const StreamBlocks& blocks) {
  void (*const kernel)(StreamLaunch) = blocks.streams == 1   ? stream_kernel<T, 1>
                                       : blocks.streams == 2 ? stream_kernel<T, 2>
                                                             : stream_kernel<T, 4>;
  const unsigned grid = grid_x(call, (q.rows + blocks.streams - 1) / blocks.streams);
  launch(call, kernel, dim3(grid), blocks.warps * kWarp, blocks.shared, q);
}

}  // namespace

void launch_stream(const Call& call, const StreamLaunch& q, bool bf16, const StreamBlocks& blocks) {
  if (bf16)
    launch_blocks<__nv_bfloat16>(call, q, blocks);
  else
    launch_blocks<float>(call, q, blocks);
}

}  // namespace sage::cuda
