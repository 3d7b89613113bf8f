// One frame of SAGE for many streams in one launch, and the session around it.
//
// A block takes R streams through the whole model: standardise, project, temporal blocks, evidence, stage filter, fusion,
// blocks on the fused frames and on each modality's alone, head. What passes between layers stays in shared memory; a
// stream's rings lie in global memory, rows laid out as on the CPU (csrc/stream/model.h).
//
// Bytes: the matrices, once a block (1,168 KB float32, 584 KB bfloat16 with the default sizes), from L2; 34 KB of state and
// 2.6 KB of input a stream. Floor: one multiprocessor takes some 64 bytes a cycle from L2, 11 us for the matrices in float32;
// 33 barriers with what lies between them, some 0.15 us each, come on top. The inputs are read from, and the estimates
// written to, the host's pinned memory by the kernel itself: one launch, no copies.
//
// Product: a matrix is packed in vectors of 16 bytes, four outputs of one input (two in bfloat16), so neighbouring lanes
// read neighbouring vectors. Its inputs are cut into slices of `depth`; a lane takes four outputs of one slice for all Q
// rows, so each weight is read once; the slices' sums meet in shared memory and are added in order. Depth depends on the
// model alone (plan()), so a row's bits depend on neither R nor the rows beside it.
#include <cmath>
#include <cstring>
#include <memory>

#include "device.cuh"
#include "../math/activation.h"
#include "../math/reliability_fusion.h"
#include "../math/stage_filter.h"
#include "../stream/pack.h"
#include "../stream/session.h"

namespace sage::cuda {
namespace {

using namespace sage::stream;

constexpr int kMostWarps = 16;
constexpr int kAhead = 4;  // inputs that a thread has on their way from the host
constexpr int kTile = 4;   // outputs and inputs that a lane multiplies at a time
// Rows that share each load of a weight after the fusion: with two modalities all three tracks of one or two streams; more
// would not fit the registers.
__host__ __device__ constexpr int track_rows(int R) { return R == 1 ? 3 : 6; }

__host__ __device__ __forceinline__ int tiled(int64_t n) { return int((n + kTile - 1) / kTile * kTile); }

// Where things lie in a block's shared memory, in floats, behind the model. Row r of modality m or track t is number
// m R + r of its kind.
struct Layout {
  int modalities, in_dim[kMaxModalities];
  int input[kMaxModalities];        // R rows of tiled(in_dim) each, one modality behind the other
  int encoded, mixed, tracks, dim;  // rows of tiled(dim): M R, (1 + M) R, (1 + M) R
  int evidence, joint, hidden;  // rows of tiled(width): M R, tiled(M width): R, tiled(evidence): (1 + M) R
  int width, joined, narrow;    // those strides
  int recalled, recall;         // rows of tiled(memory dim): (1 + M) R; that stride
  int logits, emission, belief, prior, now;  // rows of kMaxStages: M R, R; R each
  int square, weight;                        // rows of 2 kMaxModalities, kMaxModalities: R
  int precision;                             // (1 + M) R
  int given, present, row;                   // int: rows of kMaxModalities, R each; (live, frame) int64: 2 R
  int part;                                  // slices' sums
  int zeroed, size;  // what lies before zeroed begins as zeros or inputs: what pads rows must be finite
};

struct Launch {
  const Model* model;
  Frame frame;
  Outputs out;
  float* state;
  int64_t *frames, *counts;  // (rows); (rows, 1 + 2 M): frames taken, absent, refused
  int64_t rows;
  Layout at;
};

// ------------------------------------------------------------------------------------------------------ one product
struct Job {
  const Linear* f;
  const float* x;  // row after row, `stride` apart
  int stride;
};

// Four inputs' weights of four outputs: w[input][output].
template <class T>
__device__ __forceinline__ void load_tile(const T* at, int64_t step, float (&w)[kTile][kTile]) {
  constexpr int V = kVector<T>, P = V / kTile;  // inputs of a vector
#pragma unroll
  for (int v = 0; v < kTile / P; ++v) load_vector<T>(at + v * step, V, true, w[v * P]);
}

// The slices' sums of Q rows from `first` on, of all jobs; rows past the last repeat it.
template <class T, int Q, class JobOf>
__device__ __forceinline__ void multiply(float* part, int jobs, int first, int rows, const JobOf& job_of) {
  constexpr int P = kVector<T> / kTile;
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  int task = int(threadIdx.x) / kWarp;
#pragma unroll 1
  for (int j = 0; j < jobs; ++j) {
    const Job job = job_of(j);
    const Linear& f = *job.f;
    const int quads = tiled(f.outputs) / kTile, inputs = tiled(f.inputs);
#pragma unroll 1
    for (; task < f.tasks; task += warps) {
      const int slice = task / f.columns * (kWarp / f.lanes) + lane / f.lanes;
      const int quad = task % f.columns * f.lanes + lane % f.lanes;
      if (slice >= f.slices || quad >= quads) continue;
      float sum[Q][kTile];
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int n = 0; n < kTile; ++n) sum[q][n] = 0;
      if (slice == 0) {
        load_vector<float>(f.bias + quad * kTile, kTile, true, sum[0]);
#pragma unroll
        for (int q = 1; q < Q; ++q)
#pragma unroll
          for (int n = 0; n < kTile; ++n) sum[q][n] = sum[0][n];
      }
      const int begin = slice * f.depth, end = begin + f.depth < inputs ? begin + f.depth : inputs;
      const int64_t step = int64_t(quads) * P * kTile;  // numbers from vector to vector of a lane
      const T* at = static_cast<const T*>(f.weight) + int64_t(begin) * quads * kTile + quad * P * kTile;
#pragma unroll(Q <= 3 ? 2 : 1)
      for (int k = begin; k < end; k += kTile) {
        float w[kTile][kTile];
        load_tile<T>(at, step, w);
        at += step * (kTile / P);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int row = first + q < rows ? first + q : rows - 1;
          float x[kTile];
          load_vector<float>(job.x + row * job.stride + k, kTile, true, x);
#pragma unroll
          for (int i = 0; i < kTile; ++i)
#pragma unroll
            for (int n = 0; n < kTile; ++n) sum[q][n] = fma(w[i][n], x[i], sum[q][n]);
        }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q)
        store_vector<float>(part + ((slice * Q + q) * quads + quad) * kTile, kTile, true, sum[q]);
    }
    task -= f.tasks;
    part += f.slices * Q * quads * kTile;
  }
}

