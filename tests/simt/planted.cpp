// Python module of planted.cu, numpy-free: addresses in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

void bind_simt(pybind11::module_ m);
namespace sage::cuda {
void planted(int which, const float* x, float* out);
}

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("cudaError " + std::to_string(int(error)));
}

// What comes back of a number that goes to the device and is changed on the host before the stream gets there.
float runtime(const std::string& which) {
  cudaStream_t first, second;
  cudaEvent_t event;
  check(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
  check(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  void *memory, *there;
  check(cudaHostAlloc(&memory, 2 * sizeof(float), cudaHostAllocMapped));
  check(cudaMalloc(&there, sizeof(float)));
  float *pinned = static_cast<float*>(memory), *back = pinned + 1, heap = 1;
  *pinned = 1;
  const auto up = [&](const float* from, size_t n = 1) {
    check(cudaMemcpyAsync(there, from, n * sizeof(float), cudaMemcpyHostToDevice, first));
  };
  const auto down = [&](cudaStream_t stream) {
    check(cudaMemcpyAsync(back, there, sizeof(float), cudaMemcpyDeviceToHost, stream));
  };
  if (which == "touch") *pinned = *static_cast<float*>(there);
  up(which == "pageable" ? &heap : pinned, which == "long" ? 2 : 1);
  *pinned = heap = 2;
  if (which == "kind") check(cudaMemcpyAsync(pinned, &heap, sizeof(float), cudaMemcpyHostToDevice, first));
  if (which == "event") check(cudaEventRecord(event, first)), check(cudaStreamWaitEvent(second, event, 0));
  const bool other = which == "event" || which == "no event";
  down(other ? second : first);
  if (which != "forgotten") check(cudaStreamSynchronize(other ? second : first));
  const float found = *back;
  check(cudaStreamDestroy(first)), check(cudaStreamDestroy(second)), check(cudaEventDestroy(event));
  check(cudaFree(there)), check(cudaFreeHost(memory));
  return found;
}

// What a stream in capture answers to `which`, and how much work it has then captured.
std::pair<int, int64_t> captured(const std::string& which) {
  cudaStream_t stream;
  cudaEvent_t event;
  void *memory, *there, *more = nullptr;
  float heap = 1;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  check(cudaHostAlloc(&memory, sizeof(float), cudaHostAllocMapped));
  check(cudaMalloc(&there, sizeof(float)));
  simt::begin_capture(stream);
  cudaError_t found = cudaSuccess;
  if (which == "malloc") found = cudaMalloc(&more, sizeof(float));
  if (which == "host") found = cudaHostAlloc(&more, sizeof(float), cudaHostAllocMapped);
  if (which == "stream") found = cudaStreamSynchronize(stream);
  if (which == "event") check(cudaEventRecord(event, stream)), found = cudaEventSynchronize(event);
  const void* from = which == "pageable" ? &heap : memory;
  if (which == "pageable" || which == "pinned")
    found = cudaMemcpyAsync(there, from, sizeof(float), cudaMemcpyHostToDevice, stream);
  if (which == "memset") found = cudaMemsetAsync(there, 0, sizeof(float), stream);
  const int64_t work = simt::end_capture(stream);
  check(cudaStreamDestroy(stream)), check(cudaEventDestroy(event));
  check(cudaFree(there)), check(cudaFreeHost(memory)), check(cudaFree(more));
  return {int(found), work};
}

// What the runtime answers to a use of device 0's stream or memory while device 1 is the current one.
int elsewhere(const std::string& which, int current) {
  cudaStream_t stream, there;
  void *memory, *pinned;
  check(cudaSetDevice(1));
  check(cudaStreamCreateWithFlags(&there, cudaStreamNonBlocking));
  check(cudaSetDevice(0));
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaMalloc(&memory, sizeof(float)));
  check(cudaHostAlloc(&pinned, sizeof(float), cudaHostAllocMapped));
  check(cudaSetDevice(current));
  cudaError_t found = cudaSuccess;
  if (which == "launch") {
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(32);
    config.stream = stream;
    found = cudaLaunchKernelEx(&config, +[](int) {}, 0);
  }
  const cudaStream_t used = current == 0 ? stream : there;
  if (which == "copy") found = cudaMemcpyAsync(memory, pinned, sizeof(float), cudaMemcpyHostToDevice, used);
  if (which == "memset") found = cudaMemsetAsync(memory, 0, sizeof(float), used);
  check(cudaStreamDestroy(stream)), check(cudaStreamDestroy(there));
  check(cudaFree(memory)), check(cudaFreeHost(pinned)), check(cudaSetDevice(0));
  return int(found);
}

// The current device under DeviceGuard.
int guarded(int device, bool must) {
  const sage::cuda::DeviceGuard guard(device, must);
  return simt::device;
}

}  // namespace

PYBIND11_MODULE(SAGE_MODULE_NAME, m) {
  m.def("planted", [](int which, uintptr_t x, uintptr_t out) {
    sage::cuda::planted(which, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out));
  });
  m.def("runtime", &runtime);
  m.def("captured", &captured);
  m.def("elsewhere", &elsewhere);
  m.def("guarded", &guarded);
  bind_simt(m.def_submodule("simt"));
}
