// The lookups of all tables in groups, which are bags or unique rows, and how threads share the groups.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace dlrm {

// Returns where part `part` starts if `total` is cut into `parts` parts of about equal size; part `parts` starts at
// `total`.
inline int64_t part_begin(int64_t total, int64_t part, int64_t parts) { return total * part / parts; }

// Returns where the lookups of each table begin in tensors that have room for `max_lookups[t]` lookups in table t, and
// how much room there is in all.
inline std::vector<int64_t> first_lookups(at::IntArrayRef max_lookups) {
  std::vector<int64_t> starts(max_lookups.size() + 1);
  std::partial_sum(max_lookups.begin(), max_lookups.end(), starts.begin() + 1);
  return starts;
}

class Groups {
 public:
  // Group g of table t is lookups offsets[t][g] up to offsets[t][g + 1]; table t has counts[t] groups.
  Groups(std::vector<const int32_t*> offsets, std::vector<int64_t> counts)
      : offsets_(std::move(offsets)), counts_(std::move(counts)) {}

  const int32_t* offsets(int64_t table) const { return offsets_[table]; }

  // Calls f(table, first group, last group + 1), in parallel, until all groups of all tables are done.
  //
  // Each thread takes an equal share of the work, which is counted in lookups: a group counts its lookups and
  // `lookups_per_group` more. Shares end between groups, so no group is ever split, and the result for a group does not
  // depend on the number of threads.
  template <class F>
  void parallel_for(int64_t lookups_per_group, F f) const {
    const int64_t tables = counts_.size();
    auto work_before = [&](int64_t table, int64_t group) { return offsets(table)[group] + group * lookups_per_group; };
    std::vector<int64_t> start(tables + 1);  // work before each table
    for (int64_t t = 0; t < tables; ++t) start[t + 1] = start[t] + work_before(t, counts_[t]);

    const int64_t shares = at::get_num_threads();
    at::parallel_for(0, shares, 1, [&](int64_t first_share, int64_t last_share) {
      const int64_t begin = part_begin(start[tables], first_share, shares);
      const int64_t end = part_begin(start[tables], last_share, shares);
      // Returns the first group of the table that starts at or after this point of the work.
      auto group_at = [&](int64_t table, int64_t point) {
        int64_t low = 0, high = counts_[table];
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (start[table] + work_before(table, middle) < point) low = middle + 1;
          else high = middle;
        }
        return low;
      };
      for (int64_t t = 0; t < tables; ++t) {
        if (start[t + 1] <= begin || start[t] >= end) continue;
        const int64_t first = group_at(t, begin), last = group_at(t, end);
        if (first < last) f(t, first, last);
      }
    });
  }

 private:
  std::vector<const int32_t*> offsets_;
  std::vector<int64_t> counts_;
};

}  // namespace dlrm
