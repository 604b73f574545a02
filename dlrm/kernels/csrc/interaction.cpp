// dlrm::dot_interaction and its backward: the dense feature, then the dot product of each pair of features, straight
// into the output.
//
// A sample's features fit in the L1 cache. So each thread copies a sample into a float32 scratch, padded with zeros to
// whole tiles, and no (B, F, F) tensor of products is ever written. Sums run in an order that depends on D and on the
// width of the processor's registers alone, so results do not depend on the number of threads.
//
// B samples, F features (the dense one and T tables), D their dimension.

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "ops.h"
#include "tensors.h"
#include "vectors.h"

namespace dlrm {
namespace {

// Products are computed in tiles of features by features. The products of a tile are one vector, and the sums that they
// come from are as many vectors as it has lanes: half of the registers.
constexpr int kRows = 4;
constexpr int kColumns = kLanes / kRows;
static_assert(kRows % kColumns == 0, "whole tiles must cover the diagonal");

// Vectors along D for which the gradients of kRows features are summed at once.
constexpr int kUnroll = 2;

constexpr int64_t kGrain = 16;  // samples for which another thread is worth waking

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Returns a vector whose lane k is the sum of lanes k and k ^ n: of `left`, or of `right` where k & n is not 0.
template <int n, int... k>
Floats add_lanes(Floats left, Floats right, std::integer_sequence<int, k...>) {
  constexpr int other = kLanes;
  return shuffled<(k & n ? k + other : k)...>(left, right) + shuffled<(k & n ? k - n + other : k + n)...>(left, right);
}

// Returns a vector whose lane k is the sum of those lanes j of vectors[k % n] for which j / n == k / n. If n is kLanes,
// that is the sum of all lanes of vectors[k].
template <int n>
Floats sum_lanes(const Floats* vectors) {
  if constexpr (n == 1) {
    return vectors[0];
  } else {
    return add_lanes<n / 2>(sum_lanes<n / 2>(vectors), sum_lanes<n / 2>(vectors + n / 2),
                            std::make_integer_sequence<int, kLanes>());
  }
}

// The features of one sample, (F, D) float32, padded with zeros to whole tiles.
struct Scratch {
  int64_t num_features, dim, rows, width;
  std::vector<float> features, symmetric;

  Scratch(int64_t num_features, int64_t dim)
      : num_features(num_features),
        dim(dim),
        rows(round_up(num_features, kRows)),
        width(round_up(dim, kUnroll * kLanes)),
        features(rows * width),
        symmetric(rows * rows) {}

  template <class Dense, class Pooled>
  void fill(const Dense* dense, const Pooled* pooled) {
    fill_row(dense, 0);
    for (int64_t i = 1; i < num_features; ++i) fill_row(pooled + (i - 1) * dim, i);
  }

  template <class T>
  void fill_row(const T* from, int64_t i) {
    float* row = &features[i * width];
    for (int64_t d = 0; d < dim; ++d) row[d] = widened(from[d]);
  }

  // Returns the products of a tile of features with another tile, row by row.
  [[gnu::noinline]] Floats products(int64_t i, int64_t j) const {
    Floats sums[kLanes];
#pragma GCC unroll 16
    for (Floats& sum : sums) sum = Floats{};
    const float *left = &features[i * width], *right = &features[j * width];
    for (int64_t d = 0; d < width; d += kLanes)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c)
          sums[r * kColumns + c] += load(left + r * width + d) * load(right + c * width + d);
    return sum_lanes<kLanes>(sums);
  }

