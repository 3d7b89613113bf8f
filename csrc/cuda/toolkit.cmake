# sage_enable_cuda(<result> <why>): turns the CUDA language on if a toolkit is found that really compiles and links these
# kernels' headers with the static runtime; otherwise says in <why> what is missing.
#
# Architectures, first of: CMAKE_CUDA_ARCHITECTURES, the environment's CUDAARCHS, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"); then,
# with SAGE_EXT_CUDA=AUTO, those of the GPUs in this machine; with ON, to hand to others, real code for those of 80, 86, 89,
# 90, 100 and 120 that the compiler knows and PTX of the newest of them.

# sage_find_gpus(<result>): compute capabilities of this machine's GPUs, such as 90;86, from 80 up. Empty without any.
function(sage_find_gpus result)
  set(${result} "" PARENT_SCOPE)
  find_program(SAGE_NVIDIA_SMI nvidia-smi)
  if(SAGE_NVIDIA_SMI)
    execute_process(COMMAND ${SAGE_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET TIMEOUT 20)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${found}")
    if(failed EQUAL 0 AND found)
      string(REPLACE "." "" found "${found}")
      list(REMOVE_DUPLICATES found)
      list(FILTER found EXCLUDE REGEX "^[0-7][0-9]$")
      set(${result} ${found} PARENT_SCOPE)
    endif()
  endif()
endfunction()

macro(sage_enable_cuda result why)
  set(${result} OFF)
  sage_find_gpus(SAGE_GPUS)
  if(SAGE_EXT_CUDA STREQUAL "AUTO" AND NOT SAGE_GPUS AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS}
     AND NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    set(${why} "no GPU of compute capability 8.0 or more is visible here and no architecture was named")
  else()
    sage_probe_cuda(${result} ${why})
  endif()
endmacro()

macro(sage_probe_cuda result why)
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
    set(wanted 80 86 89 90 100 120)
    set(newest "")
    foreach(arch IN LISTS wanted)
      if(known MATCHES "sm_${arch}[^0-9]")
        set(newest ${arch})
      endif()
    endforeach()
    if(SAGE_EXT_CUDA STREQUAL "AUTO")
      set(wanted ${SAGE_GPUS})
    endif()
    set(CMAKE_CUDA_ARCHITECTURES "")
    set(ptx OFF)
    foreach(arch IN LISTS wanted)
      if(known MATCHES "sm_${arch}[^0-9]")
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
      else()
        set(ptx ON)  # a GPU newer than the compiler: the driver translates
      endif()
    endforeach()
    if(newest AND (ptx OR SAGE_EXT_CUDA STREQUAL "ON"))
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
    elseif(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80)  # a compiler that cannot list what it knows
    endif()
  endif()
endmacro()
