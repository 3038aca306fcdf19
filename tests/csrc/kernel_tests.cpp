// Every CPU kernel, on every instruction set of this machine, against loops written from the equations in
// csrc/problem.h, in double. Buffers have exactly the size that the problem states and outputs start as NaN,
// so under AddressSanitizer an access outside a tensor, and anywhere an element left unwritten, is caught.
// Exit status 0 when all agree.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace {

using refconv::BFloat16;
using refconv::FoldedAdamProblem;
using refconv::GroupedProblem;
using refconv::Half;
using refconv::RefocusProblem;
using refconv::ThinProblem;

int failures = 0;
int checks = 0;

template <typename T>
using Buffer = std::unique_ptr<T[]>;  // exact allocations: a std::vector may round its capacity up

std::mt19937 generator(0);

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

template <typename T>
Buffer<T> random_buffer(int64_t size) {
  std::normal_distribution<double> normal;
  Buffer<T> buffer(new T[size]);
  for (int64_t i = 0; i < size; ++i) buffer[i] = Element<T>::nearest(normal(generator));
  return buffer;
}

template <typename T>
Buffer<T> poisoned_buffer(int64_t size) {
  Buffer<T> buffer(new T[size]);
  for (int64_t i = 0; i < size; ++i) buffer[i] = Element<T>::nearest(std::nan(""));
  return buffer;
}

// Sums are made in at least float and rounded to T once.
template <typename T>
void expect_close(const std::string& what, const T* got, const std::vector<double>& want, double terms) {
  const double sums = 16 * (std::sqrt(terms) + 1) * std::fmin(Element<T>::epsilon, Element<float>::epsilon);
  const double tolerance = sums + (sizeof(T) == 2 ? 0.51 * Element<T>::epsilon : 0);
  ++checks;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(value(got[i]) - want[i]);
    if (!(error <= tolerance * std::fabs(want[i]) + sums)) {
      std::printf("FAILED %s[%zu]: got %.9g, want %.9g\n", what.c_str(), i, value(got[i]), want[i]);
      ++failures;
      return;
    }
  }
}

// Calls visit(out index, in index, weight index) for every term of the convolution.
template <typename Visit>
void for_each_term(const GroupedProblem& p, const Visit& visit) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t co = 0; co < p.out_channels(); ++co)
      for (int64_t i = 0; i < p.out_h; ++i)
        for (int64_t j = 0; j < p.out_w; ++j)
          for (int64_t a = 0; a < p.kernel_h; ++a)
            for (int64_t b = 0; b < p.kernel_w; ++b) {
              const int64_t h = i * p.stride_h - p.pad_h + a * p.dilation_h;
              const int64_t w = j * p.stride_w - p.pad_w + b * p.dilation_w;
              if (h < 0 || h >= p.in_h || w < 0 || w >= p.in_w) continue;
              for (int64_t m = 0; m < p.per_group; ++m) {
                const int64_t ci = co / p.multiplier * p.per_group + m;
                visit(((n * p.out_channels() + co) * p.out_h + i) * p.out_w + j,
                      ((n * p.channels + ci) * p.in_h + h) * p.in_w + w,
                      ((co * p.per_group + m) * p.kernel_h + a) * p.kernel_w + b);
              }
            }
}

// All results of one problem, in NCHW.
struct Expected {
  std::vector<double> y, y_biased, dx, dw, db;

  template <typename T>
  Expected(const GroupedProblem& p, const T* x, const T* w, const T* bias, const T* grad)
      : y(p.batch * p.out_channels() * p.out_size()),
        dx(p.batch * p.channels * p.in_size()),
        dw(p.out_channels() * p.per_group * p.taps()),
        db(p.out_channels()) {
    for_each_term(p, [&](int64_t o, int64_t i, int64_t t) {
      y[o] += value(w[t]) * value(x[i]);
      dx[i] += value(w[t]) * value(grad[o]);
      dw[t] += value(x[i]) * value(grad[o]);
    });
    y_biased = y;
    for (size_t o = 0; o < y.size(); ++o) {
      const int64_t channel = static_cast<int64_t>(o) / p.out_size() % p.out_channels();
      db[channel] += value(grad[o]);
      y_biased[o] += value(bias[channel]);
    }
  }
};

