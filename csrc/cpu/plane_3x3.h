// A 3x3 depthwise convolution with stride 1 and one pixel of padding on NCHW planes, without a padded copy of them:
// columns as wide as a vector are gone through from top to bottom, weights and sums in registers, and each row is
// loaded three times, a pixel apart.
#pragma once

#include "kernels.h"
#include "plane_columns.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// The pixels left of a row's, the row's, and those right of them; zero outside the plane.
template <typename S, typename C>
inline void load_neighbours(const S* row, const C& column, Vec<Compute<S>>* v) {
  v[1] = column.load_row(row);
  v[0] = column.load_left(row, v[1]), v[2] = column.load_right(row, v[1]);
}

template <typename S, typename C>
REFCONV_INLINE void correlate_column(const GroupedProblem& p, const Compute<S>* weight, const Compute<S>* bias,
                                     const S* x, S* y, C column, bool around, const NextPlane<S, 1>& next) {
  using T = Compute<S>;
  const Vec<T> start = column.bias(bias);
  Vec<T> w[9], sum[3] = {start, start, start};  // of the rows that a row is the last, second and first to meet
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = column.weight(weight, t);
  const auto meet = [&](int64_t i) {
    Vec<T> v[3];
    load_neighbours(x + i * p.in_w, column, v);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) v[b] = in_register(v[b]);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) sum[2 - a] += w[a * 3 + b] * v[b];
    }
    next.fetch(i);
  };
  const auto advance = [&] { sum[0] = sum[1], sum[1] = sum[2], sum[2] = start; };
  meet(0);
  for (int64_t i = 1; i < p.in_h; ++i) {
    advance();
    meet(i);
    column.store_row(y + (i - 1) * p.out_w, sum[0], around);
  }
  column.store_row(y + (p.in_h - 1) * p.out_w, sum[1], around);
}

// dx of one column, and what it adds to the sums of dW, total [9][lanes].
template <typename S, typename C>
REFCONV_INLINE void meet_column(const GroupedProblem& p, const Compute<S>* weight, const S* dy, const S* x, S* dx,
                                Compute<S>* total, C column, bool around, const NextPlane<S, 1>& next) {
  using T = Compute<S>;
  Vec<T> w[9], sum[9], pixel[3] = {}, to[3] = {};  // of the rows of x that a row of dy meets
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = column.weight(weight, t), sum[t] = Vec<T>{};
  const auto load_x = [&](int64_t i) { return column.load_row(x + i * p.in_w); };
  const auto meet = [&](int64_t h) {
    Vec<T> v[3];
    load_neighbours(dy + h * p.out_w, column, v);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) v[b] = in_register(v[b]);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) {
        to[a] += w[a * 3 + b] * v[2 - b];
        sum[a * 3 + b] += pixel[a] * v[2 - b];
      }
    }
    next.fetch(h);
  };
  const auto advance = [&](Vec<T> x_below) {
    pixel[0] = pixel[1], pixel[1] = pixel[2], pixel[2] = x_below;
    to[0] = to[1], to[1] = to[2], to[2] = Vec<T>{};
  };
  pixel[1] = load_x(0);
  if (p.in_h > 1) pixel[2] = load_x(1);
  meet(0);
  for (int64_t h = 1; h < p.in_h; ++h) {
    advance(h + 1 < p.in_h ? load_x(h + 1) : Vec<T>{});
    meet(h);
    column.store_row(dx + (h - 1) * p.in_w, to[0], around);
  }
  column.store_row(dx + (p.in_h - 1) * p.in_w, to[1], around);
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) store(total + t * kLanes<T>, load(total + t * kLanes<T>) + sum[t]);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
