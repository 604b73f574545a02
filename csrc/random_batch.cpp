// dlrm::draw_random_batch: random dense features, lookups and targets, from the numbers that numpy's RandomState gives.
//
// The public DLRM script draws them one by one, in Python. Here one thread does, without holding Python's lock, so that
// it can run beside the training step. Products and sums must be rounded as numpy's are, hence no fused multiply-add.

#pragma GCC optimize("-ffp-contract=off")

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef __clang__
#pragma clang fp contract(off)
#endif

namespace dlrm {
namespace {

constexpr int kWords = 624;

// MT19937 (Matsumoto and Nishimura 1998), and what numpy's legacy generator makes of it. The state is that of
// `RandomState.get_state()`: 624 words, how many of them are used, whether a normal is at hand, and its bits.
class Generator {
 public:
  explicit Generator(const at::Tensor& state) : state_(state.mutable_data_ptr<int64_t>()) {
    TORCH_CHECK(state.numel() == kWords + 3 && state.is_contiguous(), "a generator of ", kWords + 3, " numbers");
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

  // In [0, 1), with 53 random bits.
  double uniform() {
    const uint32_t high = word() >> 5, low = word() >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
  }

  // By the polar method (Marsaglia and Bray 1964): two at a time, of which the second is kept.
  double normal() {
    if (has_normal_) {
      has_normal_ = false;
      return normal_;
    }
    double x, y, squared_radius;
    do {
      x = 2.0 * uniform() - 1.0;
      y = 2.0 * uniform() - 1.0;
      squared_radius = x * x + y * y;
    } while (squared_radius >= 1.0 || squared_radius == 0.0);
    const double factor = std::sqrt(-2.0 * std::log(squared_radius) / squared_radius);
    normal_ = factor * x;
    has_normal_ = true;
    return factor * y;
  }

 private:
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

// Draws accesses that repeat as those of a trace do; `TraceGenerator` in synthetic_trace.py says how. The state is the
// stack of n rows as a ring, the next new row first and the row accessed last at the end: n rows, the place of the first,
// and how many new rows have been drawn.
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
    if (drawn_ < distances_[count_ - 1]) {  // no distance beyond what has been accessed
      uniform *= cumulative_[std::upper_bound(distances_, distances_ + count_, drawn_) - distances_ - 1];
    } else if (padding_) {  // no new rows once all have been seen
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
  BagDrawer(Generator& generator, int64_t lookups, bool fixed)
      : generator_(generator), lookups_(lookups), fixed_(fixed), values_(lookups) {}

  // For a table of that many rows; `starts` gets where each bag begins, and where the last one ends.
  template <typename Value>
  void draw(int64_t bags, int64_t rows, Value&& value, int64_t* indices, int64_t* starts) {
    starts[0] = 0;
    for (int64_t b = 0; b < bags; ++b) {
      const int64_t size = fixed_ ? lookups_ : size_of_bag(std::min(rows, lookups_));
      for (int64_t i = 0; i < size; ++i) values_[i] = value();
      const auto begin = values_.begin(), end = begin + size;
      std::sort(begin, end);
      int64_t* bag = indices + starts[b];
      starts[b + 1] =
          std::transform(begin, std::unique(begin, end), bag, [](double v) { return int64_t(v); }) - indices;
    }
  }

 private:
  int64_t size_of_bag(int64_t largest) {
    return int64_t(std::nearbyint(std::max(1.0, generator_.uniform() * double(largest))));
  }

  Generator& generator_;
  int64_t lookups_;
  bool fixed_;
  std::vector<double> values_;
};

void fill_uniform(Generator& generator, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "a contiguous tensor is needed");
  float* to = tensor.mutable_data_ptr<float>();
  for (int64_t i = 0; i < tensor.numel(); ++i) to[i] = float(generator.uniform());
}

void draw_random_batch(const at::Tensor& state, at::IntArrayRef table_rows, int64_t lookups, bool fixed,
                       c10::string_view distribution, at::ArrayRef<double> parameters, at::TensorList traces,
                       at::TensorList trace_distributions, const at::Tensor& dense, const at::Tensor& indices,
                       const at::Tensor& offsets, const at::Tensor& target) {
  const int64_t tables = table_rows.size(), bags = offsets.size(1) - 1;
  TORCH_CHECK(offsets.size(0) == tables && offsets.is_contiguous() && indices.is_contiguous() &&
                  indices.sizes() == at::IntArrayRef({tables, bags * lookups}),
              "indices of size ", indices.sizes(), ", not (", tables, ", ", bags * lookups, ")");
  Generator generator(state);
  fill_uniform(generator, dense);
  BagDrawer drawer(generator, lookups, fixed);
  for (int64_t t = 0; t < tables; ++t) {
    const int64_t rows = table_rows[t];
    auto draw = [&](auto&& value) {
      drawer.draw(bags, rows, value, indices.mutable_data_ptr<int64_t>() + t * bags * lookups,
                  offsets.mutable_data_ptr<int64_t>() + t * (bags + 1));
    };
    if (distribution == "uniform") {
      draw([&] { return std::nearbyint(generator.uniform() * double(rows - 1)); });
    } else if (distribution == "gaussian") {
      const double low = parameters[0], high = parameters[1], mean = parameters[2], deviation = parameters[3];
      draw([&] { return std::min(std::max(mean + deviation * generator.normal(), low), high); });
    } else if (distribution == "zipf") {
      const double exponent = 1.0 - parameters[0], end = double(rows + 1), last = double(rows - 1);
      const bool logarithmic = std::abs(exponent) < 1e-9;
      const double whole = logarithmic ? std::log(end) : std::pow(end, exponent) - 1.0;
      draw([&] {
        const double u = generator.uniform();
        const double x = logarithmic ? std::exp(u * whole) : std::pow(1.0 + u * whole, 1.0 / exponent);
        return std::min(std::max(std::floor(x) - 1.0, 0.0), last);
      });
    } else {
      TORCH_CHECK(distribution == "trace", "a distribution that is not known: ", std::string(distribution));
      Trace trace(generator, traces[t], trace_distributions[t], parameters[0] != 0.0);
      draw([&] { return double(trace.next() % rows); });
    }
  }
  fill_uniform(generator, target);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlrm, CPU, m) { m.impl("draw_random_batch", draw_random_batch); }

}  // namespace dlrm
