// Vectors that fill a register of the processor, and bfloat16 numbers, which become float32 in registers.
//
// A bfloat16 number is kept as its 16 bits. Loops that store a c10::BFloat16 do not vectorise, because its rounding
// branches on NaN.

#pragma once

#include <c10/util/bit_cast.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace dlrm {

// The float32 numbers in one register. Loops may hold 16 vectors at a time with AVX2, and 32 with AVX-512: the compiler
// puts all others on the stack.
#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

using Bfloat16Bits = uint16_t;

template <class T, int64_t lanes>
using Vector [[gnu::vector_size(lanes * sizeof(T))]] = T;

using Floats = Vector<float, kLanes>;
using Words = Vector<uint32_t, kLanes>;
using Halves = Vector<Bfloat16Bits, kLanes>;

// Returns a vector whose lane k is lane `lane[k]` of `left` and `right` laid end to end.
template <int... lane, class V>
inline V shuffled(V left, V right) {
#ifdef __clang__
  return __builtin_shufflevector(left, right, lane...);
#else
  return __builtin_shuffle(left, right, decltype(left < right){lane...});
#endif
}

inline float widened(float value) { return value; }
inline Floats widened(Floats values) { return values; }
inline float widened(Bfloat16Bits bits) { return c10::bit_cast<float>(uint32_t(bits) << 16); }

inline Floats widened(Halves bits) {
  // GCC 12 needs three instructions more for __builtin_convertvector than the processor does.
#if defined(__AVX512F__)
  return Floats(Words(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(bits))) << 16);
#elif defined(__AVX2__)
  return Floats(Words(_mm256_cvtepu16_epi32(__m128i(bits))) << 16);
#else
  return Floats(__builtin_convertvector(bits, Words) << 16);
#endif
}

constexpr uint32_t kNan = 0x7fc00000;  // the one NaN that torch rounds every NaN to

// Returns the upper half of the bits of `value` after adding `added` to them; NaN stays NaN.
inline Bfloat16Bits upper_half(float value, uint32_t added) {
  return Bfloat16Bits((value == value ? c10::bit_cast<uint32_t>(value) + added : kNan) >> 16);
}

// Rounds to the nearest bfloat16 number, and to the even one of two that are equally near, as torch does.
inline Bfloat16Bits rounded(float value) {
  return upper_half(value, 0x7fff + (c10::bit_cast<uint32_t>(value) >> 16 & 1));
}

inline Halves rounded(Floats values) {
  const Words bits = Words(values);
  const Words sums = bits + (0x7fff + (bits >> 16 & 1));
  return __builtin_convertvector((values == values ? sums : Words{} + kNan) >> 16, Halves);
}

// Rounds whole vectors to the type of numbers T: float or Bfloat16Bits.
template <class T>
inline auto converted(Floats values) {
  if constexpr (std::is_same_v<T, float>) return values;
  else return rounded(values);
}

// `load` returns the first `width` numbers of a vector, and zeros in the lanes beyond; `store` writes that many.

inline Halves load_bits(const Bfloat16Bits* from, int64_t width = kLanes) {
  Halves bits = {};
  std::memcpy(&bits, from, width * sizeof(*from));
  return bits;
}

inline Floats load(const Bfloat16Bits* from, int64_t width = kLanes) { return widened(load_bits(from, width)); }

inline Floats load(const float* from, int64_t width = kLanes) {
  Floats values = {};
  std::memcpy(&values, from, width * sizeof(*from));
  return values;
}

inline void store(float* to, Floats values, int64_t width = kLanes) { std::memcpy(to, &values, width * sizeof(*to)); }

inline void store(Bfloat16Bits* to, Halves bits, int64_t width = kLanes) {
  std::memcpy(to, &bits, width * sizeof(*to));
}

inline void store(Bfloat16Bits* to, Floats values, int64_t width = kLanes) { store(to, rounded(values), width); }

}  // namespace dlrm
