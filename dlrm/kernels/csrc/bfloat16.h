// bfloat16 numbers as their 16 bits. Loops that store a c10::BFloat16 do not vectorise, as it branches on NaN.

#pragma once

#include <c10/util/bit_cast.h>

#include <cstdint>

namespace dlrm {

using Bfloat16Bits = uint16_t;

inline float widened(float value) { return value; }
inline float widened(Bfloat16Bits bits) { return c10::bit_cast<float>(uint32_t(bits) << 16); }

// The upper half of a float's bits plus `added`, or of the one NaN that torch rounds all of them to.
inline Bfloat16Bits upper_half(float value, uint32_t added) {
  return Bfloat16Bits((value == value ? c10::bit_cast<uint32_t>(value) + added : 0x7fc00000) >> 16);
}

// To the nearest, ties to even.
inline Bfloat16Bits rounded(float value) {
  return upper_half(value, 0x7fff + (c10::bit_cast<uint32_t>(value) >> 16 & 1));
}

}  // namespace dlrm