template <typename T>
void test_grouped(const refconv::cpu::GroupedKernels<T>& kernels, const std::string& isa, const GroupedProblem& p) {
  const int64_t x_size = p.batch * p.channels * p.in_h * p.in_w, w_size = p.out_channels() * p.per_group * p.taps();
  const int64_t y_size = p.batch * p.out_channels() * p.out_h * p.out_w;
  const Buffer<T> x = random_buffer<T>(x_size), w = random_buffer<T>(w_size);
  const Buffer<T> bias = random_buffer<T>(p.out_channels()), dy = random_buffer<T>(y_size);
  const std::string name = isa + Element<T>::name + " K" + std::to_string(p.kernel_h) + "x" +
                           std::to_string(p.kernel_w) + " s" + std::to_string(p.stride_h) + std::to_string(p.stride_w) +
                           " p" + std::to_string(p.pad_h) + std::to_string(p.pad_w) + " d" +
                           std::to_string(p.dilation_h) + std::to_string(p.dilation_w) + " g" +
                           std::to_string(p.per_group) + " m" + std::to_string(p.multiplier) + " " +
                           std::to_string(p.in_h) + "x" + std::to_string(p.in_w);

  const Expected want(p, x.get(), w.get(), bias.get(), dy.get());
  const int64_t out_plane = p.out_size();

  // Split unevenly, as threads would.
  const int64_t planes = p.batch * p.out_channels(), channel_cut = p.channels / 3, plane_cut = planes / 3;
  Buffer<T> y = poisoned_buffer<T>(y_size);
  kernels.forward(p, x.get(), w.get(), bias.get(), y.get(), 0, plane_cut);
  kernels.forward(p, x.get(), w.get(), bias.get(), y.get(), plane_cut, planes);
  expect_close("forward " + name, y.get(), want.y_biased, p.per_group * p.taps());
  y = poisoned_buffer<T>(y_size);
  kernels.forward(p, x.get(), w.get(), nullptr, y.get(), 0, planes);
  expect_close("forward without bias " + name, y.get(), want.y, p.per_group * p.taps());

  for (int wanted = 1; wanted < 8; ++wanted) {  // every combination of outputs
    Buffer<T> dx = poisoned_buffer<T>(x_size), dw = poisoned_buffer<T>(w_size);
    Buffer<T> db = poisoned_buffer<T>(p.out_channels());
    const auto run = [&](int64_t begin, int64_t end) {
      kernels.backward(p, dy.get(), x.get(), w.get(), wanted & 1 ? dx.get() : nullptr, wanted & 2 ? dw.get() : nullptr,
                       wanted & 4 ? db.get() : nullptr, begin, end);
    };
    run(0, channel_cut);
    run(channel_cut, p.channels);
    if (wanted & 1) expect_close("dx " + name, dx.get(), want.dx, p.taps() * p.multiplier);
    if (wanted & 2) expect_close("dW " + name, dw.get(), want.dw, p.batch * out_plane);
    if (wanted & 4) expect_close("dbias " + name, db.get(), want.db, p.batch * out_plane);
  }
}

// `from` [n, c, size] as [n, size, c].
template <typename Container>
void channels_last(const Container& from, int64_t batch, int64_t channels, int64_t size, Container* to) {
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < size; ++k) (*to)[(n * size + k) * channels + c] = from[(n * channels + c) * size + k];
}

template <typename T>
void test_nhwc(const refconv::cpu::GroupedKernels<T>& kernels, const std::string& isa, const GroupedProblem& p) {
  const int64_t x_size = p.batch * p.channels * p.in_size(), y_size = p.batch * p.channels * p.out_size();
  const Buffer<T> x = random_buffer<T>(x_size), w = random_buffer<T>(p.channels * p.taps());
  const Buffer<T> bias = random_buffer<T>(p.channels), dy = random_buffer<T>(y_size);
  const Expected want(p, x.get(), w.get(), bias.get(), dy.get());
  std::vector<double> want_y(y_size), want_dx(x_size);
  Buffer<T> x_last(new T[x_size]), dy_last(new T[y_size]);
  channels_last(want.y_biased, p.batch, p.channels, p.out_size(), &want_y);
  channels_last(want.dx, p.batch, p.channels, p.in_size(), &want_dx);
  channels_last(x, p.batch, p.channels, p.in_size(), &x_last);
  channels_last(dy, p.batch, p.channels, p.out_size(), &dy_last);
  const std::string name = isa + Element<T>::name + " nhwc C" + std::to_string(p.channels) + " K" +
                           std::to_string(p.kernel_h) + "x" + std::to_string(p.kernel_w) + " s" +
                           std::to_string(p.stride_h) + std::to_string(p.stride_w) + " " + std::to_string(p.in_h) +
                           "x" + std::to_string(p.in_w);
  const int64_t out_rows = p.batch * p.out_h, rows = p.batch * p.in_h;
  Buffer<T> got = poisoned_buffer<T>(y_size);
  kernels.nhwc_forward(p, x_last.get(), w.get(), bias.get(), got.get(), 0, out_rows / 3);
  kernels.nhwc_forward(p, x_last.get(), w.get(), bias.get(), got.get(), out_rows / 3, out_rows);
  expect_close("forward " + name, got.get(), want_y, p.taps());

  const int64_t chunks = 3, totals_size = (p.taps() + 1) * p.channels;
  for (const bool wanted : {true, false}) {
    std::vector<double> totals(chunks * totals_size);
    got = poisoned_buffer<T>(x_size);
    for (int64_t k = 0; k < chunks; ++k) {
      double* sums = totals.data() + k * totals_size;
      kernels.nhwc_backward(p, dy_last.get(), x_last.get(), w.get(), wanted ? got.get() : nullptr, sums,
                            rows * k / chunks, rows * (k + 1) / chunks);
      kernels.nhwc_bias(p, dy_last.get(), sums + p.taps() * p.channels, out_rows * k / chunks,
                        out_rows * (k + 1) / chunks);
    }
    Buffer<T> got_dw = poisoned_buffer<T>(p.channels * p.taps()), got_db = poisoned_buffer<T>(p.channels);
    kernels.nhwc_reduce(p, totals.data(), chunks, got_dw.get(), wanted ? got_db.get() : nullptr);
    if (wanted) expect_close("dx " + name, got.get(), want_dx, p.taps());
    expect_close("dW " + name, got_dw.get(), want.dw, p.batch * p.out_size());
    if (wanted) expect_close("dbias " + name, got_db.get(), want.db, p.batch * p.out_size());
  }
}

