// SIMD lanes: one source, compiled once for each instruction set (SAGE_ISA names the variant; CMakeLists.txt
// sets the flags). Lanes<T> is a thin wrapper over GCC/Clang vector types, so that the formulas of csrc/math/
// read as scalar code and serve CPU lanes and CUDA threads alike. Everything here has internal linkage or
// lives in the variant's namespace.
//
// Contraction is off (-ffp-contract=off) and fma() explicit: a row's bits then depend on its own numbers
// alone, never on where the compiler unrolled a loop.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "../math/scalar.h"

#if defined(__AVX512F__)
#define SAGE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SAGE_VECTOR_BYTES 32
#else
#define SAGE_VECTOR_BYTES 16
#endif

namespace sage::cpu::SAGE_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
struct Traits;
template <>
struct Traits<float> {
  typedef float Vec __attribute__((vector_size(SAGE_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(SAGE_VECTOR_BYTES)));
  static constexpr int mantissa = 23;
};
template <>
struct Traits<double> {
  typedef double Vec __attribute__((vector_size(SAGE_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(SAGE_VECTOR_BYTES)));
  static constexpr int mantissa = 52;
};

template <class T>
struct Bits {  // a lane-wise truth value: all ones or all zeros
  using Int = typename Traits<T>::Int;
  Int v;
  friend SAGE_FN Bits operator&(Bits a, Bits b) { return {a.v & b.v}; }
  friend SAGE_FN Bits operator|(Bits a, Bits b) { return {a.v | b.v}; }
  friend SAGE_FN Bits operator~(Bits a) { return {~a.v}; }
};

template <class T>
struct Lanes {
  using Scalar = T;
  using Vec = typename Traits<T>::Vec;
  using Int = typename Traits<T>::Int;
  using Mask = Bits<T>;
  static constexpr int width = SAGE_VECTOR_BYTES / sizeof(T);
  Vec v;

  Lanes() = default;
  SAGE_FN Lanes(T s) : v(s - Vec{}) {}  // exact for -0 too, so the compiler sees a plain broadcast
  SAGE_FN Lanes(Vec x) : v(x) {}
  SAGE_FN T operator[](int i) const { return v[i]; }

  friend SAGE_FN Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
  friend SAGE_FN Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
  friend SAGE_FN Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
  friend SAGE_FN Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
  friend SAGE_FN Lanes operator-(Lanes a) { return -a.v; }
  SAGE_FN Lanes& operator+=(Lanes b) {
    v += b.v;
    return *this;
  }
  SAGE_FN Lanes& operator-=(Lanes b) {
    v -= b.v;
    return *this;
  }
  SAGE_FN Lanes& operator*=(Lanes b) {
    v *= b.v;
    return *this;
  }
  friend SAGE_FN Mask operator<(Lanes a, Lanes b) { return {a.v < b.v}; }
  friend SAGE_FN Mask operator>(Lanes a, Lanes b) { return {a.v > b.v}; }
  friend SAGE_FN Mask operator<=(Lanes a, Lanes b) { return {a.v <= b.v}; }
  friend SAGE_FN Mask operator>=(Lanes a, Lanes b) { return {a.v >= b.v}; }
};

template <class T>
SAGE_FN Lanes<T> select(Bits<T> m, Lanes<T> a, Lanes<T> b) {
  return m.v ? a.v : b.v;
}
template <class T>
SAGE_FN Bits<T> negate(Bits<T> m) {
  return ~m;
}
template <class T>
SAGE_FN Lanes<T> max(Lanes<T> a, Lanes<T> b) {
  return select(a > b, a, b);
}
template <class T>
SAGE_FN Lanes<T> min(Lanes<T> a, Lanes<T> b) {
  return select(a < b, a, b);
}
template <class T>
SAGE_FN Lanes<T> abs(Lanes<T> a) {
  return max(a, -a);
}

template <class T>
SAGE_FN bool any(Bits<T> m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m.v, (__m512i)m.v) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)m.v) != 0;
#else
  for (int i = 0; i < Lanes<T>::width; ++i)
    if (m.v[i]) return true;
  return false;
