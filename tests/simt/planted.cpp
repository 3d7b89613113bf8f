// Python module of planted.cu, numpy-free: addresses in.
#include <pybind11/pybind11.h>

#include <cstdint>

void bind_simt(pybind11::module_ m);
namespace sage::cuda {
void planted(int which, const float* x, float* out);
}

PYBIND11_MODULE(SAGE_MODULE_NAME, m) {
  m.def("planted", [](int which, uintptr_t x, uintptr_t out) {
    sage::cuda::planted(which, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out));
  });
  bind_simt(m.def_submodule("simt"));
}
