// The same as plane_3x3.h for stride 2: lanes are columns of y, and the columns of x are sorted into even and odd ones.
#pragma once

#include "plane_3x3.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Pixels of a row of x that belong to a column of y: the even ones, which its middle taps see, and the odd ones.
template <typename T>
struct Pair {
  Vec<T> even, odd;
};

template <typename S, typename C>
inline Pair<Compute<S>> load_pair(const S* from, int64_t width, const C& column) {
  using T = Compute<S>;
  const Two<T> v = column.load_two(from, width);
  return {permute<T, EvenLanes>(v.first, v.second), permute<T, OddLanes>(v.first, v.second)};
}

template <typename S, typename C>
inline void store_pair(S* to, const Pair<Compute<S>>& pair, int64_t width, const C& column, bool around) {
  using T = Compute<S>;
  const Two<T> v{permute<T, LowerInterleaved>(pair.even, pair.odd), permute<T, UpperInterleaved>(pair.even, pair.odd)};
  column.store_two(to, v, width, around);
}

// x points to column 2 j of the plane where y points to j; `width` is what a row of x has from there.
template <typename S, typename C>
REFCONV_INLINE void correlate_column_by_2(const GroupedProblem& p, const Compute<S>* weight, const Compute<S>* bias,
                                          const S* x, int64_t width, S* y, C column, bool around,
                                          const NextPlane<S, 4>& next) {
  using T = Compute<S>;
  const Vec<T> start = column.bias(bias);
  Vec<T> w[9], sum = start;
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = column.weight(weight, t);
  // The pixels that the taps 0, 1 and 2 of a row see.
  const auto load_row = [&](int64_t i, Vec<T>* v) {
    const S* row = x + i * p.in_w;
    const Pair<T> pair = load_pair(row, width, column);
    v[1] = in_register(pair.even), v[2] = in_register(pair.odd);
    if constexpr (C::kFirst) {
      v[0] = column.load_left(row, pair.odd);
    } else {
      v[0] = load_pair(row - 2, width + 2, column).odd;
    }
    v[0] = in_register(v[0]);
  };
  for (int64_t o = 0; o < p.out_h; ++o) {
    Vec<T> v[3], below = start;
    load_row(2 * o, v);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) sum += w[3 + b] * v[b];
    if (2 * o + 1 < p.in_h) {
      load_row(2 * o + 1, v);
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) sum += w[6 + b] * v[b], below += w[b] * v[b];
    }
    column.store_row(y + o * p.out_w, sum, around);
    sum = below;
    next.fetch(o);
  }
}

template <typename S, typename C>
REFCONV_INLINE void meet_column_by_2(const GroupedProblem& p, const Compute<S>* weight, const S* dy, const S* x,
                                     int64_t width, S* dx, Compute<S>* total, C column, bool around,
                                     const NextPlane<S, 4>& next) {
  using T = Compute<S>;
  Vec<T> w[9], sum[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = column.weight(weight, t), sum[t] = Vec<T>{};
  // What a row of x meets through row a of the taps, g[0] of dy at the pixels and g[1] one further right.
  const auto meet = [&](const Pair<T>& pixel, int a, const Vec<T>* g, Pair<T>* to) {
    to->even += w[a * 3 + 1] * g[0];
    to->odd += w[a * 3 + 2] * g[0] + w[a * 3] * g[1];
    sum[a * 3] += pixel.odd * g[1];
    sum[a * 3 + 1] += pixel.even * g[0];
    sum[a * 3 + 2] += pixel.odd * g[0];
  };
  Pair<T> above{}, above_to{};  // row 2 h - 1 of x, which two rows of dy meet
  for (int64_t h = 0; h < p.out_h; ++h) {
    const S* row = dy + h * p.out_w;
    Vec<T> g[2];
    g[0] = in_register(column.load_row(row));
    g[1] = in_register(column.load_right(row, g[0]));
    if (h > 0) {
      meet(above, 0, g, &above_to);
      store_pair(dx + (2 * h - 1) * p.in_w, above_to, width, column, around);
    }
    Pair<T> to{};
    meet(load_pair(x + 2 * h * p.in_w, width, column), 1, g, &to);
    store_pair(dx + 2 * h * p.in_w, to, width, column, around);
    if (2 * h + 1 < p.in_h) {
      above = load_pair(x + (2 * h + 1) * p.in_w, width, column), above_to = Pair<T>{};
      meet(above, 2, g, &above_to);
    }
    next.fetch(h);
  }
  if (p.in_h % 2 == 0) store_pair(dx + (p.in_h - 1) * p.in_w, above_to, width, column, around);
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) store(total + t * kLanes<T>, load(total + t * kLanes<T>) + sum[t]);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
