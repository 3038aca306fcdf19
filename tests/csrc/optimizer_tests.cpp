// What the optimizer computes, against loops written from the equations in csrc/problem.h.
#include "checks.h"

using refconv::FoldedAdamProblem;

namespace {

template <typename T>
void test_folded_adam(refconv::cpu::FoldedAdamKernel<T> kernel, const std::string& isa, const FoldedAdamProblem& p) {
  const int64_t r = p.rank, size = p.root_size(), groups = p.rows / p.per_group;
  const Buffer<T> first = random_buffer<T>(p.rows * r), gradient = random_buffer<T>(p.rows * r);
  const Buffer<T> rotation = random_buffer<T>(groups * r * p.columns), root = random_buffer<T>(p.rows * size);
  root[0] = gradient[0] = T(0);  // nothing to rotate
  std::vector<double> want(p.rows * r), want_second(p.rows * r * r), got_second(p.rows * r * r);
  const auto add_square = [&](const T* row, int64_t n, double factor, std::vector<double>* second) {  // of U
    for (int64_t k = 0; k < r; row += r - k++)
      for (int64_t a = k; a < r; ++a)
        for (int64_t b = k; b < r; ++b)
          (*second)[(n * r + a) * r + b] += factor * value(row[a - k]) * value(row[b - k]);
  };
  for (int64_t n = 0; n < p.rows; ++n) {
    add_square(root.get() + n * size, n, p.keep, &want_second);
    for (int64_t a = 0; a < r; ++a)
      for (int64_t b = 0; b < r; ++b)
        want_second[(n * r + a) * r + b] += (1 - p.keep) * value(gradient[n * r + a]) * value(gradient[n * r + b]);
    const T* q = rotation.get() + n / p.per_group * r * p.columns;
    for (int64_t j = 0; j < p.columns; ++j) {
      double mean = 0, square = 0;
      for (int64_t a = 0; a < r; ++a) {
        mean += value(first[n * r + a]) * value(q[a * p.columns + j]);
        for (int64_t b = 0; b < r; ++b)
          square += value(q[a * p.columns + j]) * want_second[(n * r + a) * r + b] * value(q[b * p.columns + j]);
      }
      const double ratio = p.scale_first * mean / (p.scale_second * std::sqrt(std::fmax(square, 0)) + p.eps);
      for (int64_t a = 0; a < r; ++a) want[n * r + a] += ratio * value(q[a * p.columns + j]);
    }
  }
  const std::string name = isa + Element<T>::name + " rows" + std::to_string(p.rows) + "/" + std::to_string(groups) +
                           " columns" + std::to_string(p.columns) + " rank" + std::to_string(r);
  Buffer<T> direction = poisoned_buffer<T>(p.rows * r), updated = poisoned_buffer<T>(p.rows * size);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, p.rows / 3}, {p.rows / 3, p.rows}}) {
    kernel(p, first.get(), root.get(), gradient.get(), rotation.get(), updated.get(), direction.get(), begin, end);
  }
  for (int64_t n = 0; n < p.rows; ++n) add_square(updated.get() + n * size, n, 1, &got_second);
  Buffer<T> squares(new T[got_second.size()]);
  for (size_t i = 0; i < got_second.size(); ++i) squares[i] = static_cast<T>(got_second[i]);
  expect_close("S " + name, squares.get(), want_second, r);
  expect_close("direction " + name, direction.get(), want, p.columns * r);
}

template <typename T>
void test_folded_adam_all(const refconv::cpu::InstructionSet& set) {
  const auto kernel = set.kernels.folded_adam<T>();
  // Columns straddle the vectors at once and the packed part of Q, rows those at once and their block.
  for (const int64_t columns : {1, 3, 9, 15, 16, 63, 64, 65, 130, 700}) {
    for (const int64_t rank : {1, 2, 9}) {
      test_folded_adam(kernel, set.name, FoldedAdamProblem{7, 7, columns, rank, 0.999, 2, 3, 0.1});
    }
  }
  for (const int64_t rows : {1, 2, 3, 4, 48, 50, 101}) {
    test_folded_adam(kernel, set.name, FoldedAdamProblem{2 * rows, rows, 40, 4, 0.9, 1, 1, 0.1});
  }
  test_folded_adam(kernel, set.name, FoldedAdamProblem{5, 5, 300, 49, 0.99, 10, 30, 1});
}

}  // namespace

void test_optimizer(const InstructionSet& set) {
  test_folded_adam_all<float>(set);
  test_folded_adam_all<double>(set);
}
