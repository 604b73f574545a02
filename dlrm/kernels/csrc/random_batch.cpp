// dlrm::draw_random_batch: random dense features, lookups and targets, from the numbers that numpy's RandomState gives.
//
// The reference script draws them one by one, in Python. Here one thread draws them without holding Python's lock, so
// that it can run beside the training step. It skips what a rank does not need, and computes only where the stream goes
// on behind it. Products and sums must be rounded as numpy rounds them, so there is no fused multiply-add.

#pragma GCC optimize("-ffp-contract=off")

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ops.h"

#ifdef __clang__
#pragma clang fp contract(off)
#endif

namespace dlrm {
namespace {

constexpr int kWords = 624;

// MT19937 (Matsumoto and Nishimura 1998) and numpy's legacy distributions. The state is that of
// `RandomState.get_state()`: 624 words, how many of them are used, whether a normal is kept, and its bits.
class Generator {
 public:
  explicit Generator(const at::Tensor& state) : state_(state.mutable_data_ptr<int64_t>()) {
    TORCH_CHECK(state.numel() == kWords + 3 && state.is_contiguous(), "the state of a generator has ", kWords + 3,
                " numbers");
    std::copy_n(state_, kWords, words_);
    used_ = int(state_[kWords]);
    has_normal_ = state_[kWords + 1];
    std::memcpy(&normal_, &state_[kWords + 2], sizeof(normal_));
  }

  ~Generator() {
    std::copy_n(words_, kWords, state_);
    state_[kWords] = used_;
    state_[kWords + 1] = has_normal_;
    std::memcpy(&state_[kWords + 2], &normal_, sizeof(normal_));
  }

  // Returns a number in [0, 1) with 53 random bits.
  double uniform() {
    const uint32_t high = word() >> 5, low = word() >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
  }

  void skip_uniforms(int64_t count) {
    int64_t used = used_ + 2 * count;
    for (; used > kWords; used -= kWords) refill();
    used_ = int(used);
  }

  // Returns a normal number. The polar method (Marsaglia and Bray 1964) draws two at a time, and the second is kept.
  double normal() {
    if (has_normal_) {
      has_normal_ = false;
      return normal_;
    }
    const Point point = point_in_circle();
    const double factor = std::sqrt(-2.0 * std::log(point.squared_radius) / point.squared_radius);
    normal_ = factor * point.x;
    has_normal_ = true;
    return factor * point.y;
  }

  void skip_normals(int64_t count) {
    if (count > 0 && has_normal_) {
      has_normal_ = false;
      --count;
    }
    for (; count > 1; count -= 2) point_in_circle();
    if (count > 0) normal();
  }

 private:
  struct Point {
    double x, y, squared_radius;
  };

  Point point_in_circle() {
    Point point;
    do {
      point.x = 2.0 * uniform() - 1.0;
      point.y = 2.0 * uniform() - 1.0;
      point.squared_radius = point.x * point.x + point.y * point.y;
    } while (point.squared_radius >= 1.0 || point.squared_radius == 0.0);
    return point;
  }

  uint32_t word() {
    if (used_ == kWords) refill();
    uint32_t word = words_[used_++];
    word ^= word >> 11;
    word ^= word << 7 & 0x9d2c5680;
    word ^= word << 15 & 0xefc60000;
    return word ^ word >> 18;
  }

  void refill() {
    auto next = [this](int i, int following, int far) {
      const uint32_t joined = (words_[i] & 0x80000000) | (words_[following] & 0x7fffffff);
      words_[i] = words_[far] ^ joined >> 1 ^ (0 - (joined & 1) & 0x9908b0df);
    };
    for (int i = 0; i < kWords - 397; ++i) next(i, i + 1, i + 397);
    for (int i = kWords - 397; i < kWords - 1; ++i) next(i, i + 1, i + 397 - kWords);
    next(kWords - 1, 0, 396);
    used_ = 0;
  }

