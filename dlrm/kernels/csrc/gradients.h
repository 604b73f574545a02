// A pass over a matrix of gradients that also gives what the layer before it needs: its columns' sums, the gradient of
// a bias, and, in bfloat16, the matrix transposed.
//
// The gradient of the weights is grad^T x. oneDNN takes twice as long over a bfloat16 product whose first factor is
// transposed as over one whose factors are not, so grad is also written transposed.
//
// A thread computes a band of rows along its columns, so that the processor sees which numbers to read ahead, and
// transposes the band block by block while it is in the cache. Each thread sums whole columns over the samples in their
// order, so results do not depend on the number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace dlrm {

// Rows of a band, and side of square blocks: 32 bfloat16 numbers fill a cache line, in rows and in columns.
constexpr int64_t kSide = 32;
constexpr int64_t kTile = 8;  // side of the tiles that are transposed in registers, of which they take 8 of 128 bits
constexpr int64_t kBlockGrain = 4;  // blocks side by side for which another thread is worth waking

using TileRow = Vector<Bfloat16Bits, kTile>;

// Writes gradients to `rows`, for `height` rows from row `row` on and for the columns from `begin` to `end`, and adds
// them to the sums of these columns. Rows are `width` numbers apart. `gradient` is that of `write_gradients`.
template <class T, class Gradient>
inline void write_rows(const Gradient& gradient, int64_t row, int64_t height, int64_t begin, int64_t end, int64_t width,
                       T* rows, float* sums) {
  for (int64_t r = row; r < row + height; ++r) {
    auto write = [&](int64_t column, int64_t count) {
      const auto values = gradient(r * width + column, column, count);
      store(rows + r * width + column, values, count);
      float* sum = sums + column - begin;
      store(sum, load(sum, count) + widened(values), count);
    };
    int64_t column = begin;
    for (; column + kLanes <= end; column += kLanes) write(column, kLanes);
    if (column < end) write(column, end - column);
  }
}

// Transposes a tile. Interleaving the first four rows with the last four moves one bit of each number's column into its
// row, and one bit of its row into its column; after three times, all bits have changed places.
inline void transpose(TileRow (&rows)[kTile]) {
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    TileRow next[kTile];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = shuffled<0, 8, 1, 9, 2, 10, 3, 11>(rows[i], rows[i + 4]);
      next[2 * i + 1] = shuffled<4, 12, 5, 13, 6, 14, 7, 15>(rows[i], rows[i + 4]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) rows[i] = next[i];
  }
}

// Writes the transpose of a block, of `height` rows that are `width` numbers apart, to a matrix whose rows are `batch`
// numbers apart. The block has kSide rows and columns if Whole.
template <bool Whole>
inline void write_transposed(const Bfloat16Bits* block, int64_t width, int64_t height, int64_t columns,
                             Bfloat16Bits* transposed, int64_t batch) {
  for (int64_t c = 0; c < (Whole ? kSide : columns); c += kTile)
    for (int64_t r = 0; r < (Whole ? kSide : height); r += kTile) {
      const int64_t rows_left = Whole ? kTile : std::min(kTile, height - r);
      const int64_t columns_left = Whole ? kTile : std::min(kTile, columns - c);
      TileRow rows[kTile] = {};
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i)
        if (i < rows_left) std::memcpy(&rows[i], block + (r + i) * width + c, columns_left * sizeof(Bfloat16Bits));
      transpose(rows);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i)
        if (i < columns_left) std::memcpy(transposed + (c + i) * batch + r, &rows[i], rows_left * sizeof(Bfloat16Bits));
    }
}

// Writes gradients (batch, width) to `rows`, in bfloat16 also transposed to `transposed`, and the sums of their columns
// to `sums`. `gradient(at, column, count)` returns a vector of `count` gradients from place `at` of the matrix on,
// which is in column `column`.
template <class T, class Gradient>
void write_gradients(const Gradient& gradient, int64_t batch, int64_t width, T* rows, T* transposed, T* sums) {
  at::parallel_for(0, (width + kSide - 1) / kSide, kBlockGrain, [&](int64_t first_block, int64_t last_block) {
    const int64_t begin = first_block * kSide, end = std::min(last_block * kSide, width);
    std::vector<float> totals(end - begin);
    for (int64_t b = 0; b < batch; b += kSide) {
      const int64_t height = std::min(kSide, batch - b);
      write_rows(gradient, b, height, begin, end, width, rows, totals.data());
      if constexpr (std::is_same_v<T, Bfloat16Bits>)
        for (int64_t n = begin; n < end; n += kSide) {
          const T* block = rows + b * width + n;
          T* to = transposed + n * batch + b;
          const int64_t columns = std::min(kSide, end - n);
          if (height == kSide && columns == kSide) write_transposed<true>(block, width, height, columns, to, batch);
          else write_transposed<false>(block, width, height, columns, to, batch);
        }
    }
    for (int64_t n = begin; n < end; ++n) store(sums + n, Floats{} + totals[n - begin], 1);
  });
}

}  // namespace dlrm
