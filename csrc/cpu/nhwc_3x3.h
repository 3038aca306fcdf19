// Rows of a 3x3 depthwise convolution on channels_last maps: for one vector of channels along a whole row, the weights
// and the sums stay in registers, and every pixel is loaded once per row of taps.
#pragma once

#include "nhwc.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Rows that are needed next and should be in the second cache by then: outputs too, since what is written has to be
// there as well. A vector for each pixel, in the order of memory; reaching one far from the other one by one is slow.
template <typename S>
struct Ahead {
  const S* from;
  int64_t rows;
  REFCONV_INLINE void fetch(int64_t pixel) const {
    for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(from + (pixel * rows + r) * kLanes<Compute<S>>, 0, 2);
  }
  // After the last pixel of a row, for the next vector of channels.
  void advance(int64_t width) { from += width * rows * kLanes<Compute<S>>; }
};

// OUT rows of y from ROWS rows of x, stride 1; x and y point to the first pixels' vector of channels, `weight` to that
// of the first tap.
template <typename S, int OUT, int ROWS, bool FULL>
void correlate_3x3(const GroupedProblem& p, TapMajor<const Compute<S>> weight, Vec<Compute<S>> start, const S* x, S* y,
                   int64_t count, Maps maps, const Ahead<S>& ahead_x, const Ahead<S>& ahead_y) {
  using T = Compute<S>;
  constexpr int kTapRows = OUT == 1 ? ROWS : 3;
  static_assert(OUT == 1 || ROWS == OUT + 2);
  const int64_t x_pitch = p.in_w * p.channels, y_pitch = p.out_w * p.channels;
  Vec<T> w[kTapRows][3], sum[OUT][3];  // of the outputs that a column is the last, second and first to meet
#pragma GCC unroll 3
  for (int a = 0; a < kTapRows; ++a) {
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) w[a][b] = load(weight.at(a * 3 + b, 0));
  }
#pragma GCC unroll 2
  for (int o = 0; o < OUT; ++o) sum[o][0] = sum[o][1] = sum[o][2] = start;
  const auto next = [&] {
#pragma GCC unroll 2
    for (int o = 0; o < OUT; ++o) sum[o][0] = sum[o][1], sum[o][1] = sum[o][2], sum[o][2] = start;
  };
  const auto write = [&](int64_t j) {
#pragma GCC unroll 2
    for (int o = 0; o < OUT; ++o) {
      store_channels<FULL>(y + o * y_pitch + j * p.channels, sum[o][0], count, maps);
    }
  };
  const auto meet = [&](int64_t column) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> pixel = in_register(load_channels<FULL>(x + r * x_pitch + column * p.channels, count));
#pragma GCC unroll 2
      for (int o = 0; o < OUT; ++o) {
        if (r - o < 0 || r - o >= kTapRows) continue;
        sum[o][0] += w[r - o][2] * pixel;
        sum[o][1] += w[r - o][1] * pixel;
        sum[o][2] += w[r - o][0] * pixel;
      }
    }
    ahead_x.fetch(column);
  };
  int64_t column = 0;
  for (; column < 2 - p.pad_w; ++column, next()) meet(column);
  for (; column < p.in_w; ++column, next()) {
    meet(column);
    write(column + p.pad_w - 2);
    ahead_y.fetch(column);
  }
  if (p.pad_w == 1) write(p.out_w - 1);
}

// The same for one row of y with stride 2.
template <typename S, int ROWS, bool FULL>
void correlate_3x3_by_2(const GroupedProblem& p, TapMajor<const Compute<S>> weight, Vec<Compute<S>> start, const S* x,
                        S* y, int64_t count, Maps maps, const Ahead<S>& ahead_x, const Ahead<S>& ahead_y) {
  using T = Compute<S>;
  Vec<T> w[ROWS][3], sum = start, next = start;  // of this output and the one after it
#pragma GCC unroll 3
  for (int a = 0; a < ROWS; ++a) {
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) w[a][b] = load(weight.at(a * 3 + b, 0));
  }
  const auto pixel = [&](int row, int64_t column) {
    return in_register(load_channels<FULL>(x + (row * p.in_w + column) * p.channels, count));
  };
  if (p.pad_w == 0) {
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) sum += w[r][0] * pixel(r, 0);
  }
  for (int64_t j = 0; j < p.out_w; ++j, sum = next, next = start) {
    const int64_t column = 2 * j - p.pad_w;
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) sum += w[r][1] * pixel(r, column + 1);
    if (column + 2 < p.in_w) {
#pragma GCC unroll 3
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> shared = pixel(r, column + 2);
        sum += w[r][2] * shared;
        next += w[r][0] * shared;
      }
    }
    store_channels<FULL>(y + j * p.channels, sum, count, maps);
    ahead_x.fetch(2 * j), ahead_x.fetch(2 * j + 1), ahead_y.fetch(j);
  }
}

