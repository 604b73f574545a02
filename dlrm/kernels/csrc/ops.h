// The CPU kernels of the ops that `ops.py` describes. ops.cpp registers them with torch.
//
// Only ops.cpp includes torch/library.h, which takes longer to compile than most kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>
#include <c10/util/string_view.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace dlrm {

void draw_random_batch(const at::Tensor& state, at::IntArrayRef table_rows, at::IntArrayRef lookups, bool fixed,
                       c10::string_view distribution, at::ArrayRef<double> parameters, at::TensorList traces,
                       at::TensorList trace_distributions, int64_t first_sample, at::IntArrayRef tables,
                       const at::Tensor& dense, const at::Tensor& indices, const at::Tensor& offsets,
                       const at::Tensor& target);

void coalesce_lookups(at::TensorList indices, const at::Tensor& offsets, at::IntArrayRef table_rows,
                      at::IntArrayRef max_lookups, const at::Tensor& indices_fwd, const at::Tensor& offsets_fwd,
                      const at::Tensor& valid_count_fwd, const at::Tensor& unique_indices,
                      const at::Tensor& output_rows, const at::Tensor& output_row_offsets,
                      const at::Tensor& valid_count_bwd, const at::Tensor& unique_count);

void pad_lookups(const at::Tensor& offsets, const at::Tensor& unique_indices, const at::Tensor& output_rows,
                 const at::Tensor& output_row_offsets, const at::Tensor& unique_count, at::IntArrayRef max_lookups,
                 at::IntArrayRef table_rows, const at::Tensor& unique_rows, const at::Tensor& positions);

at::Tensor embedding_bag_sum(at::TensorList weights, const at::Tensor& indices_fwd, const at::Tensor& offsets,
                             at::IntArrayRef max_lookups);

void sparse_sgd_(at::TensorList weights, const at::Tensor& grad_pooled, const at::Tensor& unique_indices,
                 const at::Tensor& output_rows, const at::Tensor& output_row_offsets, const at::Tensor& unique_count,
                 at::IntArrayRef max_lookups, double lr, at::OptionalIntArrayRef seeds);

void sparse_adagrad_(at::TensorList weights, at::TensorList moments, const at::Tensor& grad_pooled,
                     const at::Tensor& unique_indices, const at::Tensor& output_rows,
                     const at::Tensor& output_row_offsets, const at::Tensor& unique_count, at::IntArrayRef max_lookups,
                     double lr, double eps, at::OptionalIntArrayRef seeds);

void sparse_rowwise_adagrad_(at::TensorList weights, at::TensorList moments, const at::Tensor& grad_pooled,
                             const at::Tensor& unique_indices, const at::Tensor& output_rows,
                             const at::Tensor& output_row_offsets, const at::Tensor& unique_count,
                             at::IntArrayRef max_lookups, double lr, double eps, at::OptionalIntArrayRef seeds);

at::Tensor dot_interaction(const at::Tensor& dense, const at::Tensor& pooled, bool itself);

std::tuple<at::Tensor, at::Tensor> dot_interaction_backward(const at::Tensor& grad, const at::Tensor& dense,
                                                            const at::Tensor& pooled, bool itself);

std::tuple<at::Tensor, at::Tensor, at::Tensor> relu_backward(const at::Tensor& grad, const at::Tensor& output);

at::Tensor cross(const at::Tensor& first, const at::Tensor& product, const at::Tensor& bias, const at::Tensor& x);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_backward(const at::Tensor& grad,
                                                                          const at::Tensor& first,
                                                                          const at::Tensor& product,
                                                                          const at::Tensor& bias,
                                                                          const std::optional<at::Tensor>& later);

void matrix_product(const at::Tensor& left, const at::Tensor& right, const std::optional<at::Tensor>& bias, bool relu,
                    const at::Tensor& out);

void dense_adagrad_(at::TensorList weights, at::TensorList moments, at::TensorList grads, at::TensorList shadows,
                    double lr, double eps);

void dense_sgd_(at::TensorList weights, at::TensorList grads, at::TensorList shadows, double lr);

void advise_huge_pages(const at::Tensor& tensor);

}  // namespace dlrm
