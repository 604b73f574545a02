// dlrm::matrix_product: a product of float32 matrices, with a bias and a ReLU in the same pass.
//
// The scheme is that of BLIS (Van Zee and van de Geijn, https://doi.org/10.1145/2764454). A tile of the output stays in
// registers while a piece of the inner dimension passes. For that, both factors are copied to panels: kTileRows rows of
// the left factor, or kTileColumns columns of the right one, in the order in which the tile takes them. All threads
// together copy the left factor first: in the products of a layer, it is as small as a batch of activations. Then each
// thread computes whole columns of tiles. It copies the right factor in blocks that stay in its level-2 cache.
//
// Each output is a sum of pieces of kDepth products, in their order. Results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "ops.h"
#include "vectors.h"

namespace dlrm {
namespace {

// The tile leaves registers free for one row of the right panel and one number of the left panel.
#ifdef __AVX512F__
constexpr int64_t kTileRows = 14;
#else
constexpr int64_t kTileRows = 6;
#endif
constexpr int64_t kTileVectors = 2, kTileColumns = kTileVectors * kLanes;
constexpr int64_t kDepth = 512;      // a left panel then takes at most 28 KiB, which stay in the level-1 cache
constexpr int64_t kBlockPanels = 4;  // 256 KiB with AVX-512: half of the level-2 cache of most processors, or less
constexpr int64_t kGrain = 4;        // left panels for which another thread is worth waking

int64_t divided_up(int64_t total, int64_t part) { return (total + part - 1) / part; }

// A matrix whose rows or whose columns are contiguous: one of the strides is 1.
struct Matrix {
  explicit Matrix(const at::Tensor& tensor)
      : data(tensor.data_ptr<float>()),
        rows(tensor.size(0)),
        columns(tensor.size(1)),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)) {}

  const float* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }

  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

// The output, and what is added to complete sums.
struct Output {
  float* data;
  int64_t columns;
  const float* bias;  // one number per column, or nullptr
  bool relu;
};

// A piece of the inner dimension.
struct Piece {
  Piece(int64_t begin, int64_t inner)
      : begin(begin), depth(std::min(kDepth, inner - begin)), last(begin + depth == inner) {}

  int64_t begin, depth;
  bool last;
};

// Transposes a square in registers, in the way that is explained in mlp.cpp.
void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int64_t moved = 1; moved < kLanes; moved *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Floats a = rows[i], b = rows[i + kLanes / 2];
#ifdef __AVX512F__
      next[2 * i] = shuffled<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(a, b);
      next[2 * i + 1] = shuffled<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(a, b);
#else
      next[2 * i] = shuffled<0, 8, 1, 9, 2, 10, 3, 11>(a, b);
      next[2 * i + 1] = shuffled<4, 12, 5, 13, 6, 14, 7, 15>(a, b);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Copies contiguous numbers, with zeros beyond `count`.
template <int64_t Width>
void copy_padded(const float* from, int64_t count, float* to) {
  if (count == Width) {
    std::memcpy(to, from, Width * sizeof(float));
  } else {
    std::copy_n(from, count, to);
    std::fill(to + count, to + Width, 0.0f);
  }
}

// Fills a panel whose row k has `Width` numbers, the first `width` of them those that `from` has at
// `stride * j + k`, the others zeros.
template <int64_t Width>
void pack_transposed(const float* from, int64_t stride, int64_t width, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t height = std::min(kLanes, depth - k);
#pragma GCC unroll 4
    for (int64_t j = 0; j < Width; j += kLanes) {
      Floats square[kLanes] = {};
      if (width >= j + kLanes && height == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(from + (j + i) * stride + k);
      } else {
        for (int64_t i = 0; i < std::min(kLanes, width - j); ++i) square[i] = load(from + (j + i) * stride + k, height);
      }
      transpose(square);
      const int64_t lanes = std::min(kLanes, Width - j);
      if (height == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * Width + j, square[i], lanes);
      } else {
        for (int i = 0; i < height; ++i) store(panel + (k + i) * Width + j, square[i], lanes);
      }
    }
  }
}

// Copies a piece of kTileRows rows, or of those that there are from `row` on.
void pack_left(const Matrix& left, const Piece& piece, int64_t row, float* panel) {
  const int64_t height = std::min(kTileRows, left.rows - row);
  const float* from = left.at(row, piece.begin);
  if (left.column_stride == 1) {
    pack_transposed<kTileRows>(from, left.row_stride, height, piece.depth, panel);
  } else {
    for (int64_t k = 0; k < piece.depth; ++k)
      copy_padded<kTileRows>(from + k * left.column_stride, height, panel + k * kTileRows);
  }
}

// Copies a piece of kTileColumns columns, or of those that there are from `column` on.
void pack_right(const Matrix& right, const Piece& piece, int64_t column, float* panel) {
  const int64_t width = std::min(kTileColumns, right.columns - column);
  const float* from = right.at(piece.begin, column);
  if (right.column_stride == 1) {
    for (int64_t k = 0; k < piece.depth; ++k)
      copy_padded<kTileColumns>(from + k * right.row_stride, width, panel + k * kTileColumns);
  } else {
    pack_transposed<kTileColumns>(from, right.column_stride, width, piece.depth, panel);
  }
}

