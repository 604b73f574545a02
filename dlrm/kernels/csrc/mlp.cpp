// The backward of a ReLU, in one pass, with what the bfloat16 layer before it needs.
//
// The weights' gradient is grad^T x. oneDNN takes twice as long over a product whose first factor is transposed as over
// one where it is not, so grad is also written transposed, while it is in registers anyway.
//
// A thread sums whole columns, over the samples in their order: results do not depend on the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops.h"

namespace dlrm {
namespace {

using at::BFloat16;
using at::Tensor;

constexpr int kSide = 32;  // of the square blocks that are transposed in registers
typedef uint16_t Row __attribute__((vector_size(kSide * sizeof(uint16_t)), aligned(2)));

typedef int16_t SignedRow __attribute__((vector_size(kSide * sizeof(int16_t)), aligned(2)));
typedef uint32_t WideRow __attribute__((vector_size(kSide * sizeof(uint32_t)), aligned(4)));
typedef float Sums __attribute__((vector_size(kSide * sizeof(float)), aligned(4)));

// `count` is nearly always kSide; a constant makes the copy one instruction.
void copy(void* to, const void* from, int64_t count) {
  if (count == kSide) {
    std::memcpy(to, from, kSide * sizeof(uint16_t));
  } else {
    std::memcpy(to, from, count * sizeof(uint16_t));
  }
}

// Swaps the off-diagonal quarters of all squares of 2 * step, then those of half the size (Eklundh 1972).
template <int step>
void transpose(Row (&rows)[kSide]) {
  Row upper, lower;
  for (int k = 0; k < kSide; ++k) {
    upper[k] = k & step ? kSide + k - step : k;
    lower[k] = k & step ? kSide + k : k + step;
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSide; ++i) {
    if (i & step) continue;
    const Row above = rows[i], below = rows[i + step];
    rows[i] = __builtin_shuffle(above, below, upper);
    rows[i + step] = __builtin_shuffle(above, below, lower);
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> relu_backward(const Tensor& grad, const Tensor& output) {
  TORCH_CHECK(grad.dim() == 2 && grad.sizes() == output.sizes() && grad.scalar_type() == at::kBFloat16 &&
                  output.scalar_type() == at::kBFloat16,
              "relu_backward: two bfloat16 tensors of one shape, (B, n), not ", grad.scalar_type(), " ", grad.sizes(),
              " and ", output.scalar_type(), " ", output.sizes());
  const Tensor grad_rows = grad.contiguous(), output_rows = output.contiguous();
  const int64_t batch = output.size(0), width = output.size(1);
  Tensor masked = output.new_empty({batch, width}), transposed = output.new_empty({width, batch}),
         bias = output.new_empty({width});
  const auto *grad_data = grad_rows.const_data_ptr<BFloat16>(), *output_data = output_rows.const_data_ptr<BFloat16>();
  auto *masked_data = masked.data_ptr<BFloat16>(), *transposed_data = transposed.data_ptr<BFloat16>();
  auto* bias_data = bias.data_ptr<BFloat16>();

  at::parallel_for(0, (width + kSide - 1) / kSide, 4, [&](int64_t begin, int64_t end) {
    begin *= kSide;
    end = std::min(end * kSide, width);
    std::vector<float> sums(end - begin + kSide);  // the last block may be wider than what is left
    for (int64_t b = 0; b < batch; b += kSide)
      for (int64_t n = begin; n < end; n += kSide) {
        const int64_t height = std::min<int64_t>(kSide, batch - b), columns = std::min<int64_t>(kSide, end - n);
        Row block[kSide] = {};
        for (int64_t r = 0; r < height; ++r) {
          const int64_t at = (b + r) * width + n;
          Row result = {}, row = {};
          copy(&result, output_data + at, columns);
          copy(&row, grad_data + at, columns);
          row &= reinterpret_cast<Row>(reinterpret_cast<SignedRow>(result) > 0);  // a bfloat16 has the sign of its bits
          copy(masked_data + at, &row, columns);
          block[r] = row;
          *reinterpret_cast<Sums*>(&sums[n - begin]) += reinterpret_cast<Sums>(__builtin_convertvector(row, WideRow) << 16);
        }
        transpose<kSide / 2>(block);
        for (int64_t c = 0; c < columns; ++c)
          copy(transposed_data + (n + c) * batch + b, &block[c], height);
      }
    std::copy_n(sums.data(), end - begin, bias_data + begin);
  });
  return {masked, transposed, bias};
}

}  // namespace dlrm
