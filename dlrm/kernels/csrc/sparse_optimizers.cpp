// dlrm::sparse_sgd_, sparse_adagrad_, sparse_rowwise_adagrad_: the backward pass of the embedding bag and the update.
//
// The gradient of each row that was looked up is the sum of its bags' gradients. Row and moment are updated while that
// sum is in the L1 cache, so the cost is that of reading and writing rows and moments.

#include <cmath>
#include <optional>
#include <type_traits>

#include "groups.h"
#include "ops.h"
#include "rows.h"
#include "tensors.h"

namespace dlrm {
namespace {

constexpr int64_t kLookupsPerRow =
    4;  // reading and writing row and moment costs about as much as reading four gradients

// ---------------------------------------------------------------------------------------------------------------------
// Rounding to bfloat16
// ---------------------------------------------------------------------------------------------------------------------

inline uint32_t mix(uint32_t x) {  // the finalizer of MurmurHash3
  x = (x ^ x >> 16) * 0x85ebca6b;
  x = (x ^ x >> 13) * 0xc2b2ae35;
  return x ^ x >> 16;
}

// Rounds up or down at random, so that the expected result is the value itself: steps that are too small for the 8 bits
// of bfloat16 then add up instead of vanishing. The random bits are a hash of (seed + row, column) and of nothing else.
struct Stochastic {
  int64_t seed;