  int64_t* state_;
  uint32_t words_[kWords];
  int used_;
  bool has_normal_;
  double normal_;
};

// Draws accesses that repeat as those of a trace do; `TraceGenerator` in dlrm/data/trace.py says how. The state is the
// stack of n rows as a ring, from the next new row to the row that was accessed last: n rows, the place of the first,
// and the number of new rows drawn so far.
class Trace {
 public:
  Trace(Generator& generator, const at::Tensor& state, const at::Tensor& distribution, bool padding)
      : generator_(generator),
        rows_(state.mutable_data_ptr<int64_t>()),
        size_(state.numel() - 2),
        head_(rows_[size_]),
        drawn_(rows_[size_ + 1]),
        distances_(distribution.const_data_ptr<double>()),
        cumulative_(distances_ + distribution.size(1)),
        count_(distribution.size(1)),
        padding_(padding) {}

  int64_t next() {
    const int64_t distance = this->distance(generator_.uniform());
    if (distance == 0) {  // the first row becomes the last one
      ++drawn_;
      const int64_t row = rows_[head_];
      if (++head_ == size_) head_ = 0;
      return row;
    }
    int64_t to = (head_ + size_ - distance) % size_;
    const int64_t row = rows_[to];
    for (int64_t i = 1; i < distance; ++i) {
      const int64_t from = to + 1 == size_ ? 0 : to + 1;
      rows_[to] = rows_[from];
      to = from;
    }
    rows_[to] = row;
    return row;
  }

 private:
  int64_t distance(double uniform) const {
    if (drawn_ < distances_[count_ - 1]) {  // distances end at the rows accessed so far
      uniform *= cumulative_[std::upper_bound(distances_, distances_ + count_, drawn_) - distances_ - 1];
    } else if (padding_) {  // all rows have been seen, and no new ones are drawn
      uniform = (1.0 - cumulative_[0]) * uniform + cumulative_[0];
      if (count_ > 1) return int64_t(distances_[std::max<int64_t>(1, place(uniform))]);
    }
    return int64_t(distances_[place(uniform)]);
  }

  int64_t place(double uniform) const {
    return std::min<int64_t>(std::lower_bound(cumulative_, cumulative_ + count_, uniform) - cumulative_, count_ - 1);
  }

  Generator& generator_;
  int64_t* rows_;
  int64_t size_;
  int64_t &head_, &drawn_;
  const double *distances_, *cumulative_;
  int64_t count_;
  bool padding_;
};

// Draws bags of distinct values, in ascending order.
class BagDrawer {
 public:
  BagDrawer(Generator& generator, bool fixed) : generator_(generator), fixed_(fixed) {}

  // Draws the bags of a table of so many rows, of `lookups` values at most. `starts` gets where each bag begins, and
  // where the last one ends.
  template <typename Value>
  void draw(int64_t bags, int64_t rows, int64_t lookups, Value&& value, int64_t* indices, int64_t* starts) {
    values_.resize(lookups);
    starts[0] = 0;
    for (int64_t b = 0; b < bags; ++b) {
      const int64_t size = fixed_ ? lookups : size_of_bag(std::min(rows, lookups));
      for (int64_t i = 0; i < size; ++i) values_[i] = value();
      const auto begin = values_.begin(), end = begin + size;
      std::sort(begin, end);
      int64_t* bag = indices + starts[b];
      starts[b + 1] =
          std::transform(begin, std::unique(begin, end), bag, [](double v) { return int64_t(v); }) - indices;
    }
  }

  // `skip_values(n)` moves the stream past n values.
  template <typename Skip>
  void skip(int64_t bags, int64_t rows, int64_t lookups, Skip&& skip_values) {
    if (fixed_) return skip_values(bags * lookups);
    for (int64_t b = 0; b < bags; ++b) skip_values(size_of_bag(std::min(rows, lookups)));
  }

 private:
  int64_t size_of_bag(int64_t largest) {
    return int64_t(std::nearbyint(std::max(1.0, generator_.uniform() * double(largest))));
  }