// What is to be fetched during a row of the backward.
template <typename S>
struct BackwardAhead {
  Ahead<S> x, dy, dx;
};

// What ROWS rows of dy and one row of x meet: dx is set, the sums of dW added to `total`. The rows of dy follow one
// another, from that of the row of taps `tap_row` on; each next one belongs to the row of taps STRIDE before.
template <typename S, int STRIDE, int ROWS, bool FULL>
void meet_3x3(const GroupedProblem& p, TapMajor<const Compute<S>> weight, int64_t tap_row, const S* dy, const S* x,
              S* dx, TapMajor<Compute<S>> total, int64_t count, Maps maps, const BackwardAhead<S>& ahead) {
  using T = Compute<S>;
  Vec<T> w[ROWS][3], sum[ROWS][3], pixel[3] = {}, to[3] = {};  // of the three columns of x that a column of dy meets
  const auto tap = [&](int r, int b) { return (tap_row - r * STRIDE) * 3 + b; };
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      w[r][b] = load(weight.at(tap(r, b), 0));
      sum[r][b] = load(total.at(tap(r, b), 0));
    }
  }
  const auto load_x = [&](int64_t column) { return load_channels<FULL>(x + column * p.channels, count); };
  const auto write = [&](int64_t column, Vec<T> v) { store_channels<FULL>(dx + column * p.channels, v, count, maps); };
  // Column j of dy and the columns first to last - 1 of the three of x.
  const auto meet = [&](int64_t j, auto first, auto last) {
    constexpr int kFirst = decltype(first)::value, kLast = decltype(last)::value;
    const int64_t base = j * STRIDE - p.pad_w;
#pragma GCC unroll 3
    for (int b = 3 - STRIDE; b < kLast; ++b) pixel[b] = load_x(base + b);
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> g = in_register(load_channels<FULL>(dy + (r * p.out_w + j) * p.channels, count));
#pragma GCC unroll 3
      for (int b = kFirst; b < kLast; ++b) {
        to[b] += w[r][b] * g;
        sum[r][b] += pixel[b] * g;
      }
    }
#pragma GCC unroll 2
    for (int b = kFirst; b < STRIDE; ++b) write(base + b, to[b]);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      pixel[b] = b + STRIDE < 3 ? pixel[(b + STRIDE) % 3] : Vec<T>{};
      to[b] = b + STRIDE < 3 ? to[(b + STRIDE) % 3] : Vec<T>{};
    }
#pragma GCC unroll 2
    for (int s = 0; s < STRIDE; ++s) ahead.x.fetch(j * STRIDE + s), ahead.dx.fetch(j * STRIDE + s);
    ahead.dy.fetch(j);
  };
  constexpr std::integral_constant<int, 0> zero;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
#pragma GCC unroll 2
  for (int b = 0; b < 3 - STRIDE; ++b) {
    if (b >= p.pad_w) pixel[b] = load_x(b - p.pad_w);
  }
  const int64_t end = (p.out_w - 1) * STRIDE - p.pad_w + 3;  // behind the last column that is met; one too far at most
  int64_t j = 0;
  if (p.pad_w == 1 && p.out_w == 1 && end > p.in_w) {
    meet(j++, one, two);
  } else if (p.pad_w == 1) {
    meet(j++, one, three);
  }
  for (const int64_t inside = end > p.in_w ? p.out_w - 1 : p.out_w; j < inside; ++j) meet(j, zero, three);
  if (j < p.out_w) meet(j, zero, two);
  int64_t column = end - 3 + STRIDE;
#pragma GCC unroll 2
  for (int b = 0; b < 3 - STRIDE; ++b, ++column) {
    if (column < p.in_w) write(column, to[b]);
  }
  for (; column < p.in_w; ++column) write(column, Vec<T>{});
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) store(total.at(tap(r, b), 0), sum[r][b]);
  }
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
