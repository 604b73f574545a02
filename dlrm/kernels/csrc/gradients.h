// A pass over a matrix of gradients that also gives what the layer before it needs: its columns' sums, the gradient of
// a bias, and, in bfloat16, the matrix transposed.
//
// The gradient of the weights is grad^T x. oneDNN takes twice as long over a bfloat16 product whose first factor is
// transposed as over one whose factors are not, so grad is also written transposed.
//
// Each thread sums whole columns over the samples in their order, so results do not depend on the number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace dlrm {

constexpr int64_t kSide = 32;  // side of square blocks: 32 bfloat16 numbers fill a cache line in rows and in columns
constexpr int64_t kTile = 8;   // side of the tiles that are transposed in registers, of which they take 8 of 128 bits
constexpr int64_t kBlockGrain = 4;  // blocks side by side for which another thread is worth waking

using Block = Bfloat16Bits[kSide][kSide];
using TileRow = Vector<Bfloat16Bits, kTile>;

// Returns how many of the `wanted` numbers from `first` on lie before `end`.
inline int64_t numbers_left(int64_t wanted, int64_t first, int64_t end) {
  return std::clamp<int64_t>(end - first, 0, wanted);
}

// Writes the gradients of a block to `rows`, those of bfloat16 also to `block`, and adds them to the sums of their
// columns. The block begins at row `row` and column `column` of a matrix whose rows are `width` numbers apart. It is
// `height` by `columns`, or kSide square if Whole. `gradient` is that of `write_gradients`.
template <bool Whole, class T, class Gradient>
inline void fill_block(const Gradient& gradient, int64_t row, int64_t column, int64_t width, int64_t height,
                       int64_t columns, T* rows, Block& block, float* sums) {
  constexpr int kVectors = kSide / kLanes;
  Floats totals[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) totals[v] = load(sums + v * kLanes);
  for (int64_t r = 0; r < (Whole ? kSide : height); ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = column + v * kLanes, at = (row + r) * width + first;
      const int64_t count = Whole ? kLanes : numbers_left(kLanes, v * kLanes, columns);
      const auto values = gradient(at, first, count);
      store(rows + at, values, count);
      if constexpr (std::is_same_v<T, Bfloat16Bits>) store(block[r] + v * kLanes, values);
      totals[v] += widened(values);
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, totals[v]);
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

// Writes the transposed block to a matrix whose rows are `batch` numbers apart: `columns` rows of `height` numbers, or
// kSide rows of kSide numbers if Whole.
template <bool Whole>
inline void write_transposed(const Block& block, int64_t height, int64_t columns, Bfloat16Bits* transposed,
                             int64_t batch) {
  for (int64_t c = 0; c < (Whole ? kSide : columns); c += kTile)
    for (int64_t r = 0; r < (Whole ? kSide : height); r += kTile) {
      TileRow rows[kTile];
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) std::memcpy(&rows[i], &block[r + i][c], sizeof(TileRow));
      transpose(rows);
      const int64_t count = Whole ? kTile : numbers_left(kTile, r, height);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i)
        if (Whole || c + i < columns)
          std::memcpy(transposed + (c + i) * batch + r, &rows[i], count * sizeof(Bfloat16Bits));
    }
}

// Writes gradients (batch, width) to `rows`, in bfloat16 also transposed to `transposed`, and the sums of their columns
// to `sums`. `gradient(at, column, count)` returns a vector of `count` gradients from place `at` of the matrix on,
// which is in column `column`.
template <class T, class Gradient>
void write_gradients(const Gradient& gradient, int64_t batch, int64_t width, T* rows, T* transposed, T* sums) {
  at::parallel_for(0, (width + kSide - 1) / kSide, kBlockGrain, [&](int64_t first_block, int64_t last_block) {
    const int64_t begin = first_block * kSide, end = std::min(last_block * kSide, width);
    std::vector<float> totals((last_block - first_block) * kSide);
    Block block = {};
    for (int64_t b = 0; b < batch; b += kSide)
      for (int64_t n = begin; n < end; n += kSide) {
        const int64_t height = numbers_left(kSide, b, batch), columns = numbers_left(kSide, n, end);
        auto run = [&](auto whole) {
          fill_block<whole>(gradient, b, n, width, height, columns, rows, block, &totals[n - begin]);
          if constexpr (std::is_same_v<T, Bfloat16Bits>)
            write_transposed<whole>(block, height, columns, transposed + n * batch + b, batch);
        };
        if (height == kSide && columns == kSide) run(std::true_type());
        else run(std::false_type());
      }
    for (int64_t n = begin; n < end; ++n) store(sums + n, Floats{} + totals[n - begin], 1);
  });
}

}  // namespace dlrm
