// 16-bit floats, bit for bit as a GPU converts them: to nearest, ties to even; NaN becomes 0x7fff.
#pragma once

#include <bit>
#include <cstdint>

#include "csrc/kernels/cuda/device.h"

namespace cachedattn::emu {

template <typename T>
uint16_t ToBits(float value);
template <typename T>
float ToFloat(uint16_t bits);

template <>
inline uint16_t ToBits<cuda::Bf16>(float value) {
  const uint32_t word = std::bit_cast<uint32_t>(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}
template <>
inline float ToFloat<cuda::Bf16>(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

template <>
inline uint16_t ToBits<cuda::Fp16>(float value) {
  const uint32_t word = std::bit_cast<uint32_t>(value);
  const uint32_t sign = word >> 16 & 0x8000u, magnitude = word & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a unit is 2^-24, that of a float near 0.5: adding 0.5 rounds to it.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
template <>
inline float ToFloat<cuda::Fp16>(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  // The exponent's bias is 15 there and 127 here; infinity and NaN get the largest exponent.
  uint32_t word = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) word |= 0x7f800000u;
  return std::bit_cast<float>(sign | word);
}

}  // namespace cachedattn::emu