template <typename T>
void test_refocus(const refconv::cpu::RefocusKernels<T>& kernels, const std::string& isa, const RefocusProblem& p) {
  const int64_t size = p.kernel_size(), length = p.row_length(), k = p.map_size;
  const Buffer<T> basis = random_buffer<T>(p.kernels * size), refocus = random_buffer<T>(p.kernels * length);
  const Buffer<T> grad = random_buffer<T>(p.kernels * size);
  std::vector<double> want_t(p.kernels * size), want_r(p.kernels * length);
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

GroupedProblem depthwise(int64_t channels, int64_t multiplier, int64_t in_h, int64_t in_w, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                         int64_t dilation_h, int64_t dilation_w) {
  GroupedProblem p{2,        channels, multiplier, in_h,  in_w,  0,          0,         kernel_h,
                   kernel_w, stride_h, stride_w,   pad_h, pad_w, dilation_h, dilation_w};
  p.out_h = (in_h + 2 * pad_h - (kernel_h - 1) * dilation_h - 1) / stride_h + 1;
  p.out_w = (in_w + 2 * pad_w - (kernel_w - 1) * dilation_w - 1) / stride_w + 1;
  return p;
}

// The same with `per_group` input channels per group, `groups` groups.
GroupedProblem grouped(int64_t groups, int64_t per_group, GroupedProblem p) {
  p.channels = groups * per_group;
  p.per_group = per_group;
  return p;
}

template <typename T>
void test_grouped_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<T>();
  const std::string isa = set.name;
  // Widths straddle one and two vectors of every instruction set (2 to 16 lanes).
  for (const int64_t width : {1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33}) {
    for (const int64_t kernel : {1, 2, 3, 5, 7}) {
      test_grouped(kernels, isa, depthwise(3, 1, 6, width, kernel, kernel, 1, 1, kernel / 2, kernel / 2, 1, 1));
    }
    for (const int64_t kernel : {3, 5, 7}) {
      test_grouped(kernels, isa, depthwise(2, 1, 9, width, kernel, kernel, 2, 2, kernel / 2, kernel / 2, 1, 1));
    }
    test_grouped(kernels, isa, depthwise(2, 2, 5, width, 3, 3, 1, 1, 1, 1, 1, 1));
    test_grouped(kernels, isa, depthwise(2, 1, 7, width, 3, 5, 2, 1, 0, 4, 2, 2));
  }
  test_grouped(kernels, isa, depthwise(4, 3, 11, 13, 5, 3, 3, 2, 2, 1, 1, 2));
  test_grouped(kernels, isa, depthwise(1, 1, 8, 8, 3, 3, 1, 1, 5, 5, 1, 1));    // more padding than kernel
  test_grouped(kernels, isa, depthwise(1, 1, 3, 3, 2, 2, 5, 5, 0, 0, 1, 1));    // stride beyond the kernel
  test_grouped(kernels, isa, depthwise(1, 2, 13, 14, 4, 6, 4, 6, 1, 2, 6, 4));  // strides and dilations in common
  test_grouped(kernels, isa, depthwise(1, 1, 20, 40, 11, 31, 1, 1, 5, 15, 1, 1));
  test_grouped(kernels, isa, depthwise(1, 1, 40, 20, 3, 3, 1, 3, 4, 4, 4, 4));
  test_grouped(kernels, isa, depthwise(1, 1, 21, 500, 5, 5, 1, 1, 2, 2, 1, 1));  // several strips of a plane
  test_grouped(kernels, isa, depthwise(1, 1, 21, 500, 7, 7, 2, 2, 3, 3, 1, 1));
  test_grouped(kernels, isa, depthwise(1, 2, 31, 200, 3, 3, 3, 3, 1, 1, 1, 1));
  for (const int64_t width : {1, 5, 8, 16, 17, 33}) {
    for (const int64_t kernel : {1, 3, 5}) {
      const int64_t pad = kernel / 2;
      test_grouped(kernels, isa, grouped(2, 2, depthwise(0, 3, 6, width, kernel, kernel, 1, 1, pad, pad, 1, 1)));
      test_grouped(kernels, isa, grouped(3, 3, depthwise(0, 1, 9, width, kernel, kernel, 2, 2, pad, pad, 1, 1)));
    }
  }
  for (const int64_t per_group : {4, 15, 16, 17}) {  // the unrolled kernels hold the weights of 16
    test_grouped(kernels, isa, grouped(2, per_group, depthwise(0, 2, 5, 18, 3, 3, 1, 1, 1, 1, 1, 1)));
  }
  test_grouped(kernels, isa, grouped(2, 3, depthwise(0, 2, 9, 12, 3, 2, 2, 3, 1, 0, 2, 1)));
}