  Generator& generator_;
  bool fixed_;
  std::vector<double> values_;
};

// Fills `to` with the rows from `first` on of a matrix of uniforms that has so many rows.
void draw_rows(Generator& generator, int64_t rows, int64_t first, const at::Tensor& to) {
  TORCH_CHECK(to.is_contiguous() && first >= 0 && first + to.size(0) <= rows, "rows ", first, " to ",
              first + to.size(0), " of ", rows, ", or not contiguous");
  generator.skip_uniforms(first * to.size(1));
  float* values = to.mutable_data_ptr<float>();
  for (int64_t i = 0; i < to.numel(); ++i) values[i] = float(generator.uniform());
  generator.skip_uniforms((rows - first - to.size(0)) * to.size(1));
}

}  // namespace

void draw_random_batch(const at::Tensor& state, at::IntArrayRef table_rows, at::IntArrayRef lookups, bool fixed,
                       c10::string_view distribution, at::ArrayRef<double> parameters, at::TensorList traces,
                       at::TensorList trace_distributions, int64_t first_sample, at::IntArrayRef tables,
                       const at::Tensor& dense, const at::Tensor& indices, const at::Tensor& offsets,
                       const at::Tensor& target) {
  const int64_t wanted = tables.size(), bags = offsets.size(1) - 1;
  TORCH_CHECK(lookups.size() == table_rows.size(), "one number of lookups per table");
  TORCH_CHECK(offsets.size(0) == wanted && offsets.is_contiguous(), "one row of offsets per wanted table");
  TORCH_CHECK(dense.size(0) == target.size(0), "dense features of ", dense.size(0), " samples, and targets of ",
              target.size(0));
  for (int64_t i = 0; i < wanted; ++i)
    TORCH_CHECK(tables[i] < int64_t(table_rows.size()) && tables[i] > (i ? tables[i - 1] : -1),
                "tables must ascend, and there are ", table_rows.size(), ", not ", tables[i]);
  int64_t room = 0;  // for lookups in the wanted tables
  for (const int64_t t : tables) room += bags * lookups[t];
  TORCH_CHECK(indices.numel() == room && indices.is_contiguous(), "indices of size ", indices.sizes(), ", not ", room);
  Generator generator(state);
  draw_rows(generator, bags, first_sample, dense);
  BagDrawer drawer(generator, fixed);
  int64_t* next_indices = indices.mutable_data_ptr<int64_t>();
  auto skip_uniforms = [&](int64_t count) { generator.skip_uniforms(count); };
  auto skip_normals = [&](int64_t count) { generator.skip_normals(count); };
  for (int64_t t = 0; t < int64_t(table_rows.size()); ++t) {
    const int64_t rows = table_rows[t], place = std::find(tables.begin(), tables.end(), t) - tables.begin();
    auto draw = [&](auto&& value, auto&& skip) {
      if (place == wanted) return drawer.skip(bags, rows, lookups[t], skip);
      drawer.draw(bags, rows, lookups[t], value, next_indices,
                  offsets.mutable_data_ptr<int64_t>() + place * (bags + 1));
      next_indices += bags * lookups[t];
    };
    if (distribution == "uniform") {
      draw([&] { return std::nearbyint(generator.uniform() * double(rows - 1)); }, skip_uniforms);
    } else if (distribution == "gaussian") {
      const double low = parameters[0], high = parameters[1], mean = parameters[2], deviation = parameters[3];
      draw([&] { return std::min(std::max(mean + deviation * generator.normal(), low), high); }, skip_normals);
    } else if (distribution == "zipf") {
      const double exponent = 1.0 - parameters[0], end = double(rows + 1), last = double(rows - 1);
      const bool logarithmic = std::abs(exponent) < 1e-9;
      const double whole = logarithmic ? std::log(end) : std::pow(end, exponent) - 1.0;
      auto value = [&] {
        const double u = generator.uniform();
        const double x = logarithmic ? std::exp(u * whole) : std::pow(1.0 + u * whole, 1.0 / exponent);
        return std::min(std::max(std::floor(x) - 1.0, 0.0), last);
      };
      draw(value, skip_uniforms);
    } else {
      TORCH_CHECK(distribution == "trace", "unknown distribution: ", std::string(distribution));
      Trace trace(generator, traces[t], trace_distributions[t], parameters[0] != 0.0);
      draw([&] { return double(trace.next() % rows); }, skip_uniforms);
    }
  }
  draw_rows(generator, bags, first_sample, target);
}

}  // namespace dlrm
