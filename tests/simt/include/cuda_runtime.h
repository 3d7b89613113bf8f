// Shim: what this project's kernels use of the CUDA runtime, for g++ (tests/simt/simt.h says how kernels then run).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "simt.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
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

// ------------------------------------------------------------------------------------------------------ host side
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
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

namespace simt {
inline int device = 0;                      // the current device
inline cudaError_t planted = cudaSuccess;   // what the next launch returns instead of running
inline std::map<const void*, int> shared_limit;
}  // namespace simt

inline cudaError_t cudaGetDevice(int* d) { return *d = simt::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) { return simt::device = d, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 12040, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  return *v = a == cudaDevAttrComputeCapabilityMajor ? 7 : 0, cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t e) { return e == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the emulator"; }
template <class K> cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > 227 * 1024) return cudaErrorInvalidValue;
  return simt::shared_limit[reinterpret_cast<const void*>(kernel)] = bytes, cudaSuccess;
}
template <class K> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, K*) { return std::exchange(simt::planted, cudaSuccess); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  if (simt::planted != cudaSuccess) return std::exchange(simt::planted, cudaSuccess);
  const auto limit = simt::shared_limit.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = limit == simt::shared_limit.end() ? 48 * 1024 : std::max(48 * 1024, limit->second);
  const dim3 g = c->gridDim, b = c->blockDim;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (!b.x || b.x * b.y * b.z > 1024 || c->dynamicSmemBytes > allowed) return cudaErrorInvalidConfiguration;
  const std::tuple<P...> held(std::forward<A>(arguments)...);
  simt::run({g.x, g.y, g.z}, {b.x, b.y, b.z}, c->dynamicSmemBytes, [&] { std::apply(kernel, held); });
  return cudaSuccess;
}
