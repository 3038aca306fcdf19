// What the optimizer computes, against loops written from the equations in csrc/problem.h.
#include "checks.h"

using refconv::FoldedAdamProblem;
using refconv::FusedSgdProblem;

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
      double mean = 0, slope = 0, square = 0;  // of squares only, or it would lose digits that the kernel keeps
      for (int64_t a = 0; a < r; ++a) {
        mean += value(first[n * r + a]) * value(q[a * p.columns + j]);
        slope += value(gradient[n * r + a]) * value(q[a * p.columns + j]);
      }
      const T* row = root.get() + n * size;
      for (int64_t k = 0; k < r; row += r - k++) {
        double turned = 0;
        for (int64_t a = k; a < r; ++a) turned += value(row[a - k]) * value(q[a * p.columns + j]);
        square += p.keep * turned * turned;
      }
      square += (1 - p.keep) * slope * slope;
      const double ratio = p.scale_first * mean / (p.scale_second * std::sqrt(square) + p.eps);
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
  Buffer<T> squares = new_buffer<T>(got_second.size());
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

template <typename T>
void test_fused_sgd(refconv::cpu::FusedSgdKernel<T> kernel, const std::string& isa, const FusedSgdProblem& p) {
  const refconv::RefocusProblem& shape = p.transformation;
  const int64_t kernels = shape.kernels, length = shape.row_length(), map = shape.map_size;
  const Buffer<T> basis = random_buffer<T>(kernels * 9);
  Buffer<T> transformed = random_buffer<T>(kernels * 9);
  Buffer<T> refocus = random_buffer<T>(kernels * length), momentum = random_buffer<T>(kernels * length);
  const bool moves = p.momentum != 0;
  std::vector<double> want_refocus(kernels * length), want_momentum(kernels * length), want_transformed(kernels * 9);
  // Which entry of a row of W_r meets which of W_b for which of W_t.
  const auto each = [&](int64_t n, const auto& body) {
    for (int64_t j = 0; j < shape.group_size; ++j)
      for (int64_t s = 0; s < map * map; ++s)
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t row = t / 3 + s / map - map / 2, column = t % 3 + s % map - map / 2;
          const int64_t kernel_of_basis = n / shape.group_size * shape.group_size + j;
          if (row >= 0 && row < 3 && column >= 0 && column < 3)
            body(n * length + j * map * map + s, n * 9 + t, kernel_of_basis * 9 + row * 3 + column);
        }
  };
  for (int64_t n = 0; n < kernels; ++n) {
    std::vector<double> grad(kernels * length);
    each(n, [&](int64_t r, int64_t t, int64_t b) { grad[r] += value(transformed[t]) * value(basis[b]); });
    for (int64_t k = n * length; k < (n + 1) * length; ++k) {
      const double d = (p.maximize ? -1 : 1) * grad[k] + p.weight_decay * value(refocus[k]);
      const double m = p.first ? d : p.momentum * value(momentum[k]) + (1 - p.dampening) * d;
      want_momentum[k] = moves ? m : value(momentum[k]);
      want_refocus[k] = value(refocus[k]) - p.lr * (moves ? p.nesterov ? d + p.momentum * m : m : d);
    }
    for (int64_t t = n * 9; t < (n + 1) * 9; ++t) want_transformed[t] = shape.identity ? value(basis[t]) : 0;
    each(n, [&](int64_t r, int64_t t, int64_t b) { want_transformed[t] += want_refocus[r] * value(basis[b]); });
  }
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, kernels / 3}, {kernels / 3, kernels}}) {
    kernel(p, basis.get(), transformed.get(), refocus.get(), moves ? momentum.get() : nullptr, begin, end);
  }
  const std::string name = isa + Element<T>::name + " kernels" + std::to_string(kernels) + "/" +
                           std::to_string(shape.group_size) + " map" + std::to_string(map);
  expect_close("W_r " + name, refocus.get(), want_refocus, 50);
  expect_close("momentum " + name, momentum.get(), want_momentum, 50);
  expect_close("W_t " + name, transformed.get(), want_transformed, 50 + 9 * length);
}

// With all that SGD knows.
template <typename T>
void test_fused_sgds(const refconv::cpu::InstructionSet& set, int64_t kernels, int64_t group_size, int64_t map_size) {
  const auto kernel = set.kernels.fused_sgd<T>();
  refconv::RefocusProblem shape{};
  shape.kernels = kernels, shape.group_size = group_size, shape.map_size = map_size;
  shape.kernel_h = shape.kernel_w = 3;
  for (const bool on : {false, true}) {
    shape.identity = on;
    test_fused_sgd(kernel, set.name, FusedSgdProblem{shape, 0.1, 0, 0, 0, false, on, on});
    test_fused_sgd(kernel, set.name, FusedSgdProblem{shape, 0.1, 0.9, 0, 0.01, on, false, false});
    test_fused_sgd(kernel, set.name, FusedSgdProblem{shape, 0.1, 0.9, 0.3, 0.01, false, on, on});
    test_fused_sgd(kernel, set.name, FusedSgdProblem{shape, 0.1, 0.9, 0.3, 0, false, true, false});
  }
}

template <typename T>
void test_fused_sgd_all(const refconv::cpu::InstructionSet& set) {
  // Dense kernels straddle those at once and those whose gradient is held, in both of the parts that are computed.
  for (const int64_t kernels : {1, 2, 7, 16, 17, 47, 48, 63, 96, 97, 191, 192, 193, 290}) {
    test_fused_sgds<T>(set, kernels, 1, 3);
  }
  // Groups: rows straddle those at once and those that share a block of U, their entries vectors and blocks.
  for (const int64_t group_size : {2, 7, 8, 25, 26, 55}) test_fused_sgds<T>(set, 2 * group_size, group_size, 3);
  test_fused_sgds<T>(set, 3, 3, 1);
  test_fused_sgds<T>(set, 100, 100, 3);
}

}  // namespace

void test_optimizer(const InstructionSet& set) {
  test_folded_adam_all<float>(set);
  test_folded_adam_all<double>(set);
  test_fused_sgd_all<float>(set);
  test_fused_sgd_all<double>(set);
}
