// Shim: what this project's kernels use of the CUDA runtime, for g++ (tests/simt/simt.h says how kernels then run).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "simt.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
// No __shared__ here: shared memory is dynamic and comes from device.cuh's one helper, so that its bounds are known.

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };

extern simt::Index threadIdx, blockIdx, blockDim, gridDim;
static constexpr int warpSize = 32;

inline void __syncthreads() { simt::wait(simt::kBlock, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::wait(simt::kWarp, mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) == mask; }

namespace simt {
template <class T> T shuffle(unsigned mask, T x, int source) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = exchange(kShuffle, mask, bits, source);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
}  // namespace simt
template <class T> T __shfl_sync(unsigned mask, T x, int source) { return simt::shuffle(mask, x, source & 31); }
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes) { return simt::shuffle(mask, x, simt::lane() ^ lanes); }
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned by) {
  const int from = simt::lane() - int(by);
  return simt::shuffle(mask, x, from < 0 ? simt::lane() : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned by) {
  const int from = simt::lane() + int(by);
  return simt::shuffle(mask, x, from > 31 ? simt::lane() : from);
}

// The GPU's expf and logf are up to 2 ulp from the CPU's: so, on demand, are these, by the argument's bits. 0, exp(0) and what
// is not finite or not normal stay.
namespace simt {
inline bool inexact = false;
inline float perturbed(float y, float x) {
  if (!inexact || x == 0 || !std::isnormal(y)) return y;
  uint32_t bits, at;
  std::memcpy(&bits, &y, 4), std::memcpy(&at, &x, 4);
  at = (at ^ at >> 16) * 0x7feb352du, at = (at ^ at >> 15) * 0x846ca68bu, at ^= at >> 16;
  bits += at % 5 - 2;
  float moved;
  std::memcpy(&moved, &bits, 4);
  return std::isnormal(moved) ? moved : y;
}
}  // namespace simt
#define expf(x) simt::perturbed((expf)(x), x)
#define logf(x) simt::perturbed((logf)(x), x)

// ------------------------------------------------------------------------------------------------------ host side
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};
// Work on a stream that was created waits there until the host asks for it (or another stream's event does): who forgets
// to, reads what was there before. On the null stream it runs at once.
// A stream in capture counts its work and runs none of it; what would wait, or allocate, meanwhile is refused, and ends the
// capture as invalid, whether or not the caller looks at the error.
struct CUstream_st {
  std::deque<std::function<void()>> work;
  bool capturing = false, invalid = false;
  int64_t captured = 0;
  int device = 0;  // the current one when it was made
};
struct CUevent_st { CUstream_st* stream; };
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
enum : unsigned { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocMapped = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes { cudaMemoryType type; int device; void *devicePointer, *hostPointer; };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {};
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

#define CUDART_VERSION 13000
enum : unsigned long long { cudaEnableDefault = 0 };

namespace simt {
constexpr int kDevices = 2;
inline int device = 0;              // the current device
inline bool contexts[kDevices] = {};  // made by whoever selects a device, or makes or launches something on it
inline bool exists(int d) { return d >= 0 && d < kDevices; }
inline int primary_context_state(int d, unsigned* flags, int* active) {  // cuDevicePrimaryCtxGetState
  if (!exists(d)) return cudaErrorInvalidDevice;
  return *flags = 0, *active = contexts[d], cudaSuccess;
}
inline cudaError_t planted = cudaSuccess;   // what the next launch returns instead of running
inline std::map<const void*, int> shared_limit;
inline int processors = 2, shared_memory_limit = 227 * 1024;  // of the device

inline std::set<cudaStream_t> captures;  // streams that are in capture now

inline void begin_capture(cudaStream_t stream) {
  stream->capturing = true, stream->invalid = false, stream->captured = 0;
  captures.insert(stream);
}
inline int64_t end_capture(cudaStream_t stream) {  // the work captured; -1: the capture is invalid
  stream->capturing = false;
  captures.erase(stream);
  return stream->invalid ? -1 : stream->captured;
}
inline cudaError_t refused_in_capture() {
  for (const cudaStream_t stream : captures) stream->invalid = true;
  return cudaErrorStreamCaptureUnsupported;
}

inline cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream && stream->invalid && stream->capturing) return cudaErrorStreamCaptureInvalidated;
  if (stream && stream->capturing) return ++stream->captured, cudaSuccess;
  if (stream) stream->work.push_back(std::move(work));
  else work();
  return cudaSuccess;
}
inline cudaError_t finish(cudaStream_t stream) {
  if (stream && stream->capturing) return refused_in_capture();
  while (stream && !stream->work.empty()) {
    const std::function<void()> next = std::move(stream->work.front());
    stream->work.pop_front();
    next();
  }
  return cudaSuccess;
}
}  // namespace simt

inline cudaError_t cudaGetDevice(int* d) { return *d = simt::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) {
  if (!simt::exists(d)) return cudaErrorInvalidDevice;
  simt::device = d, simt::contexts[d] = true;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long) {
  const bool known = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *found = known ? reinterpret_cast<void*>(&simt::primary_context_state) : nullptr;
  return known ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 12040, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int d) {
  if (!simt::exists(d)) return cudaErrorInvalidDevice;
  *v = a == cudaDevAttrComputeCapabilityMajor ? 7 : 0;
  if (a == cudaDevAttrMultiProcessorCount) *v = simt::processors;
  if (a == cudaDevAttrMaxSharedMemoryPerBlockOptin) *v = simt::shared_memory_limit;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t e) { return e == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the emulator"; }
template <class K> cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > simt::shared_memory_limit) return cudaErrorInvalidValue;
  return simt::shared_limit[reinterpret_cast<const void*>(kernel)] = bytes, cudaSuccess;
}
template <class K> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, K*) { return std::exchange(simt::planted, cudaSuccess); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  if (simt::planted != cudaSuccess) return std::exchange(simt::planted, cudaSuccess);
  if (c->stream && c->stream->device != simt::device) return cudaErrorInvalidResourceHandle;
  simt::contexts[simt::device] = true;
  const auto limit = simt::shared_limit.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = limit == simt::shared_limit.end() ? 48 * 1024 : std::max(48 * 1024, limit->second);
  const dim3 g = c->gridDim, b = c->blockDim;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (!b.x || b.x * b.y * b.z > 1024 || c->dynamicSmemBytes > allowed) return cudaErrorInvalidConfiguration;
  const std::tuple<P...> held(std::forward<A>(arguments)...);
  const size_t shared = c->dynamicSmemBytes;
  return simt::enqueue(c->stream, [g, b, shared, kernel, held] {
    simt::run({g.x, g.y, g.z}, {b.x, b.y, b.z}, shared, [&] { std::apply(kernel, held); });
  });
}

// ---- memory (simt.cpp): the device's lies where the host's code cannot touch it but through copies, poisoned, and ends at a
// page that nobody can touch; the host's pinned memory is known to the device under the same address.
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  *s = new CUstream_st;
  (*s)->device = simt::device, simt::contexts[simt::device] = true;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) { return simt::finish(s); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
  if (s->capturing) simt::end_capture(s);
  return simt::finish(s), delete s, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = new CUevent_st{nullptr}, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return e->stream = s, cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { return simt::finish(e->stream); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  const cudaStream_t other = e->stream;
  return simt::enqueue(s, [other] { simt::finish(other); });
}
