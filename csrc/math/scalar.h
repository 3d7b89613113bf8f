// The number V that a formula is written in: a float or double of one CUDA thread, or a row of CPU lanes (cpu/isa.h).
// Both offer + - * / < > and exp, log, sqrt, fma, abs, min, max, select(mask, a, b), negate(mask), any(mask); here
// are those of plain numbers.
#pragma once
#include <cmath>

#if defined(__CUDACC__) || defined(__host__)  // nvcc, or the emulation's headers
#define SAGE_FN __host__ __device__ __forceinline__
#else
#define SAGE_FN inline __attribute__((always_inline))
#endif

namespace sage {

template <class V>
struct ScalarOf {
  using Type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
  using Type = float;
};
template <>
struct ScalarOf<double> {
  using Type = double;
};

// What a stored type is computed in: double in double, all others in float.
template <class T>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<double> {
  using Type = double;
};
template <class T>
using ArithmeticOf = typename Arithmetic<T>::Type;

template <class V>
using MaskOf = decltype(V() < V());  // bool, or a truth value a lane

SAGE_FN float select(bool m, float a, float b) { return m ? a : b; }
SAGE_FN double select(bool m, double a, double b) { return m ? a : b; }
SAGE_FN bool any(bool m) { return m; }
SAGE_FN bool negate(bool m) { return !m; }
SAGE_FN float max(float a, float b) { return a > b ? a : b; }
SAGE_FN double max(double a, double b) { return a > b ? a : b; }
SAGE_FN float min(float a, float b) { return a < b ? a : b; }
SAGE_FN double min(double a, double b) { return a < b ? a : b; }
SAGE_FN float abs(float a) { return fabsf(a); }
SAGE_FN double abs(double a) { return fabs(a); }
SAGE_FN float exp(float a) { return expf(a); }
SAGE_FN double exp(double a) { return ::exp(a); }
#if defined(__CUDACC__) && \
    defined(SAGE_SHORT_CODE)  // one logarithm for all of a file's formulas: code that is fetched costs time
[[gnu::noinline]] static __device__ float called_log(float a) { return logf(a); }
#endif
SAGE_FN float log(float a) {
#if defined(__CUDA_ARCH__) && defined(SAGE_SHORT_CODE)
  return called_log(a);
#else
  return logf(a);
#endif
}
SAGE_FN double log(double a) { return ::log(a); }
SAGE_FN float sqrt(float a) { return sqrtf(a); }
SAGE_FN double sqrt(double a) { return ::sqrt(a); }
SAGE_FN float fma(float a, float b, float c) { return fmaf(a, b, c); }
SAGE_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }

}  // namespace sage
