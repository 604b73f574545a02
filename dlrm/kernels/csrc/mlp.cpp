// dlrm::relu_backward: the backward of a ReLU, in one pass, with what the bfloat16 layer before it needs.
//
// The gradient of the weights is grad^T x. oneDNN takes twice as long over a product whose first factor is transposed
// as over one whose factors are not, so grad is also written transposed.
//
// Each thread sums whole columns over the samples in their order, so results do not depend on the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ops.h"
#include "tensors.h"
#include "vectors.h"

namespace dlrm {
namespace {

constexpr int64_t kSide = 32;  // of square blocks: 32 bfloat16 numbers fill a cache line, in rows and in columns
constexpr int64_t kTile =
    8;  // the side of the tiles that are transposed in registers, of which they take 8 of 128 bits
constexpr int64_t kGrain = 4;  // blocks side by side for which another thread is worth waking

using Block = Bfloat16Bits[kSide][kSide];
using TileRow = Vector<Bfloat16Bits, kTile>;
using SignedHalves = Vector<int16_t, kLanes>;

// Returns how many of the `wanted` numbers from `first` on lie before `end`.
int64_t numbers_left(int64_t wanted, int64_t first, int64_t end) { return std::clamp<int64_t>(end - first, 0, wanted); }

// Copies those gradients of a block whose output is positive to `masked` and `block`, zeros in place of the others, and
// adds them to the sums of their columns. The block is `height` by `columns`, or kSide square if Whole, and part of
// matrices whose rows are `width` numbers apart.
template <bool Whole>
void mask(const Bfloat16Bits* grad, const Bfloat16Bits* output, int64_t width, int64_t height, int64_t columns,
          Bfloat16Bits* masked, Block& block, float* sums) {
  constexpr int kVectors = kSide / kLanes;
  Floats totals[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) totals[v] = load(sums + v * kLanes);
  for (int64_t r = 0; r < (Whole ? kSide : height); ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * width + v * kLanes, count = Whole ? kLanes : numbers_left(kLanes, v * kLanes, columns);
      const SignedHalves signs = SignedHalves(load_bits(output + at, count));  // a bfloat16 has the sign of its bits
      const Halves row = load_bits(grad + at, count) & Halves(signs > 0);
      store(masked + at, row, count);
      store(block[r] + v * kLanes, row);
      totals[v] += widened(row);
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, totals[v]);
}

// Transposes a tile. Interleaving the first four rows with the last four moves one bit of each number's column into its
// row, and one bit of its row into its column; after three times, all bits have changed places.
void transpose(TileRow (&rows)[kTile]) {
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
void write_transposed(const Block& block, int64_t height, int64_t columns, Bfloat16Bits* transposed, int64_t batch) {
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

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> relu_backward(const at::Tensor& grad, const at::Tensor& output) {
  TORCH_CHECK(grad.dim() == 2 && grad.sizes() == output.sizes() && grad.scalar_type() == at::kBFloat16 &&
                  output.scalar_type() == at::kBFloat16,
              "relu_backward: two bfloat16 tensors of one shape, (B, n), not ", grad.scalar_type(), " ", grad.sizes(),
              " and ", output.scalar_type(), " ", output.sizes());
  const at::Tensor grad_rows = grad.contiguous(), output_rows = output.contiguous();
  const int64_t batch = output.size(0), width = output.size(1);
  const at::Tensor masked = output.new_empty({batch, width}), transposed = output.new_empty({width, batch}),
                   bias = output.new_empty({width});
  const Bfloat16Bits *grad_data = bfloat16_data(grad_rows), *output_data = bfloat16_data(output_rows);
  Bfloat16Bits *masked_data = bfloat16_data(masked), *transposed_data = bfloat16_data(transposed);
  Bfloat16Bits* bias_data = bfloat16_data(bias);

  at::parallel_for(0, (width + kSide - 1) / kSide, kGrain, [&](int64_t first_block, int64_t last_block) {
    const int64_t begin = first_block * kSide, end = std::min(last_block * kSide, width);
    std::vector<float> sums((last_block - first_block) * kSide);
    Block block = {};
    for (int64_t b = 0; b < batch; b += kSide)
      for (int64_t n = begin; n < end; n += kSide) {
        const int64_t height = numbers_left(kSide, b, batch), columns = numbers_left(kSide, n, end);
        const int64_t at = b * width + n;
        auto run = [&](auto whole) {
          mask<whole>(grad_data + at, output_data + at, width, height, columns, masked_data + at, block,
                      &sums[n - begin]);
          write_transposed<whole>(block, height, columns, transposed_data + n * batch + b, batch);
        };
        if (height == kSide && columns == kSide) run(std::true_type());
        else run(std::false_type());
      }
    for (int64_t n = begin; n < end; ++n) bias_data[n] = rounded(sums[n - begin]);
  });
  return {masked, transposed, bias};
}

}  // namespace dlrm
