// The emulator's own controls, for the tests: bound beside the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

// The device of a call: the ops' tensors lie on the CPU, so what they pass for it is a number of threads.
int simt_device_of(uintptr_t stream) {
  return stream ? reinterpret_cast<cudaStream_t>(stream)->device : simt::device;
}

void bind_simt(pybind11::module_ m) {
  m.def("set_order", &simt::set_order);
  m.def("launches", &simt::launches);
  m.def("switches", &simt::switches);
  m.def("set_device", [](int processors, int shared_memory) {
    simt::processors = processors, simt::shared_memory_limit = shared_memory;
  });
  m.def("allocations", &simt::allocations);
#if defined(SAGE_SIMT_RACES)
  m.def("detect", &simt::detect, pybind11::arg("collect"), pybind11::arg("preempt_one_in") = 0, pybind11::arg("seed") = 0);
  m.def("races", &simt::races);
  m.def("accesses", &simt::accesses);
#endif
  m.def("allocate", [](size_t bytes, bool device) {  // device memory, or pinned
    void* p = nullptr;
    if ((device ? cudaMalloc(&p, bytes) : cudaHostAlloc(&p, bytes, 0)) != cudaSuccess) throw std::bad_alloc();
    return reinterpret_cast<uintptr_t>(p);
  });
  m.def("release", [](uintptr_t p) { cudaFree(reinterpret_cast<void*>(p)); });
  m.def("upload", [](uintptr_t to, uintptr_t from, size_t bytes) {
    const void* source = reinterpret_cast<const void*>(from);
    if (cudaMemcpyAsync(reinterpret_cast<void*>(to), source, bytes, cudaMemcpyHostToDevice, nullptr) != cudaSuccess)
      throw std::invalid_argument("upload");
  });
  // A stream in capture: work sent to it is counted and dropped. end_capture: the count, or -1 where something was refused.
  m.def("create_stream", [] {
    cudaStream_t stream = nullptr;
    if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) throw std::bad_alloc();
    return reinterpret_cast<uintptr_t>(stream);
  });
  m.def("destroy_stream", [](uintptr_t stream) { cudaStreamDestroy(reinterpret_cast<cudaStream_t>(stream)); });
  m.def("begin_capture", [](uintptr_t stream) { simt::begin_capture(reinterpret_cast<cudaStream_t>(stream)); });
  m.def("end_capture", [](uintptr_t stream) { return simt::end_capture(reinterpret_cast<cudaStream_t>(stream)); });
  m.def("select", [](int device) { return int(cudaSetDevice(device)); });
  m.def("selected", [] { return simt::device; });
  m.def("contexts", [] { return std::vector<bool>(std::begin(simt::contexts), std::end(simt::contexts)); });
  m.def("forget_contexts", [] { std::fill(std::begin(simt::contexts), std::end(simt::contexts), false); });
  m.def("set_inexact", [](bool inexact) { simt::inexact = inexact; });  // expf and logf
  m.def("fail_next_launch", [](int error) { simt::planted = static_cast<cudaError_t>(error); });
}
