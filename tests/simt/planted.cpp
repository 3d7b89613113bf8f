// Python module of planted.cu, numpy-free: addresses in.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

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

}  // namespace

PYBIND11_MODULE(SAGE_MODULE_NAME, m) {
  m.def("planted", [](int which, uintptr_t x, uintptr_t out) {
    sage::cuda::planted(which, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out));
  });
  m.def("runtime", &runtime);
  bind_simt(m.def_submodule("simt"));
}
