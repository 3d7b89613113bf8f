// What `sage-ext info` asks: which CUDA this is, and whether its kernels run on a device.
#include "query.h"

#include "device.cuh"

namespace sage::cuda {
namespace {
__global__ void probe() {}
}  // namespace

std::string versions() {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);  // 0: none
  char text[80];
  const int n = snprintf(text, sizeof text, "runtime %d.%d, ", runtime / 1000, runtime % 1000 / 10);
  if (driver)
    snprintf(text + n, sizeof text - n, "driver for CUDA %d.%d", driver / 1000, driver % 1000 / 10);
  else
    snprintf(text + n, sizeof text - n, "no driver");
  return text;
}

std::string problem(int device) try {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  return error == cudaSuccess ? "" : reason(device, error);
} catch (const std::runtime_error& error) {  // the device cannot be selected
  return error.what();
}

}  // namespace sage::cuda
