// Shim: half precision as its bits; conversions round to nearest even, as the hardware's do.
#pragma once
#include <cstdint>
#include <cstring>

struct __half { uint16_t bits; };

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, body = h.bits & 0x7fff;
  uint32_t bits;
  if (body >= 0x7c00) {
    bits = (body << 13) + 0x70000000;
  } else if (body >= 0x0400) {
    bits = (body << 13) + 0x38000000;
  } else {
    const float f = float(body) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __half __float2half_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(0x7fff)};  // NVIDIA's canonical NaN
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (bits < 0x38800000) {  // subnormal: adding 0.5 aligns the result's last bit with 2^-24
    float a;
    std::memcpy(&a, &bits, 4);
    a += 0.5f;
    std::memcpy(&bits, &a, 4);
    return {uint16_t(sign | uint16_t(bits - 0x3f000000))};
  }
  bits += 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | uint16_t((bits - 0x38000000) >> 13))};
}