  auto row(int64_t row) const {
    return [key = mix(uint32_t(seed) + uint32_t(row))](float value, int32_t column) {
      return upper_half(value, mix(key + uint32_t(column)) & 0xffff);
    };
  }
};

struct ToNearest {
  auto row(int64_t) const {
    return [](float value, int32_t) { return rounded(value); };
  }
};

// Stores rows of float32 tables, which need no rounding.
struct Unrounded {
  auto row(int64_t) const {
    return [](float value, int32_t) { return value; };
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The update rules: `row(r, ...)` returns a function from the gradient of a column of row r to the step to subtract
// ---------------------------------------------------------------------------------------------------------------------

struct Sgd {
  float lr;

  void prefetch(int64_t, int64_t) const {}

  auto row(int64_t, const float*, int64_t) const {
    return [lr = lr](float g, int32_t) { return lr * g; };
  }
};

struct Adagrad {
  float* moments;  // (rows, D)
  float lr, eps;

  void prefetch(int64_t row, int64_t dim) const { prefetch_row(moments + row * dim, dim); }

  auto row(int64_t row, const float*, int64_t dim) const {
    return [moment = moments + row * dim, lr = lr, eps = eps](float g, int32_t column) {
      const float m = moment[column] + g * g;
      moment[column] = m;
      return lr * g / (std::sqrt(m) + eps);
    };
  }
};

struct RowwiseAdagrad {
  float* moments;  // (rows,)
  float lr, eps;

  void prefetch(int64_t row, int64_t) const { prefetch_row(moments + row, 1); }

  auto row(int64_t row, const float* gradient, int64_t dim) const {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < dim; ++j) squares += gradient[j] * gradient[j];
    moments[row] += squares / float(dim);
    return [scale = lr / (std::sqrt(moments[row]) + eps)](float g, int32_t) { return scale * g; };
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The pass over the rows
// ---------------------------------------------------------------------------------------------------------------------

struct GroupedLookups {  // one table's, as in `PreparedLookups`
  const int32_t *unique_indices, *output_rows, *output_row_offsets;
};

// Updates the rows of groups [first, last). `gradients` are those of the table's bags, `stride` numbers apart.
template <class Weight, class Gradient, class Rule, class Rounding>
void update_rows(Weight* weight, const Rule& rule, const Rounding& rounding, const Gradient* gradients, int64_t stride,
                 const GroupedLookups& lookups, int64_t first, int64_t last, int64_t dim) {
  std::vector<float> sum(dim);  // stays in the L1 cache
  const int32_t *rows = lookups.unique_indices, *bags = lookups.output_rows, *offsets = lookups.output_row_offsets;
  const int64_t last_lookup = offsets[last];
  int64_t row_ahead = first, lookup_ahead = offsets[first];
  for (int64_t group = first; group < last; ++group) {
    const int64_t row = rows[group], begin = offsets[group], count = offsets[group + 1] - begin;
    for (; row_ahead < std::min(group + kAhead, last); ++row_ahead) {
      prefetch_row(weight + rows[row_ahead] * dim, dim);
      rule.prefetch(rows[row_ahead], dim);
    }
    for (; lookup_ahead < std::min(begin + count + kAhead, last_lookup); ++lookup_ahead)
      prefetch_row(gradients + bags[lookup_ahead] * stride, dim);

    const float* gradient = sum.data();
    if (std::is_same_v<Gradient, float> &&
        count == 1)  // most groups of a large table have one gradient, which is its own sum
      gradient = reinterpret_cast<const float*>(gradients + bags[begin] * stride);
    else sum_rows(gradients, stride, bags + begin, count, dim, sum.data());
    const auto step = rule.row(row, gradient, dim);
    const auto round = rounding.row(row);
    Weight* to = weight + row * dim;
#pragma omp simd  // tables, moments and sums do not overlap
    for (int32_t j = 0; j < int32_t(dim); ++j) to[j] = round(widened(to[j]) - step(gradient[j], j), j);
  }
}

// Updates all tables; `rule(t)` is the rule with the moments of table t.
//
// Each row belongs to one thread, which adds up its gradients in the order of the lookups. So the result is the same,
// bit for bit, for any number of threads.
template <class MakeRule>
void update_tables(at::TensorList weights, const at::Tensor& grad_pooled, const at::Tensor& unique_indices,
                   const at::Tensor& output_rows, const at::Tensor& output_row_offsets, const at::Tensor& unique_count,
                   at::IntArrayRef max_lookups, at::OptionalIntArrayRef seeds, MakeRule rule) {
  const int64_t tables = weights.size(), dim = grad_pooled.size(2);
  TORCH_CHECK(grad_pooled.size(1) == tables, "one gradient per table");
  TORCH_CHECK(!seeds || int64_t(seeds->size()) == tables, "one seed per table");
  for (const at::Tensor& weight : weights) check_table(weight, dim);
  TORCH_CHECK(int64_t(max_lookups.size()) == tables && unique_count.numel() == tables,
              "one number of lookups per table");
  const std::vector<int64_t> first_lookup = first_lookups(max_lookups);
  const int64_t room = first_lookup[tables];
  TORCH_CHECK(
      unique_indices.numel() == room && output_rows.numel() == room && output_row_offsets.numel() == room + tables,
      "lookups of other sizes than ", room);
  for (const at::Tensor* field : {&unique_indices, &output_rows, &output_row_offsets, &unique_count})
    TORCH_CHECK(field->is_contiguous(), "lookups must be contiguous");
  const at::Tensor gradients = grad_pooled.contiguous();
  const int32_t* counts = unique_count.const_data_ptr<int32_t>();
  const int32_t* rows = unique_indices.const_data_ptr<int32_t>();
  const int32_t* bags = output_rows.const_data_ptr<int32_t>();
  std::vector<const int32_t*> starts(tables);
  for (int64_t t = 0; t < tables; ++t) starts[t] = output_row_offsets.const_data_ptr<int32_t>() + first_lookup[t] + t;
  const Groups groups(std::move(starts), std::vector<int64_t>(counts, counts + tables));
  groups.parallel_for(kLookupsPerRow, [&](int64_t t, int64_t first, int64_t last) {
    const GroupedLookups lookups{rows + first_lookup[t], bags + first_lookup[t], groups.offsets(t)};
    with_type(gradients, [&](auto* gradient) {
      with_type(weights[t], [&](auto* weight) {
        auto update = [&](auto rounding) {
          update_rows(weight, rule(t), rounding, gradient + t * dim, tables * dim, lookups, first, last, dim);
        };
        if constexpr (std::is_same_v<decltype(weight), float*>) update(Unrounded());
        else if (seeds) update(Stochastic{(*seeds)[t]});
        else update(ToNearest());
      });
    });
  });
}

// Runs Adagrad, whose moments have one number per column, or RowwiseAdagrad, whose moments have one per row.
template <class Rule>
void update_with_moments(at::TensorList weights, at::TensorList moments, const at::Tensor& grad_pooled,
                         const at::Tensor& unique_indices, const at::Tensor& output_rows,
                         const at::Tensor& output_row_offsets, const at::Tensor& unique_count,
                         at::IntArrayRef max_lookups, double lr, double eps, at::OptionalIntArrayRef seeds) {
  TORCH_CHECK(moments.size() == weights.size(), "one moment per table");
  for (size_t t = 0; t < moments.size(); ++t) {
    const int64_t numbers = weights[t].size(0) * (std::is_same_v<Rule, Adagrad> ? weights[t].size(1) : 1);
    TORCH_CHECK(moments[t].numel() == numbers && moments[t].is_contiguous(), "moments of size ", moments[t].sizes(),
                " for a table of ", weights[t].sizes());
  }
  update_tables(weights, grad_pooled, unique_indices, output_rows, output_row_offsets, unique_count, max_lookups, seeds,
                [&](int64_t t) { return Rule{moments[t].mutable_data_ptr<float>(), float(lr), float(eps)}; });
}

}  // namespace

void sparse_sgd_(at::TensorList weights, const at::Tensor& grad_pooled, const at::Tensor& unique_indices,
                 const at::Tensor& output_rows, const at::Tensor& output_row_offsets, const at::Tensor& unique_count,
                 at::IntArrayRef max_lookups, double lr, at::OptionalIntArrayRef seeds) {
  update_tables(weights, grad_pooled, unique_indices, output_rows, output_row_offsets, unique_count, max_lookups, seeds,
                [&](int64_t) { return Sgd{float(lr)}; });
}

void sparse_adagrad_(at::TensorList weights, at::TensorList moments, const at::Tensor& grad_pooled,
                     const at::Tensor& unique_indices, const at::Tensor& output_rows,
                     const at::Tensor& output_row_offsets, const at::Tensor& unique_count, at::IntArrayRef max_lookups,
                     double lr, double eps, at::OptionalIntArrayRef seeds) {
  update_with_moments<Adagrad>(weights, moments, grad_pooled, unique_indices, output_rows, output_row_offsets,
                               unique_count, max_lookups, lr, eps, seeds);
}

void sparse_rowwise_adagrad_(at::TensorList weights, at::TensorList moments, const at::Tensor& grad_pooled,
                             const at::Tensor& unique_indices, const at::Tensor& output_rows,
                             const at::Tensor& output_row_offsets, const at::Tensor& unique_count,
                             at::IntArrayRef max_lookups, double lr, double eps, at::OptionalIntArrayRef seeds) {
  update_with_moments<RowwiseAdagrad>(weights, moments, grad_pooled, unique_indices, output_rows, output_row_offsets,
                                      unique_count, max_lookups, lr, eps, seeds);
}

}  // namespace dlrm