// The panels of a left factor: for each piece of the inner dimension, panel after panel.
class LeftPanels {
 public:
  explicit LeftPanels(const Matrix& left)
      : panels_(divided_up(left.rows, kTileRows)), data_(at::empty({panels_ * kTileRows * left.columns}, at::kFloat)) {
    const int64_t pieces = divided_up(left.columns, kDepth);
    at::parallel_for(0, pieces * panels_, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece piece(i / panels_ * kDepth, left.columns);
        pack_left(left, piece, i % panels_ * kTileRows, panel(piece, i % panels_));
      }
    });
  }

  float* panel(const Piece& piece, int64_t index) const {
    return data_.data_ptr<float>() + (piece.begin * panels_ + index * piece.depth) * kTileRows;
  }

 private:
  int64_t panels_;
  at::Tensor data_;
};

// A product of which tiles can be computed.
class Product {
 public:
  Product(const Matrix& left, const Matrix& right, const Output& out)
      : rows_(left.rows), left_panels_(left), right_(right), out_(out) {}

  // Computes the rows from `begin` to `end`, both of which begin a tile or end the matrix, in some columns of tiles, at
  // most kBlockPanels. `block` is memory for as many panels of the right factor.
  void compute(int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel, float* block) const {
    for (int64_t k = 0; k < right_.rows; k += kDepth) {
      const Piece piece(k, right_.rows);
      const int64_t panel_size = piece.depth * kTileColumns;
      for (int64_t p = first_panel; p < last_panel; ++p)
        pack_right(right_, piece, p * kTileColumns, block + (p - first_panel) * panel_size);
      for (int64_t row = begin; row < end; row += kTileRows)
        for (int64_t p = first_panel; p < last_panel; ++p)
          compute_tile(piece, row, p * kTileColumns, block + (p - first_panel) * panel_size);
    }
  }

 private:
  void compute_tile(const Piece& piece, int64_t row, int64_t column, const float* right_panel) const {
    const int64_t height = std::min(kTileRows, rows_ - row), width = std::min(kTileColumns, out_.columns - column);
    if (height == kTileRows && width == kTileColumns) add_piece<true>(piece, row, column, height, width, right_panel);
    else add_piece<false>(piece, row, column, height, width, right_panel);
  }

  // Adds a piece to a tile of `height` by `width` numbers, or to a full tile if Whole.
  template <bool Whole>
  void add_piece(const Piece& piece, int64_t row, int64_t column, int64_t height, int64_t width,
                 const float* right) const {
    const float* left = left_panels_.panel(piece, row / kTileRows);
    Floats sums[kTileRows][kTileVectors] = {};
    for (int64_t k = 0; k < piece.depth; ++k, left += kTileRows, right += kTileColumns) {
      Floats factors[kTileVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) factors[v] = load(right + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) sums[r][v] += left[r] * factors[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      if (!Whole && r >= height) break;
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t first = column + v * kLanes;
        const int64_t count = Whole ? kLanes : std::clamp<int64_t>(width - v * kLanes, 0, kLanes);
        float* to = out_.data + (row + r) * out_.columns + first;
        Floats sum = sums[r][v];
        if (piece.begin) sum += load(to, count);
        if (piece.last && out_.bias) sum += load(out_.bias + first, count);
        if (piece.last && out_.relu) sum = sum < 0 ? Floats{} : sum;  // NaN stays NaN
        store(to, sum, count);
      }
    }
  }

  int64_t rows_;
  LeftPanels left_panels_;
  Matrix right_;
  Output out_;
};

bool is_matrix(const at::Tensor& tensor) {
  return tensor.dim() == 2 && tensor.scalar_type() == at::kFloat && (tensor.stride(0) == 1 || tensor.stride(1) == 1);
}

}  // namespace

void matrix_product(const at::Tensor& left, const at::Tensor& right, const std::optional<at::Tensor>& bias, bool relu,
                    const at::Tensor& out) {
  TORCH_CHECK(is_matrix(left) && is_matrix(right) && left.size(1) == right.size(0) && left.size(1) > 0,
              "matrix_product: float32 matrices (m, k) and (k, n) with contiguous rows or columns, not ",
              left.scalar_type(), " ", left.sizes(), " and ", right.scalar_type(), " ", right.sizes());
  const int64_t rows = left.size(0), columns = right.size(1);
  TORCH_CHECK(out.scalar_type() == at::kFloat && out.is_contiguous() && out.sizes() == at::IntArrayRef({rows, columns}),
              "matrix_product: the output is not a contiguous float32 matrix of ", rows, " by ", columns);
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == columns),
              "matrix_product: the bias does not have ", columns, " float32 numbers");
  const Output output{out.data_ptr<float>(), columns, bias ? bias->data_ptr<float>() : nullptr, relu};
  const Product product(Matrix(left), Matrix(right), output);

  // Where threads could not share the columns of tiles evenly, the rows are cut as well.
  const int64_t panels = divided_up(columns, kTileColumns), row_panels = divided_up(rows, kTileRows);
  const int64_t parts = std::min(divided_up(4 * at::get_num_threads(), panels), row_panels);
  const int64_t part_rows = divided_up(row_panels, parts) * kTileRows;
  at::parallel_for(0, parts * panels, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor block = at::empty({kBlockPanels * kDepth * kTileColumns}, at::kFloat);
    while (begin < end) {
      const int64_t row = begin / panels * part_rows, first = begin % panels;
      const int64_t last = std::min({first + kBlockPanels, first + end - begin, panels});
      product.compute(row, std::min(row + part_rows, rows), first, last, block.data_ptr<float>());
      begin += last - first;
    }
  });
}

}  // namespace dlrm
