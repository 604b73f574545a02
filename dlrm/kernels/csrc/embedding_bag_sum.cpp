// dlrm::embedding_bag_sum: the sum of the rows that each bag looks up, for all tables.

#include "groups.h"
#include "ops.h"
#include "rows.h"
#include "tensors.h"

namespace dlrm {
namespace {

constexpr int64_t kLookupsPerBag = 1;  // writing a sum costs about as much as reading a row

template <class Weight>
void sum_bags(const Weight* weight, const int32_t* indices, const int32_t* offsets, int64_t first_bag, int64_t last_bag,
              int64_t dim, float* pooled, int64_t stride) {
  const int64_t last_lookup = offsets[last_bag];
  int64_t ahead = offsets[first_bag];
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = offsets[bag], end = offsets[bag + 1];
    for (; ahead < std::min(end + kAhead, last_lookup); ++ahead) prefetch_row(weight + indices[ahead] * dim, dim);
    if (bag + kAhead < last_bag) prefetch_row(pooled + (bag + kAhead) * stride, dim);
    sum_rows(weight, dim, indices + begin, end - begin, dim, pooled + bag * stride);
  }
}

}  // namespace

at::Tensor embedding_bag_sum(at::TensorList weights, const at::Tensor& indices_fwd, const at::Tensor& offsets,
                             at::IntArrayRef max_lookups) {
  const int64_t tables = weights.size(), bags = offsets.size(1) - 1, dim = tables ? weights[0].size(1) : 0;
  TORCH_CHECK(offsets.size(0) == tables && int64_t(max_lookups.size()) == tables, tables, " tables, offsets for ",
              offsets.size(0));
  const std::vector<int64_t> first = first_lookups(max_lookups);
  TORCH_CHECK(indices_fwd.numel() == first[tables], "lookups of size ", indices_fwd.sizes(), ", not ", first[tables]);
  TORCH_CHECK(indices_fwd.is_contiguous() && offsets.is_contiguous(), "prepared lookups must be contiguous");
  for (const at::Tensor& weight : weights) check_table(weight, dim);
  at::Tensor pooled = indices_fwd.new_empty({bags, tables, dim}, at::kFloat);
  float* sums = pooled.mutable_data_ptr<float>();
  const int32_t* indices = indices_fwd.const_data_ptr<int32_t>();
  std::vector<const int32_t*> starts(tables);
  for (int64_t t = 0; t < tables; ++t) starts[t] = offsets.const_data_ptr<int32_t>() + t * (bags + 1);
  const Groups groups(std::move(starts), std::vector<int64_t>(tables, bags));
  groups.parallel_for(kLookupsPerBag, [&](int64_t t, int64_t first_bag, int64_t last_bag) {
    with_type(weights[t], [&](auto* weight) {
      sum_bags(weight, indices + first[t], groups.offsets(t), first_bag, last_bag, dim, sums + t * dim, tables * dim);
    });
  });
  return pooled;
}

}  // namespace dlrm
