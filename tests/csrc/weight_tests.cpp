// Transformed weights, in the full and in the thin form, against loops written from the equations in csrc/problem.h.
#include <algorithm>

#include "checks.h"

using refconv::RefocusProblem;
using refconv::ThinProblem;

namespace {

template <typename T>
void test_refocus(const refconv::cpu::RefocusKernels<T>& kernels, const std::string& isa, const RefocusProblem& p) {
  const int64_t size = p.kernel_size(), length = p.row_length(), k = p.map_size;
  const Buffer<T> basis = random_buffer<T>(p.kernels * size), refocus = random_buffer<T>(p.kernels * length);
  const Buffer<T> grad = random_buffer<T>(p.kernels * size);
  // More exact than float64, in which a sum of a thousand terms may miss the tolerance by itself.
  std::vector<long double> want_t(p.kernels * size), want_r(p.kernels * length);
  for (int64_t n = 0; n < p.kernels; ++n)
    for (int64_t h = 0; h < p.kernel_h; ++h)
      for (int64_t w = 0; w < p.kernel_w; ++w) {
        const int64_t o = (n * p.kernel_h + h) * p.kernel_w + w;
        if (p.identity) want_t[o] += value(basis[o]);
        for (int64_t j = 0; j < p.group_size; ++j)
          for (int64_t a = 0; a < k; ++a)
            for (int64_t b = 0; b < k; ++b) {
              const int64_t row = h + a - k / 2, col = w + b - k / 2;
              if (row < 0 || row >= p.kernel_h || col < 0 || col >= p.kernel_w) continue;
              const int64_t r = ((n * p.group_size + j) * k + a) * k + b;
              const int64_t source = n / p.group_size * p.group_size + j;
              const double from_basis = value(basis[(source * p.kernel_h + row) * p.kernel_w + col]);
              want_t[o] += value(refocus[r]) * from_basis;
              want_r[r] += value(grad[o]) * from_basis;
            }
      }
  const std::string name = isa + Element<T>::name + " N" + std::to_string(p.kernels) + " g" +
                           std::to_string(p.group_size) + " K" + std::to_string(p.kernel_h) + "x" +
                           std::to_string(p.kernel_w) + " k" + std::to_string(k);
  const int64_t cut = p.kernels / 3;
  Buffer<T> transformed = poisoned_buffer<T>(p.kernels * size), grad_refocus = poisoned_buffer<T>(p.kernels * length);
  kernels.forward(p, basis.get(), refocus.get(), transformed.get(), 0, cut);
  kernels.forward(p, basis.get(), refocus.get(), transformed.get(), cut, p.kernels);
  kernels.backward(p, grad.get(), basis.get(), grad_refocus.get(), 0, cut);
  kernels.backward(p, grad.get(), basis.get(), grad_refocus.get(), cut, p.kernels);
  expect_close("W_t " + name, transformed.get(), want_t, length);
  expect_close("dW_r " + name, grad_refocus.get(), want_r, size);
}

template <typename T>
void test_thin(const refconv::cpu::ThinKernels<T>& kernels, const std::string& isa, const ThinProblem& p) {
  const int64_t size = p.kernel_size, rank = p.rank, groups = p.kernels / p.group_size;
  const Buffer<T> basis = random_buffer<T>(p.kernels * size), grad = random_buffer<T>(p.kernels * size);
  const Buffer<T> coordinates = random_buffer<T>(p.kernels * rank), factor = random_buffer<T>(groups * rank * size);
  std::vector<double> want_t(p.kernels * size), want_e(p.kernels * rank);
  for (int64_t n = 0; n < p.kernels; ++n)
    for (int64_t s = 0; s < size; ++s) {
      if (p.identity) want_t[n * size + s] += value(basis[n * size + s]);
      for (int64_t i = 0; i < rank; ++i) {
        const double r = value(factor[(n / p.group_size * rank + i) * size + s]);
        want_t[n * size + s] += value(coordinates[n * rank + i]) * r;
        want_e[n * rank + i] += value(grad[n * size + s]) * r;
      }
    }
  const std::string name = isa + Element<T>::name + " thin N" + std::to_string(p.kernels) + " g" +
                           std::to_string(p.group_size) + " " + std::to_string(rank) + "x" + std::to_string(size);
  const int64_t cut = p.kernels / 3;
  Buffer<T> transformed = poisoned_buffer<T>(p.kernels * size), grad_e = poisoned_buffer<T>(p.kernels * rank);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, cut}, {cut, p.kernels}}) {
    kernels.forward(p, basis.get(), coordinates.get(), factor.get(), transformed.get(), begin, end);
    kernels.backward(p, grad.get(), factor.get(), grad_e.get(), begin, end);
  }
  expect_close("W_t " + name, transformed.get(), want_t, rank);
  expect_close("dE " + name, grad_e.get(), want_e, size);
}

