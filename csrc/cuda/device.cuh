// What the kernel files share: storage types and 16-byte vectors, warp and block primitives in a fixed order, launches.
//
// The dialect is plain enough for tests/simt to run the files unchanged on a CPU: whole warps and full masks in every
// warp operation, shared memory from shared_memory() alone, launches through launch().
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../ops.h"
#include "../math/scalar.h"

#if !defined(SAGE_CUDA_ARCHITECTURES)
#define SAGE_CUDA_ARCHITECTURES "?"
#endif

namespace sage::cuda {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kWarp = 32;

// ---------------------------------------------------------------------------------------------- storage types
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// 1 / x of a normal number, to an ulp: without the branch that IEEE division has for numbers near the ends of the range.
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }
__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(fmaf(-x, y, 1.0f), y, y);  // a step of Newton's
#else
  return 1.0f / x;
#endif
}

// 16 bytes of T as arithmetic numbers.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

__host__ __device__ __forceinline__ bool aligned(const void* p, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(p) | uintptr_t(stride_bytes)) % 16 == 0;
}

// Loads and stores. `fast`: p is 16-byte aligned, so 16 bytes go at once; else number by number, with the same bits.
//
// Count numbers, one vector of 16 bytes or several, where all of them are `inside` the tensor or none is: zeros are
// loaded, and nothing is stored, where they are not. One test for all costs a kernel up to 30 registers less than one
// a number.
template <class T>
__device__ __forceinline__ uint4 load_bits(const T* p, bool inside, bool fast) {
  uint4 bits = {0, 0, 0, 0};
  if (inside) {
    if (fast) {
      bits = *reinterpret_cast<const uint4*>(p);
    } else {
      T x[kVector<T>];
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) x[i] = p[i];
      memcpy(&bits, x, 16);
    }
  }
  return bits;
}
template <class T>
__device__ __forceinline__ void widen_bits(const uint4& bits, ArithmeticOf<T>* out) {
  constexpr int V = kVector<T>;
  T x[V];
  memcpy(x, &bits, 16);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = widen(x[i]);
}
template <class T, int Count = kVector<T>>
__device__ __forceinline__ void load_whole(const T* p, bool inside, bool fast, ArithmeticOf<T>* out) {
#pragma unroll
  for (int k = 0; k < Count; k += kVector<T>) widen_bits<T>(load_bits(p + k, inside, fast), out + k);
}
template <class T>
__device__ __forceinline__ void store_whole(T* p, bool inside, bool fast, const ArithmeticOf<T>* in) {
  constexpr int V = kVector<T>;
  if (!inside) return;
  T x[V];
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(in[i], x[i]);
  if (fast) {
    uint4 bits;
    memcpy(&bits, x, 16);
    *reinterpret_cast<uint4*>(p) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) p[i] = x[i];
  }
}

// The first n numbers of one vector, zeros in place of the others; `fast` asks for n = kVector<T> besides.
template <class T>
__device__ __forceinline__ void load_vector(const T* p, int n, bool fast, ArithmeticOf<T>* out) {
  if (fast) return load_whole<T>(p, true, true, out);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) out[i] = i < n ? widen(p[i]) : ArithmeticOf<T>(0);
}
template <class T>
__device__ __forceinline__ void store_vector(T* p, int n, bool fast, const ArithmeticOf<T>* in) {
  if (fast) return store_whole(p, true, true, in);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i < n) narrow(in[i], p[i]);
}

// The first n of Count numbers of the arithmetic type, such as a row's scales; `fast` asks for n = Count besides.
template <int Count, class A>
__device__ __forceinline__ void load_numbers(const A* p, int n, bool fast, A* out) {
  if (fast) return load_whole<A, Count>(p, true, true, out);
#pragma unroll
  for (int i = 0; i < Count; ++i) out[i] = i < n ? p[i] : A(0);
}

// ------------------------------------------------------------------------------------------- warps and blocks
// The block's dynamic shared memory: the only shared memory there is.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(SAGE_SIMT)
  return static_cast<T*>(simt::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char sage_shared_memory[];
  return reinterpret_cast<T*>(sage_shared_memory);
#endif
}

// The sum over a group of neighbouring lanes: those whose numbers differ from this one's in the binary digits From,
// 2 From, ... To / 2 alone (powers of two). Every lane of the group gets the same bits.
template <int From, int To, class A>
__device__ __forceinline__ A lanes_sum(A x) {
#pragma unroll
  for (int o = From; o < To; o *= 2) x += __shfl_xor_sync(kFull, x, o);
  return x;
}

