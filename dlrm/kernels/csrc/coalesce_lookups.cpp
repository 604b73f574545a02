// dlrm::coalesce_lookups: checks the lookups of a batch and groups them by row.

#include <ATen/Dispatch.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "groups.h"
#include "ops.h"

namespace dlrm {
namespace {

constexpr int kMostDigitBits = 12;          // 4096 counters take 16 KiB of an L1 cache of at least 32
constexpr int64_t kAtOnce = 16;             // lookups per step of a loop: one or two cache lines
constexpr int64_t kWorthSplitting = 65536;  // lookups; a smaller sort is faster than six barriers

// ---------------------------------------------------------------------------------------------------------------------
// Input and output
// ---------------------------------------------------------------------------------------------------------------------

struct RawTable {
  at::Tensor indices;         // (lookups,)
  const at::Tensor* offsets;  // (T, B + 1), shared by all tables: making a tensor per table takes time
  int64_t number, rows;

  int64_t lookups() const { return indices.numel(); }
  int64_t bags() const { return offsets->size(1) - 1; }
};

struct PreparedTable {  // one table's part of each tensor of a `PreparedLookups`
  int32_t *indices_fwd, *offsets, *valid_count_fwd, *unique_indices, *output_rows, *output_row_offsets,
      *valid_count_bwd, *unique_count;
};

// Calls f(pointer to the indices, pointer to the offsets) with their types.
template <class F>
auto with_types(const RawTable& table, F f) {
  return AT_DISPATCH_INDEX_TYPES(table.indices.scalar_type(), "coalesce_lookups", [&] {
    const index_t* indices = table.indices.const_data_ptr<index_t>();
    return AT_DISPATCH_INDEX_TYPES(table.offsets->scalar_type(), "coalesce_lookups", [&] {
      return f(indices, table.offsets->const_data_ptr<index_t>() + table.number * (table.bags() + 1));
    });
  });
}

// Copies a table's lookups, and returns whether they are valid. It neither branches nor notes where an error is, so
// that it runs at the speed of memory.
bool copy_if_valid(const RawTable& raw, const PreparedTable& table, int64_t max_lookups) {
  const int64_t lookups = raw.lookups(), bags = raw.bags();
  if (lookups > max_lookups) return false;
  return with_types(raw, [&](auto* indices, auto* offsets) {
    uint64_t bad = offsets[0] != 0 || offsets[bags] != lookups;  // bool would keep the loop from vectorising
    for (int64_t bag = 0; bag < bags; ++bag) bad |= offsets[bag + 1] < offsets[bag];
    std::copy_n(offsets, bags + 1, table.offsets);
    const uint64_t rows = raw.rows;
    for (int64_t i = 0; i < lookups; ++i) {
      bad |= uint64_t(indices[i]) >= rows;  // a negative row is huge as uint64_t
      table.indices_fwd[i] = int32_t(indices[i]);
    }
    return !bad;
  });
}

// Raises an error that names the sample and what is wrong with it.
void explain(const RawTable& table, int64_t max_lookups) {
  const int64_t t = table.number, lookups = table.lookups(), bags = table.bags();
  with_types(table, [&](auto* indices, auto* offsets) {
    TORCH_CHECK_VALUE(lookups <= max_lookups, "table ", t, ": ", lookups, " lookups, but there is room for ",
                      max_lookups);
    TORCH_CHECK_VALUE(offsets[0] == 0, "table ", t, ", sample 0: offsets must start at 0, not at ", offsets[0]);
    for (int64_t bag = 0; bag < bags; ++bag)
      TORCH_CHECK_VALUE(offsets[bag] <= offsets[bag + 1], "table ", t, ", sample ", bag,
                        ": offsets must not decrease, as from ", offsets[bag], " to ", offsets[bag + 1]);
    TORCH_CHECK_VALUE(offsets[bags] == lookups, "table ", t, ", sample ", bags - 1,
                      ": offsets must end at the number of lookups, ", lookups, ", not at ", offsets[bags]);
    for (int64_t i = 0, bag = 0; i < lookups; ++i) {
      while (offsets[bag + 1] <= i) ++bag;
      TORCH_CHECK_INDEX(indices[i] >= 0 && indices[i] < table.rows, "table ", t, ", sample ", bag, ": lookup of row ",
                        indices[i], ", but the table's rows are 0 to ", table.rows - 1);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The sort
// ---------------------------------------------------------------------------------------------------------------------

// Memory that each thread keeps from batch to batch: fresh memory costs more in page faults than the sort itself.
struct Scratch {
  std::vector<uint64_t> from, to;
  std::vector<int32_t> counts;
};

int bits_for(int64_t values) {
  int bits = 0;
  while ((int64_t(1) << bits) < values) ++bits;
  return bits;
}

// The lookups of one table as numbers `row << bag_bits | bag`, sorted by row; equal rows keep their order. Packed is
// the narrower of uint32_t and uint64_t that holds them, because the bytes moved bound the sort.
//
// It is a radix sort, lowest digit first, with as few digits as the rows of the table need. The lookups are cut into
// `parts` with counters of their own, so that parts run in parallel and every lookup lands where it would with one
// part.
template <class Packed>
class Sorter {
 public:
  Sorter(const PreparedTable& table, int64_t lookups, int64_t bags, int64_t rows, int64_t parts, Scratch& scratch)
      : table_(table), lookups_(lookups), bags_(bags), parts_(parts), bag_bits_(bits_for(bags)) {
    const int row_bits = std::max(bits_for(rows), 1);
    passes_ = (row_bits + kMostDigitBits - 1) / kMostDigitBits;
    digit_bits_ = (row_bits + passes_ - 1) / passes_;
    scratch.counts.resize(std::max<int64_t>(parts << digit_bits_, scratch.counts.size()));
    const size_t words = (lookups * sizeof(Packed) + 7) / 8;
    scratch.from.resize(std::max(words, scratch.from.size()));
    scratch.to.resize(std::max(words, scratch.to.size()));
    from_ = reinterpret_cast<Packed*>(scratch.from.data());
    to_ = reinterpret_cast<Packed*>(scratch.to.data());
    counts_ = scratch.counts.data();
    int32_t others = lookups != bags;
    for (int64_t bag = 0; bag < bags; ++bag) others |= table.offsets[bag] ^ int32_t(bag);
    one_per_bag_ = !others;
  }

  void run() {
    for_each_part([this](int64_t, int64_t begin, int64_t end) { pack(begin, end); });
    for (int p = 0; p < passes_; ++p) pass(p);
    write_groups();
  }

 private:
  // Some bits of a row's number. Each loop has its own copy in registers: the compiler must assume that what the loop
  // writes could be a member of this class.
  struct Digit {
    int shift;
    Packed mask;
    Packed of(Packed lookup) const { return (lookup >> shift) & mask; }
  };

  int32_t* counts(int64_t part) const { return counts_ + (part << digit_bits_); }

  // Calls f(part, first lookup, last lookup + 1) for each part.
  template <class F>
  void for_each_part(F f) {
    at::parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) f(p, part_begin(lookups_, p, parts_), part_begin(lookups_, p + 1, parts_));
    });
  }

  // Packs lookups [begin, end) in the order in which they came: writes the bags, then the rows above them.
  void pack(int64_t begin, int64_t end) {
    const int32_t* indices = table_.indices_fwd;
    Packed* from = from_;
    if (one_per_bag_)
      for (int64_t i = begin; i < end; ++i) from[i] = Packed(i);
    else write_bags(begin, end);
    for (int64_t i = begin; i < end; ++i) from[i] |= Packed(indices[i]) << bag_bits_;
  }

  void write_bags(int64_t begin, int64_t end) {
    const int32_t* offsets = table_.offsets;
    Packed* from = from_;
    int64_t bag = std::upper_bound(offsets, offsets + bags_ + 1, begin) - offsets - 1;
    for (int64_t i = begin; i < end; ++bag) {
      const int64_t bag_end = std::min<int64_t>(end, offsets[bag + 1]);
      // Writes more than the bag's own, and the next bag overwrites the rest: the processor could not predict the end
      // of a loop over the bag's own lookups.
      for (; i < bag_end && i + kAtOnce <= end; i += kAtOnce) std::fill_n(from + i, kAtOnce, Packed(bag));
      for (; i < bag_end; ++i) from[i] = Packed(bag);
      i = bag_end;
    }
  }

  // Distributes the lookups by one digit of their rows.
  void pass(int number) {
    const int shift = bag_bits_ + number * digit_bits_;
    const int32_t digits = int32_t(1) << digit_bits_;
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      const Digit digit{shift, Packed(digits - 1)};
      int32_t* count = counts(part);
      const Packed* from = from_;
      std::fill_n(count, digits, 0);
      for (int64_t i = begin; i < end; ++i) ++count[digit.of(from[i])];
    });
    int32_t next = 0;
    int32_t *const first_end = counts(1), *const all_end = counts(parts_);
    for (int32_t* first = counts(0); first < first_end; ++first)
      for (int32_t* count = first; count < all_end; count += digits) next += std::exchange(*count, next);
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      const Digit digit{shift, Packed(digits - 1)};
      int32_t* place = counts(part);
      const Packed* from = from_;
      Packed* to = to_;
      for (int64_t i = begin; i < end; ++i) to[place[digit.of(from[i])]++] = from[i];
    });
    std::swap(from_, to_);
  }

  void write_groups() {
    std::vector<int64_t> first_group(parts_ + 1);
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      const Packed* from = from_;
      const int bag_bits = bag_bits_;
      int32_t groups = begin < end && starts_group(begin);
      for (int64_t i = begin + 1; i < end; ++i) groups += (from[i] ^ from[i - 1]) >> bag_bits != 0;
      first_group[part + 1] = groups;
    });
    for (int64_t part = 0; part < parts_; ++part) first_group[part + 1] += first_group[part];
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      const Packed* from = from_;
      const int bag_bits = bag_bits_;
      int32_t *bags = table_.output_rows, *rows = table_.unique_indices, *starts = table_.output_row_offsets;
      for (int64_t i = begin; i < end; ++i) bags[i] = int32_t(from[i] & ((Packed(1) << bag_bits) - 1));
      // Writes at every lookup, and the next lookup overwrites it unless a group starts here: a branch would be
      // mispredicted too often. The last write must be the start of a group, because the place after it belongs to the
      // next part.
      while (begin < end && !starts_group(end - 1)) --end;
      if (begin == end) return;
      int64_t group = first_group[part];
      Packed before = lookup_before(begin);
      for (int64_t i = begin; i < end; ++i) {
        rows[group] = int32_t(from[i] >> bag_bits);
        starts[group] = int32_t(i);
        group += (from[i] ^ before) >> bag_bits != 0;
        before = from[i];
      }
    });
    const int64_t groups = first_group[parts_];
    table_.output_row_offsets[groups] = int32_t(lookups_);
    table_.unique_count[0] = int32_t(groups);
    table_.valid_count_bwd[0] = int32_t(groups + 1);
    table_.valid_count_bwd[1] = int32_t(lookups_);
  }

  // Returns the lookup before this one; before the very first, a lookup of another row.
  Packed lookup_before(int64_t i) const { return i ? from_[i - 1] : ~from_[0]; }

  bool starts_group(int64_t i) const { return (from_[i] ^ lookup_before(i)) >> bag_bits_ != 0; }

  const PreparedTable& table_;
  int64_t lookups_, bags_, parts_;
  bool one_per_bag_;  // as in Criteo's data
  int bag_bits_, digit_bits_, passes_;
  Packed *from_, *to_;
  int32_t* counts_;
};

