# sage_enable_cuda(<result> <why>): turns the CUDA language on if a toolkit is found that really compiles and links these
# kernels' headers with the static runtime; otherwise says in <why> what is missing.
#
# Architectures, first of: CMAKE_CUDA_ARCHITECTURES, the environment's CUDAARCHS, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), and
# by default real code for those of 80, 86, 89, 90, 100 and 120 that the compiler knows and PTX of the newest of them.
macro(sage_enable_cuda result why)
  set(${result} OFF)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(${why} "no working nvcc was found")
  else()
    sage_choose_architectures()
    enable_language(CUDA)
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/probe/probe.cu [=[
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(float* x) { *x = __bfloat162float(__float2bfloat16_rn(*x)) + __half2float(__float2half_rn(*x)); }
int main() {
  cudaLaunchConfig_t config = {};
  return cudaLaunchKernelEx(&config, probe, static_cast<float*>(nullptr)) == cudaSuccess;
}
]=])
    try_compile(SAGE_CUDA_PROBE ${CMAKE_CURRENT_BINARY_DIR}/probe ${CMAKE_CURRENT_BINARY_DIR}/probe/probe.cu
                CMAKE_FLAGS -DCMAKE_CUDA_RUNTIME_LIBRARY=Static)
    if(SAGE_CUDA_PROBE)
      set(${result} ON)
    else()
      set(${why} "nvcc ${CMAKE_CUDA_COMPILER_VERSION} cannot compile and link a small kernel (an incomplete toolkit?)")
    endif()
  endif()
endmacro()

macro(sage_choose_architectures)
  if(DEFINED CMAKE_CUDA_ARCHITECTURES OR DEFINED ENV{CUDAARCHS})
    # CMake reads them itself.
  elseif(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    string(REGEX REPLACE "[ ,;]+" ";" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
    set(CMAKE_CUDA_ARCHITECTURES "")
    foreach(arch IN LISTS wanted)
      if(NOT arch MATCHES "^([0-9]+)\\.([0-9]a?)(\\+PTX)?$")
        message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers like 9.0 or 9.0+PTX, got '${arch}'")
      endif()
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
      if(CMAKE_MATCH_3)
        list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-virtual")
      endif()
    endforeach()
  else()
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
    set(CMAKE_CUDA_ARCHITECTURES "")
    set(newest "")
    foreach(arch 80 86 89 90 100 120)
      if(known MATCHES "sm_${arch}[^0-9]")
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
        set(newest ${arch})
      endif()
    endforeach()
    if(newest)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80)  # a compiler that cannot list what it knows
    endif()
  endif()
endmacro()
