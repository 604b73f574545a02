// The dot interaction: the dense feature, then the dot product of each pair of features, straight into the output.
//
// A sample's features fit in the L1 cache. So each thread copies a sample into a float32 scratch, padded with zeros to
// whole tiles, and no (B, F, F) tensor of products is ever written. Sums run in an order that depends on D alone, so
// results do not depend on the number of threads.
//
// B samples, F features (the dense one and T tables), D their dimension.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "ops.h"

namespace dlrm {
namespace {

using at::Tensor;

constexpr int kLanes = 16;
constexpr int kRows = 4;  // of a tile; kRows^2 == kLanes, so that the products of a tile are one vector
constexpr int kUnroll = 2;  // vectors along D
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int Lanes __attribute__((vector_size(kLanes * sizeof(int))));
static_assert(kRows * kRows == kLanes);

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// Lane k is the sum of the lanes of vectors[k * n / kLanes], each vector's sum being spread over kLanes / n lanes.
template <int n>
Vector sum_lanes(const Vector* vectors) {
  if constexpr (n == 1) {
    return vectors[0];
  } else {
    constexpr Lanes even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const Vector left = sum_lanes<n / 2>(vectors), right = sum_lanes<n / 2>(vectors + n / 2);
    return __builtin_shuffle(left, right, even) + __builtin_shuffle(left, right, even + 1);
  }
}

// One sample: features[F, D] as float32, zeros up to whole tiles.
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

  template <typename Dense, typename Pooled>
  void fill(const Dense* dense, const Pooled* pooled) {
    std::copy_n(dense, dim, features.data());
    for (int64_t i = 1; i < num_features; ++i) std::copy_n(pooled + (i - 1) * dim, dim, &features[i * width]);
  }

  // Products of features i .. i + 3 with features j .. j + 3, a row of products after the other.
  Vector products(int64_t i, int64_t j) const {
    Vector sums[kLanes] = {};
    const float *left = &features[i * width], *right = &features[j * width];
    for (int64_t d = 0; d < width; d += kLanes)
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kRows; ++c)
          sums[r * kRows + c] += load(left + r * width + d) * load(right + c * width + d);
    return sum_lanes<kLanes>(sums);
  }

  // sums[r] = the sum over j of symmetric[i + r, j] * features[j, d : d + kUnroll * kLanes].
  void gradients(int64_t i, int64_t d, Vector (&sums)[kRows][kUnroll]) const {
    for (int64_t j = 0; j < num_features; ++j)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kUnroll; ++v)
          sums[r][v] += symmetric[j * rows + i + r] * load(&features[j * width + d + v * kLanes]);
  }
};

// Where row i of the triangle starts.
int64_t row_start(int64_t i, bool itself) { return itself ? i * (i + 1) / 2 : i * (i - 1) / 2; }

template <typename Dense, typename Pooled>
void forward(const Tensor& dense, const Tensor& pooled, bool itself, Tensor& output) {
  const int64_t num_features = pooled.size(1) + 1, dim = dense.size(1), width = output.size(1);
  const auto* dense_data = dense.const_data_ptr<Dense>();
  const auto* pooled_data = pooled.const_data_ptr<Pooled>();
  auto* output_data = output.data_ptr<Dense>();
  at::parallel_for(0, dense.size(0), 16, [&](int64_t begin, int64_t end) {
    Scratch scratch(num_features, dim);
    for (int64_t b = begin; b < end; ++b) {
      const Dense* own = dense_data + b * dim;
      scratch.fill(own, pooled_data + b * (num_features - 1) * dim);
      Dense* triangle = std::copy_n(own, dim, output_data + b * width);
      for (int64_t i = 0; i < num_features; i += kRows)
        for (int64_t j = 0; j <= i; j += kRows) {
          const Vector products = scratch.products(i, j);
          for (int64_t r = 0; r < std::min<int64_t>(kRows, num_features - i); ++r)
            for (int64_t c = 0; c < std::min<int64_t>(kRows, i + r + itself - j); ++c)
              triangle[row_start(i + r, itself) + j + c] = static_cast<Dense>(products[r * kRows + c]);
        }
    }
  });
}