template <typename T>
void test_refocus_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.refocus<T>();
  const std::string isa = set.name;
  for (const bool identity : {true, false}) {
    // Row lengths straddle the wide path's threshold and vectors, kernel counts its blocks of rows.
    for (const int64_t group : {1, 2, 3, 7, 8, 9, 10, 17, 33}) {
      for (const int64_t map : {1, 3, 5}) {
        test_refocus(kernels, isa, RefocusProblem{2 * group, group, 3, 3, map, identity});
        test_refocus(kernels, isa, RefocusProblem{group, group, 5, 2, map, identity});
      }
    }
    for (const int64_t dense : {1, 2, 5, 11, 12, 15, 16, 17, 24, 25, 48, 100}) {  // straddle the lanes, whole and cut
      test_refocus(kernels, isa, RefocusProblem{dense, 1, 3, 3, 3, identity});
    }
    // More than one block of a row, and more rows than go together; some of them alone.
    test_refocus(kernels, isa, RefocusProblem{131, 131, 3, 3, 3, identity});
    test_refocus(kernels, isa, RefocusProblem{128, 128, 5, 5, 3, identity});
    test_refocus(kernels, isa, RefocusProblem{83, 83, 7, 7, 3, identity});
    test_refocus(kernels, isa, RefocusProblem{22, 11, 7, 7, 3, identity});
    test_refocus(kernels, isa, RefocusProblem{35, 1, 7, 7, 7, identity});
  }
}

template <typename T>
void test_thin_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.thin<T>();
  for (const bool identity : {true, false}) {
    // Kernel sizes straddle one and several vectors, kernel counts the blocks of rows and the groups.
    for (const int64_t size : {1, 3, 4, 7, 8, 9, 15, 16, 17, 25, 33, 49, 65}) {
      for (const int64_t group : {1, 2, 5, 7, 13}) {
        test_thin(kernels, set.name, ThinProblem{3 * group, group, size, size, identity});
        test_thin(kernels, set.name, ThinProblem{group, group, 9, size, identity});
      }
    }
  }
}

}  // namespace

void test_weights(const InstructionSet& set) {
  test_refocus_all<float>(set);
  test_refocus_all<double>(set);
  test_refocus_all<BFloat16>(set);
  test_refocus_all<Half>(set);
  // dW_r large enough to be written around the cache.
  const int64_t dense = std::max<int64_t>(116611, refconv::cpu::last_cache_bytes() / 8 / 36 + 11);
  test_refocus(set.kernels.refocus<float>(), set.name, RefocusProblem{dense, 1, 3, 3, 3, false});
  test_refocus(set.kernels.refocus<float>(), set.name, RefocusProblem{352, 352, 3, 3, 3, false});
  test_refocus(set.kernels.refocus<float>(), set.name, RefocusProblem{352, 352, 5, 5, 3, false});
  // Rows that are no whole vectors, so through the cache; some are left over.
  test_refocus(set.kernels.refocus<float>(), set.name, RefocusProblem{353, 353, 3, 3, 3, false});
  test_thin_all<float>(set);
  test_thin_all<double>(set);
  test_thin_all<BFloat16>(set);
  test_thin_all<Half>(set);
  // An output large enough to be written around the cache.
  test_refocus(set.kernels.refocus<float>(), set.name, RefocusProblem{352, 352, 3, 3, 3, true});
}

void test_choice_for_weights() {
  const RefocusProblem dense{64, 1, 3, 3, 3, true}, depthwise{64, 64, 3, 3, 3, true};
  const auto& best = refconv::cpu::instruction_set();
  const auto sets = refconv::cpu::instruction_sets();
  const bool halves = std::any_of(sets.begin(), sets.end(), [](const auto* set) { return set->vector_bytes == 32; }) &&
                      refconv::cpu::has_half_width_units();
  expect("dense 3x3 bases take vectors as wide as what computes them, where there are such",
         refconv::cpu::instruction_set_for(dense).vector_bytes == (halves ? 32 : best.vector_bytes));
  expect("other bases take the best instruction set", &refconv::cpu::instruction_set_for(depthwise) == &best);
  for (const auto* set : sets) {
    refconv::cpu::set_instruction_set(set->name);
    expect(std::string("the one that was named, ") + set->name, &refconv::cpu::instruction_set_for(dense) == set);
  }
  refconv::cpu::set_instruction_set("auto");
}
