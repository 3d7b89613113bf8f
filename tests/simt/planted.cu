// Kernels with one mistake each, and their right twins: what the emulator must catch (tests/simt/test_emulator.py).
#include "cuda/device.cuh"

namespace sage::cuda {
namespace {

constexpr int kThreads = 128;

// out[t] = x[kThreads - 1 - t], through shared memory.
template <bool Barrier> __global__ void reverse_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (Barrier) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}
// The same within a warp.
template <bool Barrier> __global__ void swap_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (Barrier) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
// Each round writes what the last one's readers may still want.
template <bool Barrier> __global__ void rounds_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  float sum = 0;
  for (int k = 0; k < 3; ++k) {
    shared[threadIdx.x] = x[threadIdx.x] * float(k + 1);
    __syncthreads();
    sum += shared[(threadIdx.x + 40) % kThreads];
    if (Barrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}
template <int Beyond> __global__ void read_kernel(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x + Beyond]; }
template <int Beyond> __global__ void shared_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x + Beyond];
}
__global__ void vector_kernel(const float* x, float* out, int from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(x + from);
  memcpy(out, &bits, 16);
}
__global__ void shared_vector_kernel(const float* x, float* out, int from) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const uint4 bits = *reinterpret_cast<const uint4*>(shared + from);
  if (threadIdx.x == 0) memcpy(out, &bits, 16);
}
template <bool All> __global__ void write_kernel(const float* x, float* out) {
  if (All || threadIdx.x != 77) out[threadIdx.x] = x[threadIdx.x];
}
__global__ void branch_kernel(float* out) {  // a barrier that half of the threads reach
  if (threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void lanes_kernel(float* out) {  // a shuffle that one lane misses
  float x = float(threadIdx.x);
  if (threadIdx.x != 5) x += __shfl_xor_sync(kFull, x, 1);
  out[threadIdx.x] = x;
}
__global__ void uninitialised_kernel(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

// ---- races that change no bit under the emulation's orders: for the race detector
// One word that one thread writes, or all of them, the same number.
template <bool All> __global__ void flag_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  if (All || threadIdx.x == 9) shared[0] = x[5];
  __syncthreads();
  out[threadIdx.x] = shared[0] + x[threadIdx.x];
}
// Its neighbour's number, with a shuffle between the write and the read.
template <bool Barrier> __global__ void shuffled_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  const float zero = __shfl_xor_sync(kFull, 0.0f, 1);
  if (Barrier) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1] + zero;
}
// The last warp writes the same numbers over the first one's: __syncwarp() orders a warp alone.
template <bool Block> __global__ void warps_kernel(const float* x, float* out) {
  float* shared = shared_memory<float>();
  if (threadIdx.x < kWarp) shared[threadIdx.x] = x[threadIdx.x];
  Block ? __syncthreads() : __syncwarp();
  if (threadIdx.x >= kThreads - kWarp) shared[threadIdx.x % kWarp] = x[threadIdx.x % kWarp];
  out[threadIdx.x] = x[threadIdx.x];
}
// A block writes a word of its own (apart = 1), or all of them one word (0).
__global__ void blocks_kernel(const float* x, float* out, int apart) {
  if (threadIdx.x == 0) out[apart * int(blockIdx.x)] = x[3];
}
// A thread writes a byte of its own, of a word that four share (apart = 1), or two of them one byte (2).
__global__ void bytes_kernel(float* out, int apart) { reinterpret_cast<uint8_t*>(out)[int(threadIdx.x) / apart] = 1; }

// A difference that holds only where expf and logf are the CPU's to the bit, or one that does not cancel.
template <bool Cancels> __global__ void exponential_kernel(const float* x, float* out) {
  const float y = expf(x[threadIdx.x] / kThreads);
  out[threadIdx.x] = Cancels ? 1e6f * (y * expf(-x[threadIdx.x] / kThreads) - 1) : y;
}

}  // namespace

void planted(int which, const float* x, float* out) {
  const Call call = {0, nullptr, "planted"};
  const size_t shared = kThreads * sizeof(float);
  const auto run = [&](auto kernel, auto... arguments) { launch(call, kernel, dim3(1), kThreads, shared, arguments...); };
  switch (which) {
    case 0: return run(reverse_kernel<true>, x, out);
    case 1: return run(reverse_kernel<false>, x, out);
    case 2: return run(swap_kernel<true>, x, out);
    case 3: return run(swap_kernel<false>, x, out);
    case 4: return run(rounds_kernel<true>, x, out);
    case 5: return run(rounds_kernel<false>, x, out);
    case 6: return run(read_kernel<0>, x, out);
    case 7: return run(read_kernel<1>, x, out);
    case 8: return run(shared_kernel<0>, x, out);
    case 9: return run(shared_kernel<1>, x, out);
    case 10: return launch(call, vector_kernel, dim3(1), kWarp, 0, x, out, 4);
    case 11: return launch(call, vector_kernel, dim3(1), kWarp, 0, x, out, 1);
    case 12: return run(write_kernel<true>, x, out);
    case 13: return run(write_kernel<false>, x, out);
    case 14: return run(branch_kernel, out);
    case 15: return run(lanes_kernel, out);
    case 16: return run(uninitialised_kernel, out);
    case 17: return launch(call, write_kernel<true>, dim3(1), 33, 0, x, out);                  // not whole warps
    case 18: return launch(call, write_kernel<true>, dim3(1, 65536), kThreads, 0, x, out);     // beyond the grid's limit
    case 19: return launch(call, write_kernel<true>, dim3(1), kThreads, 300 << 10, x, out);    // more shared memory than there is
    case 20: return run(flag_kernel<false>, x, out);
    case 21: return run(flag_kernel<true>, x, out);
    case 22: return run(shuffled_kernel<true>, x, out);
    case 23: return run(shuffled_kernel<false>, x, out);
    case 24: return run(warps_kernel<true>, x, out);
    case 25: return run(warps_kernel<false>, x, out);
    case 26: return launch(call, blocks_kernel, dim3(3), kThreads, 0, x, out, 1);
    case 27: return launch(call, blocks_kernel, dim3(3), kThreads, 0, x, out, 0);
    case 28: return run(bytes_kernel, out, 1);
    case 29: return run(bytes_kernel, out, 2);
    case 30: return run(shared_vector_kernel, x, out, 0);
    case 31: return run(shared_vector_kernel, x, out, 1);
    case 32: return run(exponential_kernel<false>, x, out);
    case 33: return run(exponential_kernel<true>, x, out);
  }
}

}  // namespace sage::cuda
