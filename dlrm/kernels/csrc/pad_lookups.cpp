// dlrm::pad_lookups: turns grouped lookups into a padded rectangle, for devices that need static shapes.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "groups.h"
#include "ops.h"

namespace dlrm {

void pad_lookups(const at::Tensor& offsets, const at::Tensor& unique_indices, const at::Tensor& output_rows,
                 const at::Tensor& output_row_offsets, const at::Tensor& unique_count, at::IntArrayRef max_lookups,
                 at::IntArrayRef table_rows, const at::Tensor& unique_rows, const at::Tensor& positions) {
  const int64_t tables = table_rows.size(), bags = offsets.size(1) - 1;
  TORCH_CHECK(offsets.size(0) == tables && int64_t(max_lookups.size()) == tables,
              "one row of offsets and one number of lookups per table");
  const std::vector<int64_t> first = first_lookups(max_lookups);
  const int64_t padding = first[tables];
  TORCH_CHECK(unique_rows.numel() == padding + 1, "unique rows of size ", unique_rows.sizes(), ", not ", padding + 1);
  TORCH_CHECK(positions.numel() == padding, "positions of size ", positions.sizes(), ", not ", padding);
  for (const at::Tensor* field :
       {&unique_indices, &output_rows, &output_row_offsets, &unique_count, &unique_rows, &positions})
    TORCH_CHECK(field->is_contiguous(), "lookups must be contiguous");
  std::vector<int64_t> first_row(tables + 1);
  std::partial_sum(table_rows.begin(), table_rows.end(), first_row.begin() + 1);
  int32_t* all_unique = unique_rows.mutable_data_ptr<int32_t>();
  all_unique[padding] = int32_t(first_row[tables]);

  at::parallel_for(0, tables, 1, [&](int64_t first_table, int64_t last_table) {
    std::vector<int32_t> taken(bags);  // number of places that each bag has filled
    for (int64_t t = first_table; t < last_table; ++t) {
      const int64_t room = max_lookups[t], lookups_per_bag = bags ? room / bags : 0;
      const int32_t* unique = unique_indices.const_data_ptr<int32_t>() + first[t];
      const int32_t* bag_of = output_rows.const_data_ptr<int32_t>() + first[t];
      const int32_t* starts = output_row_offsets.const_data_ptr<int32_t>() + first[t] + t;
      const int32_t count = unique_count.const_data_ptr<int32_t>()[t];
      int32_t* rows = all_unique + first[t];
      int32_t* places = positions.mutable_data_ptr<int32_t>() + first[t];
      std::fill_n(taken.begin(), bags, 0);
      std::fill_n(places, room, int32_t(padding));
      for (int32_t group = 0; group < count; ++group) {
        rows[group] = int32_t(unique[group] + first_row[t]);
        for (int32_t i = starts[group]; i < starts[group + 1]; ++i)
          places[bag_of[i] * lookups_per_bag + taken[bag_of[i]]++] = int32_t(first[t] + group);
      }
      std::fill(rows + count, rows + room, all_unique[padding]);
    }
  });
}

}  // namespace dlrm