// Inclusive scan over the warp: lane l gets op(x_0, ..., x_l), bracketed as Kogge and Stone's circuit has it. Needs
// Item shuffle_up(const Item&, int lanes): the item of the lane so many below.
template <class Item, class Op>
__device__ __forceinline__ Item warp_scan(Item x, int lane, Op op) {
#pragma unroll 1  // one copy of op: it is long
  for (int o = 1; o < kWarp; o *= 2) {
    const Item before = shuffle_up(x, o);
    if (lane >= o) x = op(before, x);
  }
  return x;
}

// Exclusive scan over a block of Warps warps, in thread order. Returns `carry` and the items of the threads before
// this one, joined; `carry` becomes that of all threads. `shared`: Warps items of shared memory. Ends with a barrier,
// so `shared` may be used again at once.
template <int Warps, class Item, class Op>
__device__ __forceinline__ Item block_scan(Item x, Item& carry, Item* shared, Op op) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const Item through = warp_scan(x, lane, op);
  if (lane == kWarp - 1) shared[warp] = through;
  __syncthreads();
  const Item left = shuffle_up(through, 1);
  Item before = carry;
#pragma unroll 1
  for (int w = 0; w < Warps; ++w) {
    if (w == warp) before = carry;
    carry = op(carry, shared[w]);
  }
  if (lane) before = op(before, left);
  __syncthreads();
  return before;
}

// -------------------------------------------------------------------------------------------------- launching
struct Call {  // one op on one device and stream; text goes into its error
  int device;
  cudaStream_t stream;
  char text[160];  // "op (shape) dtype"
};

inline const char* dtype_name(DType d) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[int(d)];
}

// One sentence that says what to do about `error`, which is then forgotten: it is not left for somebody else's check.
inline std::string reason(int device, cudaError_t error) {
  char why[400];
  int driver = 0, runtime = 0, major = 0, minor = 0;
  if (error == cudaErrorInsufficientDriver) {
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (!driver)
      snprintf(why, sizeof why, "no NVIDIA driver is loaded");
    else
      snprintf(why, sizeof why,
               "the NVIDIA driver serves CUDA %d.%d and is older than the CUDA %d.%d runtime that sage_ext "
               "was built with: "
               "update the driver, or build sage_ext with an older CUDA toolkit",
               driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  } else if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    snprintf(why, sizeof why,
             "this build of sage_ext has kernels for architectures %s, the device has compute capability "
             "%d.%d: rebuild "
             "with CMAKE_CUDA_ARCHITECTURES=%d%d",
             SAGE_CUDA_ARCHITECTURES, major, minor, major, minor);
  } else {
    snprintf(why, sizeof why, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  }
  cudaGetLastError();
  return why;
}

// Whether the device has its primary context already, by the driver's word. To ask makes none. Where the driver cannot
// be asked, yes.
inline bool has_context(int device) {
  using State = int (*)(int device, unsigned* flags, int* active);  // cuDevicePrimaryCtxGetState
  static const State state = [] {
    void* found = nullptr;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess ? reinterpret_cast<State>(found) : nullptr;
  }();
  unsigned flags = 0;
  int active = 0;
  return !state || state(device, &flags, &active) != 0 || active != 0;
}

// The caller's device for the time of one call. It is set back where it has a context: cudaSetDevice would make one,
// some hundred MiB, on a device that nobody has used.
class DeviceGuard {
 public:
  // A device that cannot be set is an error, unless `must` is false: in a destructor.
  explicit DeviceGuard(int device, bool must = true) {
    if (cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
    const bool restore = has_context(before_);
    const cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess)
      restore_ = restore;
    else if (must)
      throw std::runtime_error("sage_ext: cuda:" + std::to_string(device) +
                               " cannot be made the current device: " + reason(device, error));
    else
      cudaGetLastError();
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool restore_ = false;
};

[[noreturn]] inline void raise(const Call& call, cudaError_t error) {
  throw std::runtime_error(std::string("sage_ext: ") + call.text + " on cuda:" + std::to_string(call.device) +
                           ": " + reason(call.device, error));
}

template <class... P, class... A>
void launch(const Call& call, void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
            A... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) raise(call, error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = call.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  if (error != cudaSuccess) raise(call, error);
}

// Of the call's device; a query that does not wait for it.
inline int multiprocessors(const Call& call) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, call.device);
  if (error != cudaSuccess) raise(call, error);
  return count;
}

// Blocks in x for `work` of them: the grid's limit is far above any tensor that fits a device, but not above any int64.
inline unsigned grid_x(const Call& call, int64_t work) {
  if (work > 0x7fffffff) raise(call, cudaErrorInvalidConfiguration);
  return unsigned(work);
}

}  // namespace sage::cuda
