// The thin form of the Refocusing Transformation, and the gradient of its coordinates.
//
// Equations: csrc/problem.h. Two skinny matrix products per refocus group, W_t = W_b + E R and dE = dW_t R^T.
// Ownership: rows (one 2-D kernel each) per task.
// Bytes: reads and writes as many numbers as W_b has; R, rank x kernel_size per group, stays in the first cache.
// Accumulation: in the type computed with, along the rows of R (or R^T) in order, so nothing depends on the split.
#include "elements.h"
#include "entry_points.h"
#include "scratch.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// A matrix of one group in the type computed with, its rows padded with zeros to whole vectors.
template <typename S>
class Matrix {
 public:
  using T = Compute<S>;

  Matrix(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), width_(round_up(columns, kLanes<T>)), data_(rows * width_) {}

  void fill(const S* from) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < columns_; ++j) data_[i * width_ + j] = load_one(from + i * columns_ + j);
    }
  }
  void fill_transposed(const S* from) {
    for (int64_t j = 0; j < columns_; ++j) {
      for (int64_t i = 0; i < rows_; ++i) data_[i * width_ + j] = load_one(from + j * rows_ + i);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  const T* at(int64_t i, int64_t j) const { return data_.data() + i * width_ + j; }

 private:
  int64_t rows_, columns_, width_;
  Scratch<T> data_;
};

// to[r, j] = start[r, j] + sum_i from[r, i] * matrix[i, j] for ROWS rows and VECTORS vectors of columns from j on; no
// start where it is null. What the stores write behind a row is overwritten by later ones, up to `end`.
template <typename S, int ROWS, int VECTORS>
void product(const S* from, const S* start, const Matrix<S>& matrix, int64_t j, S* to, const S* end) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t inner = matrix.rows(), columns = matrix.columns();
  Vec<T> sums[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t column = j + v * kLane;
      sums[r][v] = start == nullptr ? Vec<T>{} : load_lanes(start + r * columns + column, columns - column);
    }
  }
  for (int64_t i = 0; i < inner; ++i) {
    Vec<T> row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(matrix.at(i, j + v * kLane));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> factor = broadcast(load_one(from + r * inner + i));
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t column = j + v * kLane;
      S* target = to + r * columns + column;
      if (columns <= kLane) {
        store_ahead(target, sums[r][v], columns, end);
      } else {
        store_lanes(target, sums[r][v], columns - column);
      }
    }
  }
}

template <typename S, int VECTORS>
void all_rows(const S* from, const S* start, const Matrix<S>& matrix, int64_t j, S* to, int64_t count, const S* end) {
  constexpr int kRows = VECTORS == 1 ? 6 : 2;
  const auto start_of = [&](int64_t r) { return start == nullptr ? nullptr : start + r * matrix.columns(); };
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    product<S, kRows, VECTORS>(from + r * matrix.rows(), start_of(r), matrix, j, to + r * matrix.columns(), end);
  }
  for (; r < count; ++r) {
    product<S, 1, VECTORS>(from + r * matrix.rows(), start_of(r), matrix, j, to + r * matrix.columns(), end);
  }
}

// All columns of `count` rows of one group.
template <typename S>
void multiply(const S* from, const S* start, const Matrix<S>& matrix, S* to, int64_t count, const S* end) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  int64_t j = 0;
  for (; j + 3 * kLane < matrix.columns(); j += 4 * kLane) all_rows<S, 4>(from, start, matrix, j, to, count, end);
  for (; j < matrix.columns(); j += kLane) all_rows<S, 1>(from, start, matrix, j, to, count, end);
}

// Calls group(index, first row, rows) for each refocus group that has rows in [begin, end).
template <typename Group>
void for_each_group(const ThinProblem& p, int64_t begin, int64_t end, const Group& group) {
  while (begin < end) {
    const int64_t index = begin / p.group_size, next = least(end, (index + 1) * p.group_size);
    group(index, begin, next - begin);
    begin = next;
  }
}

}  // namespace

template <typename S>
void thin_forward(const ThinProblem& p, const S* basis, const S* coordinates, const S* factor, S* transformed,
                  int64_t begin, int64_t end) {
  const int64_t size = p.kernel_size;
  Matrix<S> matrix(p.rank, size);
  for_each_group(p, begin, end, [&](int64_t index, int64_t first, int64_t count) {
    matrix.fill(factor + index * p.rank * size);
    multiply(coordinates + first * p.rank, p.identity ? basis + first * size : nullptr, matrix,
             transformed + first * size, count, static_cast<const S*>(transformed + end * size));
  });
}

template <typename S>
void thin_backward(const ThinProblem& p, const S* grad_transformed, const S* factor, S* grad_coordinates, int64_t begin,
                   int64_t end) {
  const int64_t size = p.kernel_size;
  Matrix<S> matrix(size, p.rank);
  for_each_group(p, begin, end, [&](int64_t index, int64_t first, int64_t count) {
    matrix.fill_transposed(factor + index * p.rank * size);
    multiply(grad_transformed + first * size, static_cast<const S*>(nullptr), matrix, grad_coordinates + first * p.rank,
             count, static_cast<const S*>(grad_coordinates + end * p.rank));
  });
}

REFCONV_INSTANTIATE_THIN(float)
REFCONV_INSTANTIATE_THIN(double)
REFCONV_INSTANTIATE_THIN(BFloat16)
REFCONV_INSTANTIATE_THIN(Half)

}  // namespace refconv::cpu::REFCONV_ISA
