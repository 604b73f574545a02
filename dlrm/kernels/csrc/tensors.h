// Access to the numbers of tensors that may be float32 or bfloat16.

#pragma once

#include <ATen/core/Tensor.h>

#include "vectors.h"

namespace dlrm {

// Calls f(pointer to the numbers of `tensor`), which is a float* or, for bfloat16, a Bfloat16Bits*.
template <class F>
void with_type(const at::Tensor& tensor, F f) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "float32 or bfloat16 is needed, not ", type);
  if (type == at::kFloat) f(static_cast<float*>(tensor.data_ptr()));
  else f(static_cast<Bfloat16Bits*>(tensor.data_ptr()));
}

inline Bfloat16Bits* bfloat16_data(const at::Tensor& tensor) {
  return reinterpret_cast<Bfloat16Bits*>(tensor.data_ptr<at::BFloat16>());
}

// Returns the numbers of a tensor that has the type of `like`, a pointer that `with_type` made.
template <class T>
T* data_like(const T*, const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace dlrm
