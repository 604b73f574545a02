// dlrm::relu_backward: the backward of a ReLU, in one pass, with what the bfloat16 layer before it needs.

#include "gradients.h"
#include "ops.h"
#include "tensors.h"
#include "vectors.h"

namespace dlrm {

std::tuple<at::Tensor, at::Tensor, at::Tensor> relu_backward(const at::Tensor& grad, const at::Tensor& output) {
  TORCH_CHECK(grad.dim() == 2 && grad.sizes() == output.sizes() && grad.scalar_type() == at::kBFloat16 &&
                  output.scalar_type() == at::kBFloat16,
              "relu_backward: two bfloat16 tensors of one shape, (B, n), not ", grad.scalar_type(), " ", grad.sizes(),
              " and ", output.scalar_type(), " ", output.sizes());
  using SignedHalves = Vector<int16_t, kLanes>;
  const at::Tensor grad_rows = grad.contiguous(), output_rows = output.contiguous();
  const int64_t batch = output.size(0), width = output.size(1);
  const at::Tensor masked = output.new_empty({batch, width}), transposed = output.new_empty({width, batch}),
                   bias = output.new_empty({width});
  const Bfloat16Bits *grad_data = bfloat16_data(grad_rows), *output_data = bfloat16_data(output_rows);
  auto gradient = [=](int64_t at, int64_t, int64_t count) {
    const SignedHalves signs = SignedHalves(load_bits(output_data + at, count));  // a bfloat16 has the sign of its bits
    return load_bits(grad_data + at, count) & Halves(signs > 0);
  };
  write_gradients(gradient, batch, width, bfloat16_data(masked), bfloat16_data(transposed), bfloat16_data(bias));
  return {masked, transposed, bias};
}

}  // namespace dlrm
