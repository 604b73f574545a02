// dlrm::cross, dlrm::cross_backward: what a cross layer does besides its matrix products.
//
// The tensors are as wide as all features of a sample, so memory bounds these passes. Each number is read and written
// once. Arithmetic is in float32, whatever the tensors hold.
//
// B samples, W features side by side.

#include <ATen/Parallel.h>

#include "gradients.h"
#include "ops.h"
#include "tensors.h"
#include "vectors.h"

namespace dlrm {
namespace {

constexpr int64_t kGrain = 4;  // samples for which another thread is worth waking

void check_like(const at::Tensor& tensor, const at::Tensor& like, const char* what) {
  TORCH_CHECK(tensor.sizes() == like.sizes() && tensor.scalar_type() == like.scalar_type(), what, " must be ",
              like.scalar_type(), " ", like.sizes(), ", not ", tensor.scalar_type(), " ", tensor.sizes());
}

void check(const at::Tensor& first, const at::Tensor& product, const at::Tensor& bias, const at::Tensor& other,
           const char* name) {
  TORCH_CHECK(first.dim() == 2, "the first input of a cross layer must be (B, W), not ", first.sizes());
  check_like(product, first, "the product");
  check_like(other, first, name);
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == first.size(1) && bias.scalar_type() == first.scalar_type(),
              "the bias must be ", first.scalar_type(), " (", first.size(1), "), not ", bias.scalar_type(), " ",
              bias.sizes());
}

template <class T>
void forward(const T* first, const T* product, const T* bias, const T* x, int64_t batch, int64_t width, T* output) {
  at::parallel_for(0, batch, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      auto step = [&](int64_t column, int64_t count) {
        const int64_t at = b * width + column;
        const Floats sums = load(product + at, count) + load(bias + column, count);
        store(output + at, load(first + at, count) * sums + load(x + at, count), count);
      };
      int64_t column = 0;
      for (; column + kLanes <= width; column += kLanes) step(column, kLanes);
      if (column < width) step(column, width - column);
    }
  });
}

template <bool Adds, class T>
void backward(const T* grad, const T* first, const T* product, const T* bias, const T* later, int64_t batch,
              int64_t width, T* grad_first, T* grad_product, T* transposed, T* sums) {
  auto gradient = [=](int64_t at, int64_t column, int64_t count) {
    const Floats g = load(grad + at, count);
    Floats of_first = g * (load(product + at, count) + load(bias + column, count));
    if constexpr (Adds) of_first += load(later + at, count);
    store(grad_first + at, of_first, count);
    return converted<T>(g * load(first + at, count));
  };
  write_gradients(gradient, batch, width, grad_product, transposed, sums);
}

}  // namespace

at::Tensor cross(const at::Tensor& first, const at::Tensor& product, const at::Tensor& bias, const at::Tensor& x) {
  check(first, product, bias, x, "x");
  const at::Tensor rows[] = {first.contiguous(), product.contiguous(), bias.contiguous(), x.contiguous()};
  const at::Tensor output = first.new_empty(first.sizes());
  with_type(rows[0], [&](auto* data) {
    forward<std::decay_t<decltype(*data)>>(data, data_like(data, rows[1]), data_like(data, rows[2]),
                                           data_like(data, rows[3]), first.size(0), first.size(1),
                                           data_like(data, output));
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_backward(const at::Tensor& grad,
                                                                          const at::Tensor& first,
                                                                          const at::Tensor& product,
                                                                          const at::Tensor& bias,
                                                                          const std::optional<at::Tensor>& later) {
  check(first, product, bias, grad, "the gradient");
  if (later) check_like(*later, first, "the gradient from later layers");
  const int64_t batch = first.size(0), width = first.size(1);
  const at::Tensor rows[] = {grad.contiguous(), first.contiguous(), product.contiguous(), bias.contiguous(),
                             later ? later->contiguous() : at::Tensor()};
  const at::Tensor grad_first = first.new_empty(first.sizes()), grad_product = first.new_empty(first.sizes()),
                   transposed = first.new_empty({first.scalar_type() == at::kBFloat16 ? width : 0, batch}),
                   sums = first.new_empty({width});
  with_type(rows[0], [&](auto* data) {
    auto run = [&](auto adds) {
      backward<adds, std::decay_t<decltype(*data)>>(
          data, data_like(data, rows[1]), data_like(data, rows[2]), data_like(data, rows[3]),
          adds ? data_like(data, rows[4]) : nullptr, batch, width, data_like(data, grad_first),
          data_like(data, grad_product), data_like(data, transposed), data_like(data, sums));
    };
    if (later) run(std::true_type());
    else run(std::false_type());
  });
  return {grad_first, grad_product, transposed, sums};
}

}  // namespace dlrm