// done(job, row, output, sum + bias) of each output of the rows that multiply() took.
template <int Q, class JobOf, class Done>
__device__ __forceinline__ void finish(const float* part, int jobs, int first, int rows, const JobOf& job_of,
                                       const Done& done) {
  const int threads = int(blockDim.x);
  int i = int(threadIdx.x);
#pragma unroll 1
  for (int j = 0; j < jobs; ++j) {
    const Linear& f = *job_of(j).f;
    const int wide = tiled(f.outputs), slices = f.slices;
#pragma unroll 1
    for (; i < Q * wide; i += threads) {
      const int row = first + i / wide, n = i % wide;
      if (row >= rows || n >= f.outputs) continue;
      float sum = part[i];
#pragma unroll 4
      for (int s = 1; s < slices; ++s) sum += part[s * Q * wide + i];
      done(j, row, n, sum);
    }
    i -= Q * wide;
    part += slices * Q * wide;
  }
}

// y = W x + b of `rows` rows a job, Q at a time. Needs a barrier before it, ends with one.
template <class T, int Q, class JobOf, class Done>
__device__ __forceinline__ void product(float* part, int jobs, int rows, const JobOf& job_of,
                                        const Done& done) {
#pragma unroll 1
  for (int first = 0; first < rows; first += Q) {
    multiply<T, Q>(part, jobs, first, rows, job_of);
    __syncthreads();
    finish<Q>(part, jobs, first, rows, job_of, done);
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------- one warp's row
struct Moments {
  float mean, rstd;
};
__device__ __forceinline__ Moments moments(const float* x, int dim, int lane) {
  float s = 0, ss = 0;
  for (int d = lane; d < dim; d += kWarp) s += x[d];
  const float mean = lanes_sum<1, kWarp>(s) / float(dim);
  for (int d = lane; d < dim; d += kWarp) {
    const float c = x[d] - mean;
    ss = fma(c, c, ss);
  }
  return {mean, 1.0f / sqrt(lanes_sum<1, kWarp>(ss) / float(dim) + kNormEps)};
}
__device__ __forceinline__ float normed(float x, const Moments& m, const Norm& norm, int d) {
  return fma((x - m.mean) * m.rstd, norm.weight[d], norm.bias[d]);
}
__device__ __forceinline__ void layer_norm(const Norm& norm, int dim, int lane, float* x) {
  const Moments m = moments(x, dim, lane);
  for (int d = lane; d < dim; d += kWarp) x[d] = normed(x[d], m, norm, d);
}

// --------------------------------------------------------------------------------------------------------- the frame
template <class T, int R>
struct Group {
  const Launch& q;
  const Model& model;
  float* shared;
  int lane, warp, warps;

  __device__ __forceinline__ Group(const Launch& launch, const Model& m, float* memory)
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
      float *x = shared + q.at.input[m] + r * tiled(n), *last = state(r) + from.last;
      const bool told = live(r) && given(r)[m];
      const float repeated = s.stuck ? state(r)[model.repeats + m] : 0.0f;
      float squares = 0, steps = 0, blank = 0, moved = 0;
#pragma unroll 8
      for (int d = lane; d < n; d += kWarp) {
        const float before = last[d], v = told ? (x[d] - from.mean[d]) * from.scale[d] : 0.0f;
        const float step = v - before;
        squares = fma(v, v, squares);
        steps = fma(step, step, steps);
        blank = fma(before, before, blank);
        moved += abs(step);
        x[d] = v;
      }
      squares = lanes_sum<1, kWarp>(squares), steps = lanes_sum<1, kWarp>(steps),
      blank = lanes_sum<1, kWarp>(blank), moved = lanes_sum<1, kWarp>(moved);
      bool here = told && squares <= 3.4028235e38f;  // false for NaN
      const float repeats = here && moved == 0 ? min(repeated + 1.0f, float(s.stuck)) : 0.0f;
      const bool held = s.stuck && repeats >= float(s.stuck);
      here = here && !held;
      if (!here)
        for (int d = lane; d < n; d += kWarp) x[d] = 0;
      if (live(r) && !held)
        for (int d = lane; d < n; d += kWarp) last[d] = x[d];
      if (lane == 0) {
        float* square = shared + q.at.square + r * 2 * kMaxModalities + 2 * m;
        square[0] = here ? squares / float(n) : 0.0f;
        square[1] = (here ? steps : blank) / float(n);
        present(r)[m] = here || s.hide_missing;
        if (live(r) && s.stuck) state(r)[model.repeats + m] = repeats;
        if (live(r) && !here) {
          int64_t* counts = q.counts + at * (1 + 2 * s.modalities);
          ++counts[1 + m];
          counts[1 + s.modalities + m] += told && !held;
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
  __device__ __forceinline__ void typicality(int r) const {
    const Shape& s = model.shape;
    const int pairs = 2 * s.modalities, m = lane / 2, kind = lane % 2, history = s.window - 1;
    if (lane >= pairs) return;
    float* ring = state(r) + model.typicality;
    const int start = history ? int(frame(r) % history) : 0, size = 2 * pairs;
    const bool here = present(r)[m] != 0;
    bool counted = here;
    if (kind) counted = here && history && ring[(start ? start - 1 : history - 1) * size + pairs + 2 * m] > 0;
    float total = 0, count = 0;
    int slot = start;
#pragma unroll 8
    for (int f = 0; f < history; ++f) {  // oldest first
      total += ring[slot * size + lane];
      count += ring[slot * size + pairs + lane];
      slot = slot + 1 == history ? 0 : slot + 1;
    }
    const float energy = counted ? log(shared[q.at.square + r * 2 * kMaxModalities + lane] + 1e-8f) : 0.0f;
    total += energy;
    count += counted ? 1.0f : 0.0f;
    if (history && live(r)) ring[start * size + lane] = energy, ring[start * size + pairs + lane] = counted;
    const Modality& from = model.modality[m];
    float z = 0;
    if (here && count > 0) z = (total / count - from.typical_mean[kind]) / from.typical_std[kind];
    const float far = abs(z), level = min(log(far + sqrt(fma(far, far, 1.0f))), 4.0f);  // asinh, at most 4
    put_evidence(r, m, int(s.evidence) + kind, z < 0 ? -level : level);
    put_evidence(r, m, int(s.evidence) + 2 + kind, level);
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
    float *now = stages(q.at.now, r), weight = 0, confidence = 0;
    if (s.reliability) {
      float *belief = stages(q.at.belief, r), *prior = stages(q.at.prior, r);
      float* kept = state(r) + model.belief;
      const bool inside = lane < S;
      if (inside) belief[lane] = kept[lane], prior[lane] = exp(kept[lane]);
      __syncwarp();
      float next = -3e38f;
      if (inside) {
        const float evidence = all ? stages(q.at.emission, r)[lane] : 0.0f;
        next = stage_prior(S, model.log_a, model.a, belief, prior, lane) + evidence;
      }
      float peak = next;
#pragma unroll
      for (int o = 1; o < kWarp; o *= 2) peak = max(peak, __shfl_xor_sync(kFull, peak, o));
      const float e = inside ? exp(next - peak) : 0.0f, total = lanes_sum<1, kWarp>(e);
      if (inside) {
        now[lane] = e / total;
        if (live(r)) kept[lane] = next - peak - log(total);
      }
      __syncwarp();
      float odds = 0;
      if (mine) {
        const Reliability<float> found = reliability(
            S, static_cast<const float*>(stages(q.at.logits, lane * R + r)), static_cast<const float*>(now));
        confidence = found.confidence, odds = found.log_odds * model.sharpness;
      }
      float most = mine ? odds : -3e38f;
#pragma unroll
      for (int o = 1; o < kWarp; o *= 2) most = max(most, __shfl_xor_sync(kFull, most, o));
      weight = mine ? exp(odds - most) : 0.0f;
      const float sum = lanes_sum<1, kWarp>(weight);
      weight = mine ? weight / sum : 0.0f;
    } else {
      const float count = lanes_sum<1, kWarp>(mine ? 1.0f : 0.0f);
      if (mine) weight = 1.0f / count, confidence = 0.5f;
      if (lane == 0) now[0] = 1.0f;
    }
    if (lane < M) shared[q.at.weight + r * kMaxModalities + lane] = weight;
    if (s.memory) {  // odds(confidence)^sharpness, confidence taken within [0.001, 0.999]
      const float c = min(max(confidence, 0.001f), 0.999f);
      const float power = log(c / (1.0f - c)) * (s.reliability ? model.sharpness : 1.0f);
      const float own = mine ? exp(min(max(power, -10.0f), 10.0f)) : 0.0f, total = lanes_sum<1, kWarp>(own);
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
      layer_norm(model.modality[m].value_norm, dim, lane, x);
    }
  }

  // Row i of the tracks goes into its memory; the memory's averages side by side.
  __device__ __forceinline__ void remember(int i) const {
    const Shape& s = model.shape;
    const int r = i % R, dim = int(s.dim), line = int(padded(dim));
    float *sums = state(r) + model.memory + i / R * memory_floats(s), *weights = sums + s.memory * line;
    const float precision = shared[q.at.precision + i], *x = shared + q.at.tracks + i * q.at.dim;
    float* to = shared + q.at.recalled + i * q.at.recall;
    for (int h = 0; h < s.memory; ++h) {
      const float decay = model.decay[h], weight = fma(decay, weights[h], precision);
      const float scale = 1.0f / (weight + model.prior[h]);
      for (int d = lane; d < dim; d += kWarp) {
        const float sum = fma(decay, sums[h * line + d], precision * x[d]);
        if (live(r)) sums[h * line + d] = sum;
        to[h * dim + d] = sum * scale;
      }
      __syncwarp();
      if (lane == 0 && live(r)) weights[h] = weight;
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
      for (int r = warp; r < R; r += warps) typicality(r);
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
                  fma(y, model.modality[m].logit_scale[n], model.modality[m].logit_bias[n]);
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
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) stream_kernel(const __grid_constant__ Launch q) {
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

// -------------------------------------------------------------------------------------------------------- packing
// Vectors of 16 bytes: four outputs of one input, or of two in bfloat16, one input after another.
template <class T>
struct Vectors {
  static size_t bytes(int64_t inputs, int64_t outputs) {
    return size_t(tiled(inputs)) * size_t(tiled(outputs)) * sizeof(T);
  }
  static void write(const float* from, int64_t inputs, int64_t outputs, void* memory) {
    constexpr int P = kVector<T> / kTile;
    T* to = static_cast<T*>(memory);
    for (int64_t k = 0; k < tiled(inputs); k += P)
      for (int64_t n = 0; n < tiled(outputs); n += kTile)
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < kTile; ++j)
            narrow(k + i < inputs && n + j < outputs ? from[(n + j) * inputs + k + i] : 0.0f, *to++);
  }
};

// visit(products, how many, after the fusion?) of each phase: what is multiplied at once.
template <class Visit>
void for_each_phase(Model& model, Visit&& visit) {
  const Shape& s = model.shape;
  const int M = s.modalities;
  Linear* jobs[2 * kMaxModalities];
  for (int b = -1; b < s.own_blocks; ++b) {
    for (int m = 0; m < M; ++m)
      jobs[m] = b < 0 ? &model.modality[m].project : &model.modality[m].block[b].pointwise;
    visit(jobs, M, false);
  }
  int count = 0;
  for (int m = 0; m < M && s.reliability; ++m) jobs[count++] = &model.modality[m].evidence;
  for (int m = 0; m < M; ++m) jobs[count++] = &model.modality[m].value;
  visit(jobs, count, false);
  for (int i = 0; i < 2 && s.reliability; ++i) {
    for (int m = 0; m < M; ++m) jobs[m] = &model.modality[m].reliability[i];
    jobs[M] = &model.emission[i];
    visit(jobs, M + 1, false);
  }
  for (int b = -1; b < s.fused_blocks + 2; ++b) {
    if (b < 0 && !s.memory) continue;
    jobs[0] = b < 0                ? &model.recall
              : b < s.fused_blocks ? &model.fused[b].pointwise
                                   : &model.head[b - s.fused_blocks];
    visit(jobs, 1, true);
  }
}

// How a product of some depth is shared out over warps; returns the tasks, one warp's work each.
int share(Linear& f, int depth) {
  const int quads = tiled(f.outputs) / kTile;
  f.lanes = 1;
  while (f.lanes < quads && f.lanes < kWarp) f.lanes *= 2;
  f.columns = (quads + f.lanes - 1) / f.lanes;
  f.depth = depth;
  f.slices = (tiled(f.inputs) + depth - 1) / depth;
  const int slices = kWarp / f.lanes;  // of a task
  return f.tasks = f.columns * ((f.slices + slices - 1) / slices);
}
int share(Linear** jobs, int count, int depth) {
  int tasks = 0;
  for (int j = 0; j < count; ++j) tasks += share(*jobs[j], depth);
  return tasks;
}

// Warps of a block, and the slices of every product: as many as there are warps, or fewer.
int plan(Model& model) {
  int warps = 4;
  for_each_phase(model, [&](Linear** jobs, int count, bool) {
    while (warps < kMostWarps && share(jobs, count, 2 * kTile) > warps) warps *= 2;
  });
  for_each_phase(model, [&](Linear** jobs, int count, bool) {
    int64_t deepest = 0;
    for (int j = 0; j < count; ++j)
      deepest = deepest > tiled(jobs[j]->inputs) ? deepest : tiled(jobs[j]->inputs);
    int depth = kTile;
    while (depth < deepest && share(jobs, count, depth) > warps) depth += kTile;
    share(jobs, count, depth);
  });
  return warps;
}

Layout lay_out(Model& model, int R) {
  const Shape& s = model.shape;
  const int M = s.modalities;
  Layout at = {};
  int64_t used = 0;
  const auto take = [&](int64_t rows, int64_t stride) {
    const int64_t from = used;
    used += rows * tiled(stride);
    if (used > (1 << 28)) throw std::invalid_argument("stream: the model is too large for one GPU block");
    return int(from);
  };
  at.dim = tiled(s.dim), at.width = tiled(s.evidence + kTypicality);
  at.joined = tiled(M * (s.evidence + kTypicality)), at.narrow = tiled(s.evidence);
  at.modalities = M;
  for (int m = 0; m < M; ++m) at.input[m] = take(R, s.in_dim[m]), at.in_dim[m] = int(s.in_dim[m]);
  at.encoded = take(M * R, at.dim), at.mixed = take((1 + M) * R, at.dim),
  at.tracks = take((1 + M) * R, at.dim);
  at.evidence = take(M * R, at.width), at.joint = take(R, at.joined),
  at.hidden = take((1 + M) * R, at.narrow);
  at.recall = tiled(s.memory * s.dim), at.recalled = take((1 + M) * R, at.recall);
  at.zeroed = int(used);
  at.logits = take(M * R, kMaxStages), at.emission = take(R, kMaxStages);
  at.belief = take(R, kMaxStages), at.prior = take(R, kMaxStages), at.now = take(R, kMaxStages);
  at.square = take(R, 2 * kMaxModalities), at.weight = take(R, kMaxModalities);
  at.precision = take(1, (1 + M) * R);
  at.given = take(R, kMaxModalities), at.present = take(R, kMaxModalities), at.row = take(R, 4);
  int64_t most = 0;
  for_each_phase(model, [&](Linear** jobs, int count, bool tracks) {
    int64_t sums = 0;
    for (int j = 0; j < count; ++j)
      sums += int64_t(jobs[j]->slices) * tiled(jobs[j]->outputs) * (tracks ? track_rows(R) : R);
    most = most > sums ? most : sums;
  });
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
  CudaSession(const Shape& shape, const float* parameters, int64_t count, int64_t rows, int device)
      : Session(shape, rows), call_{device, nullptr, ""} {
    snprintf(call_.text, sizeof call_.text, "streaming session of %lld rows", (long long)rows);
    const DeviceGuard guard(device);
    measure(nullptr, nullptr, nullptr);
    expect(parameters, count);
    warps_ = plan(model_);
    choose_group();

    const auto lay = [&](Pieces& there, Pieces& here) {
      q_.model = there.take<Model>(1);
      packed_ = there.take<char>(int64_t(model_.bytes));
      q_.state = there.take<float>(rows * model_.row_floats);
      q_.frames = there.take<int64_t>(rows), q_.counts = there.take<int64_t>(rows * counters());
      for (int m = 0; m < shape.modalities; ++m)
        staged_.features[m] = here.take<float>(rows * shape.in_dim[m]);
      staged_.present = here.take<uint8_t>(rows * shape.modalities),
      staged_.active = here.take<uint8_t>(rows);
      for_each_output([&](float*& to, int64_t numbers) { to = here.take<float>(rows * numbers); });
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
    measure(parameters, packed.get(), packed_);
    plan(model_);
    copy(packed_, packed.get(), model_.bytes, cudaMemcpyHostToDevice);
    copy(const_cast<Model*>(q_.model), &model_, sizeof model_, cudaMemcpyHostToDevice);
    check(cudaMemsetAsync(q_.state, 0, size_t(rows * model_.row_floats) * 4, stream));
    check(cudaMemsetAsync(q_.frames, 0, size_t(rows) * 8, stream));
    check(cudaMemsetAsync(q_.counts, 0, size_t(rows * counters()) * 8, stream));
    settle();
    for (int64_t r = 0; r < rows; ++r) reset(&r, 1);
  }
  ~CudaSession() override {
    const DeviceGuard guard(call_.device);
    event_.reset(), stream_.reset(), host_.reset(), device_.reset();
  }

  Totals totals() override {
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

 private:
  int64_t counters() const { return 1 + 2 * model_.shape.modalities; }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) raise(call_, error);
  }
  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) const {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()));
  }
  void settle() const { check(cudaStreamSynchronize(stream_.get())); }
  void measure(const float* parameters, char* out, const char* address) {
    if (model_.shape.bf16)
      pack<Vectors<__nv_bfloat16>>(model_, parameters, out, address);
    else
      pack<Vectors<float>>(model_, parameters, out, address);
  }
  // visit(address in q_.out, numbers a row) of each output.
  template <class Visit>
  void for_each_output(Visit&& visit) {
    const Shape& s = model_.shape;
    visit(q_.out.prediction, s.targets), visit(q_.out.unimodal, int64_t(s.modalities) * s.targets);
    visit(q_.out.weights, s.modalities), visit(q_.out.confidence, s.modalities),
        visit(q_.out.stage, s.stages);
  }

  // As few streams a block as let every block have a multiprocessor, and as fit.
  void choose_group() {
    int processors = 0, room = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call_.device));
    check(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, call_.device));
    group_ = 0;
    for (int R = 1; R <= 4; R *= 2) {
      const Layout at = lay_out(model_, R);
      const size_t bytes = sizeof(Model) + size_t(at.size) * 4;
      if (bytes > size_t(room)) {
        if (!group_)
          throw std::invalid_argument("stream: a step of this model (its in_dims, dim, evidence_dim) takes " +
                                      std::to_string(bytes) + " bytes of shared memory, cuda:" +
                                      std::to_string(call_.device) + " has " + std::to_string(room));
        break;
      }
      group_ = R, q_.at = at, shared_ = bytes;
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
    from(q_.frame.present, frame.present, staged_.present, rows_ * s.modalities);
    from(q_.frame.active, frame.active, staged_.active, rows_);
    if (ordered) {  // after what the caller's stream is still to write
      check(cudaEventRecord(event_.get(), static_cast<cudaStream_t>(exec.stream)));
      check(cudaStreamWaitEvent(stream_.get(), event_.get(), 0));
    }
    if (s.bf16)
      launch_group<__nv_bfloat16>();
    else
      launch_group<float>();
    settle();
    float* const to[] = {outputs.prediction, outputs.unimodal, outputs.weights, outputs.confidence,
                         outputs.stage};
    int i = 0;
    for_each_output(
        [&](float*& staged, int64_t numbers) { std::memcpy(to[i++], staged, size_t(rows_ * numbers) * 4); });
  }
  template <class T>
  void launch_group() const {
    if (group_ == 1) return launch_blocks(stream_kernel<T, 1>);
    if (group_ == 2) return launch_blocks(stream_kernel<T, 2>);
    launch_blocks(stream_kernel<T, 4>);
  }
  void launch_blocks(void (*kernel)(Launch)) const {
    launch(call_, kernel, dim3(grid_x(call_, (rows_ + group_ - 1) / group_)), warps_ * kWarp, shared_, q_);
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
    for_each_output([&](float*& staged, int64_t numbers) {
      std::memset(staged + row * numbers, 0, size_t(numbers) * 4);
    });
  }

  Call call_;
  Launch q_ = {};
  int warps_ = 0, group_ = 0;
  size_t shared_ = 0;
  char* packed_ = nullptr;
  Frame staged_ = {};  // pinned copies of inputs; outputs are pinned in q_.out
  Row row_ = {};       // a pinned copy of one row's state
  Held<char*, FreeDevice> device_;
  Held<char*, FreeHost> host_;
  Held<cudaStream_t, FreeStream> stream_;
  Held<cudaEvent_t, FreeEvent> event_;
};

}  // namespace

stream::Session* open_session(const stream::Shape& shape, const float* parameters, int64_t count,
                              int64_t rows, int device) {
  return new CudaSession(shape, parameters, count, rows, device);
}

}  // namespace sage::cuda