#endif
}

SAGE_FN Lanes<float> fma(Lanes<float> a, Lanes<float> b, Lanes<float> c) {
#if defined(__AVX512F__)
  return (Traits<float>::Vec)_mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(__FMA__)
  return (Traits<float>::Vec)_mm256_fmadd_ps(a.v, b.v, c.v);
#else
  return a * b + c;
#endif
}
SAGE_FN Lanes<double> fma(Lanes<double> a, Lanes<double> b, Lanes<double> c) {
#if defined(__AVX512F__)
  return (Traits<double>::Vec)_mm512_fmadd_pd(a.v, b.v, c.v);
#elif defined(__FMA__)
  return (Traits<double>::Vec)_mm256_fmadd_pd(a.v, b.v, c.v);
#else
  return a * b + c;
#endif
}

// Sum of all lanes, halves folded onto each other: a fixed order.
template <class T, int N>
struct Short {
  typedef T Vec __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
SAGE_FN T fold(typename Short<T, 2>::Vec x) {
  return x[0] + x[1];
}
template <class T>
SAGE_FN T fold(typename Short<T, 4>::Vec x) {
  return fold<T>(__builtin_shufflevector(x, x, 0, 1) + __builtin_shufflevector(x, x, 2, 3));
}
template <class T>
SAGE_FN T fold(typename Short<T, 8>::Vec x) {
  return fold<T>(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
}
template <class T>
SAGE_FN T fold(typename Short<T, 16>::Vec x) {
  return fold<T>(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
}
template <class T>
SAGE_FN T sum(Lanes<T> a) {
  return fold<T>(a.v);
}

// --------------------------------------------------------------------------------------------- exp and log
// Argument reduction with a two-part ln 2, then a Taylor polynomial long enough that its remainder
// (noted) is under half an ulp. exp flushes to 0 below the smallest normal number and overflows to infinity
// half a power of two early.
template <class T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f, round = 12582912.0f;
  static constexpr float exp_min = -87.33654f, exp_max = 88.376f, min_normal = 1.17549435e-38f;
  static constexpr int exp_degree = 7;  // 0.347^8 / 8! = 5e-9
  static constexpr int log_degree = 5;  // 0.04^6 / 13 = 3e-10
  static constexpr int32_t two_thirds = 0x3f2aaaab;
};
template <>
struct MathConstants<double> {
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0, exp_min = -708.39, exp_max = 709.43;
  static constexpr double min_normal = 2.2250738585072014e-308;
  static constexpr int exp_degree = 13;  // 0.347^14 / 14! = 4e-18
  static constexpr int log_degree = 11;  // 0.04^12 / 25 = 7e-19
  static constexpr int64_t two_thirds = 0x3fe5555555555555;
};

constexpr double inverse_factorial(int k) { return k == 0 ? 1.0 : inverse_factorial(k - 1) / k; }
template <class T>
struct ExpSeries {
  T c[MathConstants<T>::exp_degree + 1];
  constexpr ExpSeries() : c() {
    for (int k = 0; k <= MathConstants<T>::exp_degree; ++k) c[k] = T(inverse_factorial(k));
  }
};
template <class T>
struct LogSeries {  // 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...)
  T c[MathConstants<T>::log_degree + 1];
  constexpr LogSeries() : c() {
    for (int k = 0; k <= MathConstants<T>::log_degree; ++k) c[k] = T(1.0 / (2 * k + 1));
  }
};

template <class T>
SAGE_FN Lanes<T> exp(Lanes<T> x) {
  using C = MathConstants<T>;
  using L = Lanes<T>;
  using Int = typename L::Int;
  constexpr ExpSeries<T> series;
  const L clamped = min(max(x, L(C::exp_min)), L(C::exp_max));
  const L shifted = fma(clamped, L(T(1.44269504088896340736)), L(C::round));
  const L n = shifted - L(C::round);
  L r = fma(n, L(-C::ln2_hi), clamped);
  r = fma(n, L(-C::ln2_lo), r);
  L p(series.c[C::exp_degree]);
#pragma GCC unroll 16
  for (int k = C::exp_degree - 1; k >= 0; --k) p = fma(p, r, L(series.c[k]));
  // The low bits of `shifted` hold n: move them into the exponent.
  const Int scaled = (Int)p.v + ((Int)shifted.v << Traits<T>::mantissa);
  L y((typename L::Vec)scaled);
  y = select(x < L(C::exp_min), L(T(0)), y);
  y = select(x > L(C::exp_max), L(T(__builtin_inf())), y);
  return select(x <= x, y, x);  // NaN
}

template <class T>
SAGE_FN Lanes<T> log(Lanes<T> x) {
  using C = MathConstants<T>;
  using L = Lanes<T>;
  using Int = typename L::Int;
  constexpr LogSeries<T> series;
  constexpr int lift = 64;  // subnormals are scaled into the normal range first
  const auto tiny = x < L(C::min_normal);
  const L y = select(tiny, x * L(T(18446744073709551616.0)), x);
  const Int bits = (Int)y.v;
  const Int e = (bits - C::two_thirds) >> Traits<T>::mantissa;
  const L m((typename L::Vec)(bits - (e << Traits<T>::mantissa)));  // in [2/3, 4/3)
  const L exponent = L(__builtin_convertvector(e, typename L::Vec)) - select(tiny, L(T(lift)), L(T(0)));
  const L f = m - L(T(1));
  const L s = f / (f + L(T(2)));
  const L z = s * s;
  L p(series.c[C::log_degree]);
#pragma GCC unroll 16
  for (int k = C::log_degree - 1; k >= 1; --k) p = fma(p, z, L(series.c[k]));
  const L s2 = s + s;
  L r = fma(exponent, L(C::ln2_lo), s2 * (z * p));
  r = fma(exponent, L(C::ln2_hi), s2 + r);
  r = select(x > L(T(0)), r, select(x < L(T(0)), L(T(__builtin_nan(""))), L(-T(__builtin_inf()))));
  return select(x < L(T(__builtin_inf())), r, x);  // +inf and NaN
}
template <class T>
SAGE_FN Lanes<T> sqrt(Lanes<T> x);
template <>
SAGE_FN Lanes<float> sqrt(Lanes<float> x) {
  for (int i = 0; i < Lanes<float>::width; ++i) x.v[i] = __builtin_sqrtf(x.v[i]);
  return x;
}
template <>
SAGE_FN Lanes<double> sqrt(Lanes<double> x) {
  for (int i = 0; i < Lanes<double>::width; ++i) x.v[i] = __builtin_sqrt(x.v[i]);
  return x;
}

// ------------------------------------------------------------------------------------------------- memory
// Loads and stores of `width` consecutive numbers, converting to and from the arithmetic type; `n` < width
// touches the first n alone and reads 0 for the rest.
template <class A>
SAGE_FN Lanes<A> load(const A* p) {
  Lanes<A> x;
  std::memcpy(&x.v, p, sizeof x.v);
  return x;
}
template <class A>
SAGE_FN void store(A* p, Lanes<A> x) {
  std::memcpy(p, &x.v, sizeof x.v);
}

SAGE_FN Lanes<double> load_double(const double* p) { return load(p); }
SAGE_FN Lanes<double> load_double(const float* p) {
  typedef float Half __attribute__((vector_size(SAGE_VECTOR_BYTES / 2)));
  Half h;
  std::memcpy(&h, p, sizeof h);
  return Lanes<double>(__builtin_convertvector(h, Traits<double>::Vec));
}
SAGE_FN void store_double(double* p, Lanes<double> x) { store(p, x); }
SAGE_FN void store_double(float* p, Lanes<double> x) {
  typedef float Half __attribute__((vector_size(SAGE_VECTOR_BYTES / 2)));
  const Half h = __builtin_convertvector(x.v, Half);
  std::memcpy(p, &h, sizeof h);
}

typedef uint16_t HalfBits __attribute__((vector_size(SAGE_VECTOR_BYTES / 2)));
typedef uint32_t WordBits __attribute__((vector_size(SAGE_VECTOR_BYTES)));

SAGE_FN Lanes<float> load(const bf16* p) {
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  const WordBits w = __builtin_convertvector(h, WordBits) << 16;
  return Lanes<float>((Traits<float>::Vec)w);
}
SAGE_FN void store(bf16* p, Lanes<float> x) {  // round to nearest even; NaN stays a (quiet) NaN
  const WordBits w = (WordBits)x.v;
  const WordBits rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  const WordBits quiet = (w >> 16) | 0x40;
  const WordBits is_nan = (WordBits)((w & 0x7fffffff) > 0x7f800000);
  const HalfBits h = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), HalfBits);
  std::memcpy(p, &h, sizeof h);
}