template <typename T>
void test_nhwc_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<T>();
  const std::string isa = set.name;
  for (const int64_t channels : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33}) {  // straddle the vectors
    test_nhwc(kernels, isa, depthwise(channels, 1, 6, 11, 3, 3, 1, 1, 1, 1, 1, 1));
    test_nhwc(kernels, isa, depthwise(channels, 1, 9, 10, 3, 3, 2, 2, 1, 1, 1, 1));
  }
  for (const int64_t width : {1, 3, 4, 5, 7, 8, 9, 16, 17, 27}) {  // straddle the pixels at once
    for (const int64_t kernel : {1, 2, 5, 7}) {
      test_nhwc(kernels, isa, depthwise(5, 1, 6, width, kernel, kernel, 1, 1, kernel / 2, kernel / 2, 1, 1));
      test_nhwc(kernels, isa, depthwise(5, 1, 8, 2 * width, kernel, kernel, 2, 2, kernel / 2, kernel / 2, 1, 1));
    }
    test_nhwc(kernels, isa, depthwise(5, 1, 7, width, 3, 5, 2, 1, 0, 4, 2, 2));
  }
  test_nhwc(kernels, isa, depthwise(4, 1, 11, 13, 5, 3, 3, 2, 2, 1, 1, 2));
  test_nhwc(kernels, isa, depthwise(2, 1, 3, 3, 2, 2, 5, 5, 0, 0, 1, 1));
  test_nhwc(kernels, isa, depthwise(2, 1, 13, 14, 4, 6, 4, 6, 1, 2, 6, 4));
  test_nhwc(kernels, isa, depthwise(3, 1, 20, 40, 11, 31, 1, 1, 5, 15, 1, 1));
  test_nhwc(kernels, isa, depthwise(3, 1, 9, 1100, 3, 3, 1, 1, 1, 1, 1, 1));  // several strips of rows
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
    test_refocus(kernels, isa, RefocusProblem{131, 131, 3, 3, 3, identity});  // more than one block of a row
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

// Outputs large enough to be written around the cache.
void test_large(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<float>();
  test_grouped(kernels, set.name, depthwise(4, 1, 512, 1040, 3, 3, 1, 1, 1, 1, 1, 1));
  test_grouped(kernels, set.name, depthwise(4, 1, 512, 1033, 3, 3, 2, 2, 1, 1, 1, 1));
  test_nhwc(kernels, set.name, depthwise(32, 1, 256, 260, 3, 3, 1, 1, 1, 1, 1, 1));
  test_refocus(set.kernels.refocus<float>(), set.name, RefocusProblem{352, 352, 3, 3, 3, true});
}

}  // namespace

int main() {
  for (const auto* set : refconv::cpu::instruction_sets()) {
    test_grouped_all<float>(*set);
    test_grouped_all<double>(*set);
    test_grouped_all<BFloat16>(*set);
    test_grouped_all<Half>(*set);
    test_nhwc_all<float>(*set);
    test_nhwc_all<double>(*set);
    test_nhwc_all<BFloat16>(*set);
    test_nhwc_all<Half>(*set);
    test_refocus_all<float>(*set);
    test_refocus_all<double>(*set);
    test_thin_all<float>(*set);
    test_thin_all<double>(*set);
    test_thin_all<BFloat16>(*set);
    test_thin_all<Half>(*set);
    test_folded_adam_all<float>(*set);
    test_folded_adam_all<double>(*set);
    test_large(*set);
    std::printf("%s: done\n", set->name);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