template <typename Dense, typename Pooled>
void backward(const Tensor& grad, const Tensor& dense, const Tensor& pooled, bool itself, Tensor& grad_dense,
              Tensor& grad_pooled) {
  const int64_t num_features = pooled.size(1) + 1, dim = dense.size(1), width = grad.size(1);
  const auto* grad_data = grad.const_data_ptr<Dense>();
  const auto* dense_data = dense.const_data_ptr<Dense>();
  const auto* pooled_data = pooled.const_data_ptr<Pooled>();
  auto* grad_dense_data = grad_dense.data_ptr<Dense>();
  auto* grad_pooled_data = grad_pooled.data_ptr<Pooled>();
  at::parallel_for(0, dense.size(0), 16, [&](int64_t begin, int64_t end) {
    Scratch scratch(num_features, dim);
    for (int64_t b = begin; b < end; ++b) {
      scratch.fill(dense_data + b * dim, pooled_data + b * (num_features - 1) * dim);
      const Dense *own = grad_data + b * width, *triangle = own + dim;
      for (int64_t i = 0; i < num_features; ++i)
        for (int64_t j = 0; j < i + itself; ++j) {
          const float g = *triangle++;
          scratch.symmetric[i * scratch.rows + j] = scratch.symmetric[j * scratch.rows + i] = i == j ? 2 * g : g;
        }
      Pooled* tables = grad_pooled_data + b * (num_features - 1) * dim;
      for (int64_t i = 0; i < num_features; i += kRows)
        for (int64_t d = 0; d < dim; d += kUnroll * kLanes) {
          Vector sums[kRows][kUnroll] = {};
          scratch.gradients(i, d, sums);
          const int64_t count = std::min<int64_t>(kUnroll * kLanes, dim - d);
          for (int64_t r = 0; r < std::min<int64_t>(kRows, num_features - i); ++r) {
            const float* sum = reinterpret_cast<const float*>(sums[r]);
            if (i + r > 0) {
              std::copy_n(sum, count, tables + (i + r - 1) * dim + d);
            } else {
              for (int64_t k = 0; k < count; ++k)
                grad_dense_data[b * dim + d + k] = static_cast<Dense>(sum[k] + static_cast<float>(own[d + k]));
            }
          }
        }
    }
  });
}

// Calls function(Dense{}, Pooled{}), values of the two element types.
template <typename Function>
void dispatch(const Tensor& dense, const Tensor& pooled, Function function) {
  const auto with_pooled = [&](auto own) {
    pooled.scalar_type() == at::kFloat ? function(own, float{}) : function(own, at::BFloat16{});
  };
  dense.scalar_type() == at::kFloat ? with_pooled(float{}) : with_pooled(at::BFloat16{});
}

void check(const Tensor& dense, const Tensor& pooled) {
  TORCH_CHECK(dense.dim() == 2 && pooled.dim() == 3 && pooled.size(0) == dense.size(0) &&
                  pooled.size(2) == dense.size(1),
              "dot_interaction: (B, D) and (B, T, D), not ", dense.sizes(), " and ", pooled.sizes());
  for (const auto type : {dense.scalar_type(), pooled.scalar_type()})
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "dot_interaction: float32 or bfloat16, not ", type);
}

}  // namespace

Tensor dot_interaction(const Tensor& dense, const Tensor& pooled, bool itself) {
  check(dense, pooled);
  Tensor output = dense.new_empty({dense.size(0), dense.size(1) + row_start(pooled.size(1) + 1, itself)});
  dispatch(dense, pooled, [&](auto d, auto p) {
    forward<decltype(d), decltype(p)>(dense.contiguous(), pooled.contiguous(), itself, output);
  });
  return output;
}

std::tuple<Tensor, Tensor> dot_interaction_backward(const Tensor& grad, const Tensor& dense, const Tensor& pooled,
                                                    bool itself) {
  check(dense, pooled);
  TORCH_CHECK(grad.scalar_type() == dense.scalar_type() && grad.size(0) == dense.size(0) &&
                  grad.size(1) == dense.size(1) + row_start(pooled.size(1) + 1, itself),
              "dot_interaction_backward: the gradient must look like the output, not ", grad.sizes(), " ",
              grad.scalar_type());
  Tensor grad_dense = dense.new_empty(dense.sizes()), grad_pooled = pooled.new_empty(pooled.sizes());
  dispatch(dense, pooled, [&](auto d, auto p) {
    backward<decltype(d), decltype(p)>(grad.contiguous(), dense.contiguous(), pooled.contiguous(), itself, grad_dense,
                                       grad_pooled);
  });
  return {grad_dense, grad_pooled};
}

}  // namespace dlrm
