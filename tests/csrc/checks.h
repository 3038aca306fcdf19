// What the kernel tests share: element types as numbers, buffers of exactly the size that a problem states, and the
// comparison. Outputs start as NaN, so under AddressSanitizer an access outside a tensor, and anywhere an element left
// unwritten, is caught.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

using refconv::BFloat16;
using refconv::Half;
using refconv::cpu::InstructionSet;

inline int failures = 0;
inline int checks = 0;

// Exact allocations, where a std::vector may round its capacity up; at whole lines, as PyTorch's are.
struct Free {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;
template <typename T>
Buffer<T> new_buffer(int64_t size) {
  return Buffer<T>(new (std::align_val_t{64}) T[size]);
}

inline std::mt19937 generator(0);

// What the kernels' element types hold, by their definition; `epsilon` is the distance from 1 to the next number.
template <typename T>
struct Element {
  static constexpr const char* name = sizeof(T) == 4 ? " f32" : " f64";
  static constexpr double epsilon = std::numeric_limits<T>::epsilon();
  static double value(T x) { return x; }
  static T nearest(double x) { return static_cast<T>(x); }
};

// A 16-bit type with `fraction` bits below the point and exponents from `smallest` on; all numbers here are normal.
template <typename T, int fraction, int smallest>
struct Element16 {
  static constexpr double epsilon = 1.0 / (1 << fraction);
  static double value(T x) {
    const int exponent = (x.bits & 0x7fff) >> fraction, rest = x.bits & ((1 << fraction) - 1);
    if (exponent == 0x7fff >> fraction) return rest != 0 ? std::nan("") : HUGE_VAL;
    const double magnitude =
        exponent == 0 ? std::ldexp(rest * epsilon, smallest) : std::ldexp(1 + rest * epsilon, exponent - 1 + smallest);
    return x.bits & 0x8000 ? -magnitude : magnitude;
  }
  static T nearest(double x) {
    if (std::isnan(x)) return T{0x7fff};
    int exponent = 0;
    const double mantissa = std::frexp(std::fabs(x), &exponent);
    const int stored = exponent - smallest;
    const double bits = stored < 1 ? 0 : std::nearbyint((2 * mantissa - 1 + stored) / epsilon);
    return T{static_cast<uint16_t>(static_cast<int>(bits) | (x < 0 ? 0x8000 : 0))};
  }
};

template <>
struct Element<BFloat16> : Element16<BFloat16, 7, -126> {
  static constexpr const char* name = " bf16";
};
template <>
struct Element<Half> : Element16<Half, 10, -14> {
  static constexpr const char* name = " f16";
};

template <typename T>
double value(T x) {
  return Element<T>::value(x);
}

// Normal numbers, from anywhere in one long row of them: to draw and to round each would take longer than the kernels.
template <typename T>
Buffer<T> random_buffer(int64_t size) {
  constexpr int64_t kDrawn = 1000003;  // a prime: no row or plane of a tensor is another's copy
  static const Buffer<T> drawn = [] {
    std::normal_distribution<double> normal;
    std::mt19937 own(0);  // of its own, so that others draw the same whoever comes first
    Buffer<T> numbers = new_buffer<T>(kDrawn);
    for (int64_t i = 0; i < kDrawn; ++i) numbers[i] = Element<T>::nearest(normal(own));
    return numbers;
  }();
  Buffer<T> buffer = new_buffer<T>(size);
  int64_t from = std::uniform_int_distribution<int64_t>(0, kDrawn - 1)(generator);
  for (int64_t i = 0; i < size; ++i, from = from + 1 < kDrawn ? from + 1 : 0) buffer[i] = drawn[from];
  return buffer;
}

template <typename T>
Buffer<T> poisoned_buffer(int64_t size) {
  Buffer<T> buffer = new_buffer<T>(size);
  for (int64_t i = 0; i < size; ++i) buffer[i] = Element<T>::nearest(std::nan(""));
  return buffer;
}

inline void expect(const std::string& what, bool holds) {
  ++checks;
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

// Sums are made in at least float and rounded to T once. Of normal numbers, the sum of k is about sqrt(k), and rounding
// it is off by 0.29 epsilons of that (one standard deviation): all partial sums of n terms together by 0.2 n epsilons,
// however small the last one is. Twice n is ten of those, or four where the sums wander 2.5 times as far.
template <typename T, typename Want>
void expect_close(const std::string& what, const T* got, const std::vector<Want>& want, double terms) {
  const double epsilon = std::fmin(Element<T>::epsilon, Element<float>::epsilon);
  const double relative = 16 * (std::sqrt(terms) + 1) * epsilon, sums = relative + 2 * terms * epsilon;
  const double tolerance = relative + (sizeof(T) == 2 ? 0.51 * Element<T>::epsilon : 0);
  ++checks;
  for (size_t i = 0; i < want.size(); ++i) {
    const double expected = static_cast<double>(want[i]), error = std::fabs(value(got[i]) - expected);
    if (!(error <= tolerance * std::fabs(expected) + sums)) {
      std::printf("FAILED %s[%zu]: got %.9g, want %.9g\n", what.c_str(), i, value(got[i]), expected);
      ++failures;
      return;
    }
  }
}

// Every test of one kind of kernel.
void test_convolutions(const InstructionSet& set);
void test_channels_last(const InstructionSet& set);
void test_weights(const InstructionSet& set);
void test_optimizer(const InstructionSet& set);
// Which instruction set a transformation takes.
void test_choice_for_weights();