// Fills the rest of one table's part of each tensor, after its lookups have been copied, with up to `parts` threads.
void coalesce(const RawTable& raw, const PreparedTable& table, int64_t parts) {
  static thread_local Scratch scratch;
  const int64_t lookups = raw.lookups(), bags = raw.bags();
  table.valid_count_fwd[0] = int32_t(bags + 1);
  table.valid_count_fwd[1] = int32_t(lookups);
  if (bits_for(bags) + bits_for(raw.rows) <= 32) Sorter<uint32_t>(table, lookups, bags, raw.rows, parts, scratch).run();
  else Sorter<uint64_t>(table, lookups, bags, raw.rows, parts, scratch).run();
}

}  // namespace

void coalesce_lookups(at::TensorList indices, const at::Tensor& offsets, at::IntArrayRef table_rows,
                      at::IntArrayRef max_lookups, const at::Tensor& indices_fwd, const at::Tensor& offsets_fwd,
                      const at::Tensor& valid_count_fwd, const at::Tensor& unique_indices,
                      const at::Tensor& output_rows, const at::Tensor& output_row_offsets,
                      const at::Tensor& valid_count_bwd, const at::Tensor& unique_count) {
  const int64_t tables = indices.size();
  TORCH_CHECK(int64_t(table_rows.size()) == tables && int64_t(max_lookups.size()) == tables && offsets.dim() == 2 &&
                  offsets.size(0) == tables,
              "one tensor of indices, one row of offsets, one number of rows and one of lookups per table");
  const std::vector<int64_t> first = first_lookups(max_lookups);
  auto prepared = [&](const at::Tensor& field, at::IntArrayRef sizes) {
    TORCH_CHECK(field.sizes() == sizes && field.is_contiguous(), "prepared lookups of size ", field.sizes(), ", not ",
                sizes, " and contiguous");
    return field.mutable_data_ptr<int32_t>();
  };
  const int64_t bags_and_end = offsets.size(1);
  int32_t* all_indices = prepared(indices_fwd, {first[tables]});
  int32_t* all_offsets_fwd = prepared(offsets_fwd, {tables, bags_and_end});
  int32_t* all_valid_fwd = prepared(valid_count_fwd, {tables, 2});
  int32_t* all_unique = prepared(unique_indices, {first[tables]});
  int32_t* all_output_rows = prepared(output_rows, {first[tables]});
  int32_t* all_row_offsets = prepared(output_row_offsets, {first[tables] + tables});
  int32_t* all_valid_bwd = prepared(valid_count_bwd, {tables, 2});
  int32_t* all_unique_counts = prepared(unique_count, {tables, 1});

  const at::Tensor all_offsets = offsets.contiguous();
  std::vector<RawTable> raw(tables);
  std::vector<PreparedTable> to(tables);
  int64_t lookups = 0;
  for (int64_t t = 0; t < tables; ++t) {
    raw[t] = {indices[t].contiguous(), &all_offsets, t, table_rows[t]};
    to[t] = {
        all_indices + first[t],     all_offsets_fwd + t * bags_and_end, all_valid_fwd + 2 * t, all_unique + first[t],
        all_output_rows + first[t], all_row_offsets + first[t] + t,     all_valid_bwd + 2 * t, all_unique_counts + t};
    lookups += raw[t].lookups();
  }

  // Each thread takes one table after the other. All threads sort large tables together.
  const int64_t threads = at::get_num_threads();
  auto is_large = [&](int64_t t) { return raw[t].lookups() > std::max(lookups / (4 * threads), kWorthSplitting); };
  std::atomic<int64_t> next{0};
  std::atomic<bool> all_valid{true};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t t; (t = next++) < tables;)
      if (!copy_if_valid(raw[t], to[t], max_lookups[t])) all_valid = false;
      else if (!is_large(t)) coalesce(raw[t], to[t], 1);
  });
  if (!all_valid)
    for (const RawTable& table : raw) explain(table, max_lookups[table.number]);
  for (int64_t t = 0; t < tables; ++t)
    if (is_large(t)) coalesce(raw[t], to[t], threads);
}

}  // namespace dlrm
