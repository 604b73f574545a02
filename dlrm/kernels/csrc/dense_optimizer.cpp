// The dense optimizers: one parallel pass over all parameters, whatever their shapes and number.
//
// The update is bound by memory, so each number is read and written once: the gradient in the type that the backward
// left it in, the float32 master and its moment, and the bfloat16 shadow that the next forward multiplies with.
// Every element is computed by itself, so results do not depend on the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "tensors.h"
#include "vectors.h"

namespace dlrm {
namespace {

constexpr int64_t kGrain = 16384;  // elements for which another thread is worth waking

void check_float(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type, const char* what) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == like.numel(), what,
              " must be contiguous ", type, " of the size of the weight ", like.sizes(), ", not ", tensor.scalar_type(),
              " ", tensor.sizes());
}

// The parameters laid end to end; `ends[p]` is where parameter p ends.
struct Parameters {
  at::TensorList weights, moments, grads, shadows;
  std::vector<int64_t> ends;

  Parameters(at::TensorList weights, at::TensorList moments, at::TensorList grads, at::TensorList shadows)
      : weights(weights), moments(moments), grads(grads), shadows(shadows) {
    TORCH_CHECK(grads.size() == weights.size() && (moments.empty() || moments.size() == weights.size()) &&
                    (shadows.empty() || shadows.size() == weights.size()),
                "one gradient, moment and shadow a weight");
    int64_t end = 0;
    for (size_t p = 0; p < weights.size(); ++p) {
      check_float(weights[p], weights[p], at::kFloat, "a weight");
      if (!moments.empty()) check_float(moments[p], weights[p], at::kFloat, "a moment");
      if (!shadows.empty()) check_float(shadows[p], weights[p], at::kBFloat16, "a shadow");
      TORCH_CHECK(grads[p].scalar_type() == at::kFloat || grads[p].scalar_type() == at::kBFloat16,
                  "a gradient must be float32 or bfloat16, not ", grads[p].scalar_type());
      check_float(grads[p], weights[p], grads[p].scalar_type(), "a gradient");
      ends.push_back(end += weights[p].numel());
    }
  }
};

// The rule of each optimizer: from (weight, moment, gradient) to the new weight.
struct Adagrad {
  static constexpr bool kHasMoment = true;
  float lr, eps;
  float operator()(float weight, float& moment, float grad) const {
    moment += grad * grad;
    return weight - lr * grad / (std::sqrt(moment) + eps);
  }
};

struct Sgd {
  static constexpr bool kHasMoment = false;
  float lr;
  float operator()(float weight, float&, float grad) const { return weight - lr * grad; }
};

template <bool has_shadow, class Rule, class Grad>
void update(const Rule rule, int64_t count, float* __restrict weight, float* __restrict moment,
            const Grad* __restrict grad, Bfloat16Bits* __restrict shadow) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float none = 0;
    weight[i] = rule(weight[i], Rule::kHasMoment ? moment[i] : none, widened(grad[i]));
    if constexpr (has_shadow) shadow[i] = rounded(weight[i]);
  }
}

template <class Rule>
void update_all(const Rule rule, const Parameters& all) {
  if (all.ends.empty()) return;
  at::parallel_for(0, all.ends.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t p = std::upper_bound(all.ends.begin(), all.ends.end(), begin) - all.ends.begin();
    while (begin < end) {
      const int64_t first = begin - (all.ends[p] - all.weights[p].numel());
      const int64_t count = std::min(end, all.ends[p]) - begin;
      float* weight = all.weights[p].data_ptr<float>() + first;
      float* moment = Rule::kHasMoment ? all.moments[p].data_ptr<float>() + first : nullptr;
      with_type(all.grads[p], [&](const auto* grad) {
        if (all.shadows.empty()) update<false>(rule, count, weight, moment, grad + first, nullptr);
        else update<true>(rule, count, weight, moment, grad + first, bfloat16_data(all.shadows[p]) + first);
      });
      begin += count;
      ++p;
    }
  });
}

}  // namespace

void dense_adagrad_(at::TensorList weights, at::TensorList moments, at::TensorList grads, at::TensorList shadows,
                    double lr, double eps) {
  TORCH_CHECK(moments.size() == weights.size(), "one moment a weight");
  update_all(Adagrad{float(lr), float(eps)}, Parameters(weights, moments, grads, shadows));
}

void dense_sgd_(at::TensorList weights, at::TensorList grads, at::TensorList shadows, double lr) {
  update_all(Sgd{float(lr)}, Parameters(weights, {}, grads, shadows));
}

}  // namespace dlrm
