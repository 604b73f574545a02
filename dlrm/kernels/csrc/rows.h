// Rows of tables: checks, prefetching and sums.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace dlrm {

inline void check_table(const at::Tensor& weight, int64_t dim) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == dim && weight.is_contiguous(),
              "tables must be contiguous and of the same dimension, ", dim, ", not ", weight.sizes());
}

constexpr int64_t kCacheLine = 64;
constexpr int64_t kAhead = 32;  // rows to prefetch; more gains nothing, and rows must stay cached until they are used

// Prefetches a row ahead of its use. A row of a large table is a cache miss, about 100 ns, and the processor cannot
// guess which row is next. The row goes to L2, and for reading, even where it will be written: a prefetch to L1, or for
// writing, holds one of the few fill buffers of L1, and a core whose fill buffers are full gets half as much from
// memory.
template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
  const char* begin = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < dim * int64_t(sizeof(T)); byte += kCacheLine) __builtin_prefetch(begin + byte, 0, 2);
}

// Sums the first `vectors` vectors of rows[index[i]], i < count, rows being `stride` numbers apart, in the order of i.
template <int vectors, class T>
inline void sum_columns(const T* rows, int64_t stride, const int32_t* index, int64_t count, float* sum) {
  Floats total[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) total[v] = Floats{};
  for (int64_t i = 0; i < count; ++i) {
    const T* from = rows + index[i] * stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[v] += load(from + v * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) store(sum + v * kLanes, total[v]);
}

// Writes the sum of rows[index[i]], i < count, to sum[0..dim). Rows are `stride` numbers apart and are added in the
// order of i, in registers, as many columns at a time as fit.
template <class T>
inline void sum_rows(const T* rows, int64_t stride, const int32_t* index, int64_t count, int64_t dim, float* sum) {
  if (dim < kLanes) {
    std::fill_n(sum, dim, 0.0f);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t column = 0; column < dim; ++column) sum[column] += widened(rows[index[i] * stride + column]);
    return;
  }
  int64_t column = 0;
  for (; column + 8 * kLanes <= dim; column += 8 * kLanes)
    sum_columns<8>(rows + column, stride, index, count, sum + column);
  for (; column + 4 * kLanes <= dim; column += 4 * kLanes)
    sum_columns<4>(rows + column, stride, index, count, sum + column);
  for (; column + 2 * kLanes <= dim; column += 2 * kLanes)
    sum_columns<2>(rows + column, stride, index, count, sum + column);
  for (; column + kLanes <= dim; column += kLanes) sum_columns<1>(rows + column, stride, index, count, sum + column);
  // The last vector may overlap the one before it: the sums of the columns in both are the same.
  if (column < dim) sum_columns<1>(rows + dim - kLanes, stride, index, count, sum + dim - kLanes);
}

}  // namespace dlrm
