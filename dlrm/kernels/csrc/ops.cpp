// Registers the CPU kernels with torch.

#include "ops.h"

#include <torch/library.h>

namespace dlrm {

TORCH_LIBRARY_IMPL(dlrm, CPU, m) {
  m.impl("draw_random_batch", draw_random_batch);
  m.impl("coalesce_lookups", coalesce_lookups);
  m.impl("pad_lookups", pad_lookups);
  m.impl("embedding_bag_sum", embedding_bag_sum);
  m.impl("sparse_sgd_", sparse_sgd_);
  m.impl("sparse_adagrad_", sparse_adagrad_);
  m.impl("sparse_rowwise_adagrad_", sparse_rowwise_adagrad_);
  m.impl("dot_interaction", dot_interaction);
  m.impl("dot_interaction_backward", dot_interaction_backward);
  m.impl("relu_backward", relu_backward);
  m.impl("cross", cross);
  m.impl("cross_backward", cross_backward);
  m.impl("matrix_product", matrix_product);
  m.impl("dense_adagrad_", dense_adagrad_);
  m.impl("dense_sgd_", dense_sgd_);
  m.impl("advise_huge_pages", advise_huge_pages);
}

}  // namespace dlrm
