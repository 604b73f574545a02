// Rows of a table: float or bfloat16 in memory, float in registers.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace dlrm {

inline void check_table(const at::Tensor& weight, int64_t dim) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == dim && weight.is_contiguous(),
              "tables must be contiguous and of the same dimension, ", dim, ", not ", weight.sizes());
}

// Calls f(pointer to the tensor's numbers) with their type: float, or Bfloat16Bits, which `load` and `widened` read.
template <class F>
void with_type(const at::Tensor& tensor, F f) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "float32 or bfloat16 is needed, not ", type);
  if (type == at::kFloat) f(static_cast<float*>(tensor.data_ptr()));
  else f(static_cast<Bfloat16Bits*>(tensor.data_ptr()));
}

constexpr int64_t kCacheLine = 64;
constexpr int64_t kAhead = 32;  // rows to prefetch; more gains nothing, and they must stay cached till used

// Asks for a row ahead of its use. A row of a large table is a miss, about 100 ns, and the processor cannot guess which
// one is next. Into L2, and for reading even where the row will be written: what waits for the L1 cache, or to
// own a line, holds one of its few fill buffers, and a core with those full gets half as much from memory.
template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
  const char* begin = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < dim * int64_t(sizeof(T)); byte += kCacheLine) __builtin_prefetch(begin + byte, 0, 2);
}

// 16 numbers: one AVX-512 register; the compiler splits it where registers are narrower.
constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from, int64_t width = kLanes) {
  Floats values = {};
  std::memcpy(&values, from, width * sizeof(float));
  return values;
}

inline Floats load(const Bfloat16Bits* from, int64_t width = kLanes) {
  Halves halves = {};
  std::memcpy(&halves, from, width * sizeof(uint16_t));
  return Floats(__builtin_convertvector(halves, Words) << 16);
}

// Columns [column, column + width) of a sum of rows; width <= kLanes * Registers, and equal to it if Whole.
template <int Registers, bool Whole, class T>
inline void sum_columns(const T* rows, int64_t stride, const int32_t* index, int64_t count, int64_t column,
                        int64_t width, float* sum) {
  Floats total[Registers] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T* from = rows + index[i] * stride + column;
#pragma GCC unroll 8
    for (int r = 0; r < Registers; ++r) total[r] += load(from + r * kLanes, Whole ? kLanes : width);
  }
  std::memcpy(sum + column, total, Whole ? sizeof(total) : width * sizeof(float));
}

// sum[0..dim) = the sum of rows[index[i]] over the `count` i, rows `stride` numbers apart, in the order of i.
// It is added up in registers, as many columns at a time as fit.
template <class T>
inline void sum_rows(const T* rows, int64_t stride, const int32_t* index, int64_t count, int64_t dim, float* sum) {
  int64_t column = 0;
  for (; column + 8 * kLanes <= dim; column += 8 * kLanes)
    sum_columns<8, true>(rows, stride, index, count, column, 8 * kLanes, sum);
  for (; column + 4 * kLanes <= dim; column += 4 * kLanes)
    sum_columns<4, true>(rows, stride, index, count, column, 4 * kLanes, sum);
  for (; column + kLanes <= dim; column += kLanes)
    sum_columns<1, true>(rows, stride, index, count, column, kLanes, sum);
  if (column < dim) sum_columns<1, false>(rows, stride, index, count, column, dim - column, sum);
}

}  // namespace dlrm
