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
#include <optional>
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

struct Gaussian {
  double low, high, mean, deviation;
};

// Draws bags of distinct values, in ascending order.
class BagDrawer {
 public:
  BagDrawer(Generator& generator, int64_t lookups, bool fixed, std::optional<Gaussian> gaussian)
      : generator_(generator), lookups_(lookups), fixed_(fixed), gaussian_(gaussian), values_(lookups) {}

  // Writes a bag for a table of that many rows; returns its length.
  int64_t draw(int64_t rows, int64_t* bag) {
    const int64_t size = fixed_ ? lookups_ : size_of_bag(std::min(rows, lookups_));
    for (int64_t i = 0; i < size; ++i) values_[i] = value(rows);
    const auto begin = values_.begin(), end = begin + size;
    std::sort(begin, end);
    return std::transform(begin, std::unique(begin, end), bag, [](double v) { return int64_t(v); }) - bag;
  }

 private:
  int64_t size_of_bag(int64_t largest) {
    return int64_t(std::nearbyint(std::max(1.0, generator_.uniform() * double(largest))));
  }

  double value(int64_t rows) {
    if (!gaussian_) return std::nearbyint(generator_.uniform() * double(rows - 1));
    const double value = gaussian_->mean + gaussian_->deviation * generator_.normal();
    return std::min(std::max(value, gaussian_->low), gaussian_->high);
  }

  Generator& generator_;
  int64_t lookups_;
  bool fixed_;
  std::optional<Gaussian> gaussian_;
  std::vector<double> values_;
};

void fill_uniform(Generator& generator, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "a contiguous tensor is needed");
  float* to = tensor.mutable_data_ptr<float>();
  for (int64_t i = 0; i < tensor.numel(); ++i) to[i] = float(generator.uniform());
}

void draw_random_batch(const at::Tensor& state, at::IntArrayRef table_rows, int64_t lookups, bool fixed,
                       at::ArrayRef<double> gaussian, const at::Tensor& dense, const at::Tensor& indices,
                       const at::Tensor& offsets, const at::Tensor& target) {
  const int64_t tables = table_rows.size(), bags = offsets.size(1) - 1;
  TORCH_CHECK(gaussian.empty() || gaussian.size() == 4, "gaussian: low, high, mean and deviation, or nothing");
  TORCH_CHECK(offsets.size(0) == tables && offsets.is_contiguous() && indices.is_contiguous() &&
                  indices.sizes() == at::IntArrayRef({tables, bags * lookups}),
              "indices of size ", indices.sizes(), ", not (", tables, ", ", bags * lookups, ")");
  Generator generator(state);
  std::optional<Gaussian> normal;
  if (!gaussian.empty()) normal = {gaussian[0], gaussian[1], gaussian[2], gaussian[3]};
  fill_uniform(generator, dense);
  BagDrawer drawer(generator, lookups, fixed, normal);
  for (int64_t t = 0; t < tables; ++t) {
    int64_t* starts = offsets.mutable_data_ptr<int64_t>() + t * (bags + 1);
    int64_t* to = indices.mutable_data_ptr<int64_t>() + t * bags * lookups;
    starts[0] = 0;
    for (int64_t b = 0; b < bags; ++b) starts[b + 1] = starts[b] + drawer.draw(table_rows[t], to + starts[b]);
  }
  fill_uniform(generator, target);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlrm, CPU, m) { m.impl("draw_random_batch", draw_random_batch); }

}  // namespace dlrm
