// The emulator's own controls, for the tests: bound beside the kernels.
#include <pybind11/pybind11.h>

#include "cuda_runtime.h"

void bind_simt(pybind11::module_ m) {
  m.def("set_order", &simt::set_order);
  m.def("launches", &simt::launches);
  m.def("switches", &simt::switches);
  m.def("fail_next_launch", [](int error) { simt::planted = static_cast<cudaError_t>(error); });
}
