// Scalar helpers of the portable code: element conversion and two-level RoPE angles.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "csrc/kernels/params.h"

namespace cachedattn {

inline float ToFloat(float value) { return value; }

struct Bf16 {
  uint16_t bits;
};
inline float ToFloat(Bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

struct Fp16 {
  uint16_t bits;
};
inline float ToFloat(Fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero and denormals: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest, ties to even.
inline void FromFloat(float value, float* out) { *out = value; }
inline void FromFloat(float value, Bf16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // stays a NaN
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline void FromFloat(float value, Fp16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) {
    out->bits = sign | 0x7e00u;
  } else if (magnitude >= 65520.f) {
    out->bits = sign | 0x7c00u;
  } else if (magnitude < 0x1p-14f) {  // denormal: the addition rounds at 2^-24
    const uint32_t shifted = std::bit_cast<uint32_t>(magnitude + 0.5f);
    out->bits = static_cast<uint16_t>(sign | (shifted & 0x7fffu));
  } else {
    const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + ((bits >> 13) & 1);
    out->bits = static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
  }
}

// Calls fn with a null pointer of the element type: fn(static_cast<T*>(nullptr)).
template <typename Fn>
void WithElement(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return fn(static_cast<Bf16*>(nullptr));
    case DType::kFloat16:
      return fn(static_cast<Fp16*>(nullptr));
  }
}

// cos and sin of pair `pair` at `position`: the product of a hi and a lo rotation.
inline void PairAngle(const RopeTables& rope, int64_t position, int pair, float* cosine,
                      float* sine) {
  const int64_t half = rope.rotary_dim / 2;
  const float* lo = rope.lo + ((position % RopeTables::kLoRows) * half + pair) * 2;
  const float* hi = rope.hi + ((position / RopeTables::kLoRows) * half + pair) * 2;
  *cosine = hi[0] * lo[0] - hi[1] * lo[1];
  *sine = hi[1] * lo[0] + hi[0] * lo[1];
}

// First and second dimension of a rotary pair.
inline int PairFirst(const RopeTables& rope, int pair) {
  return rope.interleaved ? 2 * pair : pair;
}
inline int PairSecond(const RopeTables& rope, int pair) {
  return rope.interleaved ? 2 * pair + 1 : pair + rope.rotary_dim / 2;
}

}  // namespace cachedattn