#if !defined(__F16C__)
SAGE_FN float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
  uint32_t bits = body << 13;
  float f;
  if (body >= 0x7c00) {
    bits += 0x70000000;  // Inf, NaN: the exponent's ones all the way
  } else if (body >= 0x0400) {
    bits += 0x38000000;
  } else {  // subnormal: body * 2^-24, exact
    f = float(body) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
SAGE_FN uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {  // subnormal: adding 0.5 aligns the result's last bit with 2^-24
    float a;
    std::memcpy(&a, &bits, 4);
    a += 0.5f;
    std::memcpy(&bits, &a, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}
#endif
SAGE_FN Lanes<float> load(const f16* p) {
#if defined(__AVX512F__)
  return Lanes<float>((Traits<float>::Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__)
  return Lanes<float>((Traits<float>::Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Lanes<float> x;
  for (int i = 0; i < Lanes<float>::width; ++i) x.v[i] = half_to_float(p[i].bits);
  return x;
#endif
}
SAGE_FN void store(f16* p, Lanes<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Lanes<float>::width; ++i) p[i].bits = float_to_half(x.v[i]);
#endif
}

template <class T>
SAGE_FN Lanes<ArithmeticOf<T>> load(const T* p, int n) {
  T x[Lanes<ArithmeticOf<T>>::width] = {};
  std::memcpy(x, p, size_t(n) * sizeof(T));
  return load(x);
}
template <class T>
SAGE_FN void store(T* p, Lanes<ArithmeticOf<T>> v, int n) {
  T x[Lanes<ArithmeticOf<T>>::width];
  store(x, v);
  std::memcpy(p, x, size_t(n) * sizeof(T));
}
// Access to the vectors of a row of `dim` numbers: for_each_vector(dim, f) calls f(d, access) for each whole
// vector and, once, for the rest.
struct Whole {
  template <class T>
  SAGE_FN auto read(const T* p) const {
    return load(p);
  }
  template <class T, class V>
  SAGE_FN void write(T* p, V x) const {
    store(p, x);
  }
  template <class T>
  SAGE_FN Lanes<T> keep(Lanes<T> x) const {
    return x;
  }
};
struct Part {
  int n;
  template <class T>
  SAGE_FN auto read(const T* p) const {
    return load(p, n);
  }
  template <class T, class V>
  SAGE_FN void write(T* p, V x) const {
    store(p, x, n);
  }
  template <class T>
  SAGE_FN Lanes<T> keep(Lanes<T> x) const;  // 0 in the lanes past the end
};
template <int W, class F>
SAGE_FN void for_each_vector(int64_t dim, F f) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) f(d, Whole{});
  if (d < dim) f(d, Part{int(dim - d)});
}

// The first n lanes true.
template <class T>
SAGE_FN Bits<T> first(int n) {
  Bits<T> m;
  for (int i = 0; i < Lanes<T>::width; ++i) m.v[i] = i < n ? -1 : 0;
  return m;
}

template <class T>
SAGE_FN Lanes<T> Part::keep(Lanes<T> x) const {
  return select(first<T>(n), x, Lanes<T>(T(0)));
}

}  // namespace sage::cpu::SAGE_ISA