  // sums[r] = the sum over j of symmetric[j, i + r] * features[j, d : d + kUnroll * kLanes].
  [[gnu::noinline]] void gradients(int64_t i, int64_t d, float (&sums)[kRows][kUnroll * kLanes]) const {
    Floats totals[kRows * kUnroll];
#pragma GCC unroll 8
    for (Floats& total : totals) total = Floats{};
    for (int64_t j = 0; j < num_features; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kUnroll; ++v)
          totals[r * kUnroll + v] += symmetric[j * rows + i + r] * load(&features[j * width + d + v * kLanes]);
#pragma GCC unroll 8
    for (int t = 0; t < kRows * kUnroll; ++t) store(sums[0] + t * kLanes, totals[t]);
  }
};

// Returns where row i of the triangle starts.
int64_t row_start(int64_t i, bool itself) { return itself ? i * (i + 1) / 2 : i * (i - 1) / 2; }

template <class Dense, class Pooled>
void forward(const Dense* dense, const Pooled* pooled, int64_t batch, int64_t num_features, int64_t dim, bool itself,
             Dense* output) {
  const int64_t width = dim + row_start(num_features, itself);
  at::parallel_for(0, batch, kGrain, [&](int64_t begin, int64_t end) {
    Scratch scratch(num_features, dim);
    for (int64_t b = begin; b < end; ++b) {
      const Dense* own = dense + b * dim;
      scratch.fill(own, pooled + b * (num_features - 1) * dim);
      Dense* triangle = std::copy_n(own, dim, output + b * width);
      for (int64_t i = 0; i < num_features; i += kRows)
        for (int64_t j = 0; j < i + kRows; j += kColumns) {
          const auto products = converted<Dense>(scratch.products(i, j));
          for (int64_t r = 0; r < std::min<int64_t>(kRows, num_features - i); ++r)
            for (int64_t c = 0; c < std::min<int64_t>(kColumns, i + r + itself - j); ++c)
              triangle[row_start(i + r, itself) + j + c] = products[r * kColumns + c];
        }
    }
  });
}

template <class Dense, class Pooled>
void backward(const Dense* grad, const Dense* dense, const Pooled* pooled, int64_t batch, int64_t num_features,
              int64_t dim, bool itself, Dense* grad_dense, Pooled* grad_pooled) {
  const int64_t width = dim + row_start(num_features, itself);
  at::parallel_for(0, batch, kGrain, [&](int64_t begin, int64_t end) {
    Scratch scratch(num_features, dim);
    for (int64_t b = begin; b < end; ++b) {
      scratch.fill(dense + b * dim, pooled + b * (num_features - 1) * dim);
      const Dense *own = grad + b * width, *triangle = own + dim;
      for (int64_t i = 0; i < num_features; ++i)
        for (int64_t j = 0; j < i + itself; ++j) {
          const float g = widened(*triangle++);
          scratch.symmetric[i * scratch.rows + j] = scratch.symmetric[j * scratch.rows + i] = i == j ? 2 * g : g;
        }
      Pooled* tables = grad_pooled + b * (num_features - 1) * dim;
      for (int64_t i = 0; i < num_features; i += kRows)
        for (int64_t d = 0; d < dim; d += kUnroll * kLanes) {
          float sums[kRows][kUnroll * kLanes];
          scratch.gradients(i, d, sums);
          for (int64_t r = 0; r < std::min<int64_t>(kRows, num_features - i); ++r)
            for (int64_t k = 0; k < std::min(kUnroll * kLanes, dim - d); k += kLanes) {
              const int64_t column = d + k, count = std::min(kLanes, dim - column);
              const Floats sum = load(&sums[r][k]);
              if (i + r > 0) store(tables + (i + r - 1) * dim + column, sum, count);
              else store(grad_dense + b * dim + column, sum + load(own + column, count), count);
            }
        }
    }
  });
}

void check(const at::Tensor& dense, const at::Tensor& pooled) {
  TORCH_CHECK(
      dense.dim() == 2 && pooled.dim() == 3 && pooled.size(0) == dense.size(0) && pooled.size(2) == dense.size(1),
      "dot_interaction: (B, D) and (B, T, D), not ", dense.sizes(), " and ", pooled.sizes());
  for (const auto type : {dense.scalar_type(), pooled.scalar_type()})
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "dot_interaction: float32 or bfloat16, not ", type);
}

}  // namespace

at::Tensor dot_interaction(const at::Tensor& dense, const at::Tensor& pooled, bool itself) {
  check(dense, pooled);
  const int64_t batch = dense.size(0), num_features = pooled.size(1) + 1, dim = dense.size(1);
  const at::Tensor output = dense.new_empty({batch, dim + row_start(num_features, itself)});
  with_type(dense.contiguous(), [&](auto* dense_data) {
    with_type(pooled.contiguous(), [&](auto* pooled_data) {
      forward(dense_data, pooled_data, batch, num_features, dim, itself, data_like(dense_data, output));
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> dot_interaction_backward(const at::Tensor& grad, const at::Tensor& dense,
                                                            const at::Tensor& pooled, bool itself) {
  check(dense, pooled);
  const int64_t batch = dense.size(0), num_features = pooled.size(1) + 1, dim = dense.size(1);
  TORCH_CHECK(grad.scalar_type() == dense.scalar_type() && grad.size(0) == batch &&
                  grad.size(1) == dim + row_start(num_features, itself),
              "dot_interaction_backward: the gradient must look like the output, not ", grad.sizes(), " ",
              grad.scalar_type());
  const at::Tensor grad_rows = grad.contiguous();
  const at::Tensor grad_dense = dense.new_empty(dense.sizes()), grad_pooled = pooled.new_empty(pooled.sizes());
  with_type(dense.contiguous(), [&](auto* dense_data) {
    with_type(pooled.contiguous(), [&](auto* pooled_data) {
      backward(data_like(dense_data, grad_rows), dense_data, pooled_data, batch, num_features, dim, itself,
               data_like(dense_data, grad_dense), data_like(pooled_data, grad_pooled));
    });
  });
  return {grad_dense, grad_pooled};
}

}  // namespace dlrm
