// The same as plane_3x3.h for stride 2: lanes are columns of y, and the columns of x are sorted into even and odd ones.
#pragma once

#include "plane_3x3.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Pixels of a row of x that belong to a vector of y: the even ones, which its middle taps see, and the odd ones.
template <typename T>
struct Pair {
  Vec<T> even, odd;
};

template <typename S>
constexpr bool kIsBFloat16 = std::is_same_v<S, BFloat16>;

template <typename S, typename C>
REFCONV_INLINE Pair<Compute<S>> load_pair(const S* row, int j, int64_t width, const C& columns) {
  using T = Compute<S>;
#ifdef __AVX512VL__
  // The upper halves of floats: a shift away from even pixels, a mask from odd ones.
  if constexpr (kIsBFloat16<S>) {
    const VecBits v = columns.load_paired_two(row, j, width);
    return {(Vec<T>)(v << 16), (Vec<T>)(v & 0xffff0000)};
  }
#endif
  const Two<T> v = columns.load_two(row, j, width);
  return {permute<T, EvenLanes>(v.first, v.second), permute<T, OddLanes>(v.first, v.second)};
}

template <typename S, typename C>
REFCONV_INLINE void store_pair(S* row, int j, const Pair<Compute<S>>& pair, int64_t width, const C& columns,
                               bool around) {
  using T = Compute<S>;
#ifdef __AVX512VL__
  if constexpr (kIsBFloat16<S>) {
    const VecBits v = rounded(pair.even) >> 16 | (rounded(pair.odd) & 0xffff0000);
    return columns.store_paired_two(row, j, v, width);
  }
#endif
  const Two<T> v{permute<T, LowerInterleaved>(pair.even, pair.odd), permute<T, UpperInterleaved>(pair.even, pair.odd)};
  columns.store_two(row, j, v, width, around);
}

// x points to column 2 j of the plane where y points to j; `width` is what a row of x has from there.
template <typename S, typename C>
REFCONV_APART void correlate_columns_by_2(const GroupedProblem& p, const Compute<S>* weight, const Compute<S>* bias,
                                          const S* first_x, int64_t width, S* first_y, const C columns, bool around,
                                          const Images& images) {
  using T = Compute<S>;
  constexpr int N = C::kVectors;
  const Vec<T> start = columns.bias(bias);
  Vec<T> w[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = columns.weight(weight, t);
  // The pixels that the taps 0, 1 and 2 of a row see; `before` are the odd ones of the vector before.
  const auto load_row = [&](const S* row, int j, Vec<T>& before, Vec<T>* v) {
    const Pair<T> pair = load_pair(row, j, width, columns);
    v[1] = in_register(pair.even), v[2] = in_register(pair.odd);
    v[0] = in_register(columns.template behind<T>(pair.odd, before));
    before = v[2];
  };
  // The odd pixels left of all.
  const auto left_of = [&](const S* row) {
    if constexpr (C::kFirst) return Vec<T>{};
    return permute<T, OddLanes>(load(row - 2 * kLanes<T>), load(row - kLanes<T>));
  };
  for (int64_t image = 0; image < images.count; ++image) {
    const S* x = first_x + image * images.x_step;
    S* y = first_y + image * images.y_step;
    const Ahead ahead = images.ahead_of(image);
    Vec<T> sum[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[j] = start;
    // A row of y: two of x, or the last one alone.
    const auto meet = [&](auto both) {
      const S* next = x + p.in_w;
      Vec<T> before = left_of(x), before_next = {};
      if constexpr (both) before_next = left_of(next);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        Vec<T> v[3], below = start;
        load_row(x, j, before, v);
#pragma GCC unroll 3
        for (int b = 0; b < 3; ++b) sum[j] += w[3 + b] * v[b];
        if constexpr (both) {
          load_row(next, j, before_next, v);
#pragma GCC unroll 3
          for (int b = 0; b < 3; ++b) sum[j] += w[6 + b] * v[b], below += w[b] * v[b];
        }
        columns.store_row(y, j, sum[j], around);
        sum[j] = below;
        columns.fetch_two(x + ahead.x, j), columns.fetch_two(next + ahead.x, j);
        if (__builtin_expect(!around, true)) columns.fetch_row(y + ahead.y, j);
      }
      x = next + p.in_w, y += p.out_w;
    };
    for (int64_t o = p.in_h / 2; o > 0; --o) meet(kYes);
    if (p.in_h % 2 != 0) meet(kNo);
  }
}

// What pixels of a row of x meet through a row of taps: dy where they are, and one further right.
template <typename V>
REFCONV_INLINE void meet_pixels(const V* w, V* sum, V even, V odd, V own, V right, V& to_even, V& to_odd) {
  to_even += w[1] * own;
  to_odd += w[2] * own + w[0] * right;
  sum[0] += odd * right;
  sum[1] += even * own;
  sum[2] += odd * own;
}

template <typename S, typename C>
REFCONV_APART void meet_columns_by_2(const GroupedProblem& p, const Compute<S>* weight, const S* first_dy,
                                     const S* first_x, int64_t width, S* first_dx, Compute<S>* total, const C columns,
                                     bool around, const Images& images) {
  using T = Compute<S>;
  constexpr int N = C::kVectors;
  Vec<T> w[9], sum[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = columns.weight(weight, t), sum[t] = Vec<T>{};
  for (int64_t image = 0; image < images.count; ++image) {
    const S *dy = first_dy + image * images.y_step, *x = first_x + image * images.x_step;
    S* dx = first_dx + image * images.dx_step;
    const Ahead ahead = images.ahead_of(image);
    Vec<T> even[N], odd[N], to_even[N], to_odd[N];  // the row of x that lies between two of dy, and its dx
    const auto meet_row = [&](auto has_above, auto has_below) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const Vec<T> own = in_register(columns.load_row(dy, j));
        const Vec<T> right = in_register(columns.load_right(dy, j, own));
        if constexpr (has_above) {
          meet_pixels(w, sum, even[j], odd[j], own, right, to_even[j], to_odd[j]);
          store_pair<S>(dx - p.in_w, j, {to_even[j], to_odd[j]}, width, columns, around);
        }
        const Pair<T> pixels = load_pair(x, j, width, columns);
        Vec<T> middle_even = {}, middle_odd = {};
        meet_pixels(w + 3, sum + 3, pixels.even, pixels.odd, own, right, middle_even, middle_odd);
        store_pair<S>(dx, j, {middle_even, middle_odd}, width, columns, around);
        if constexpr (has_below) {
          const Pair<T> below = load_pair(x + p.in_w, j, width, columns);
          even[j] = below.even, odd[j] = below.odd, to_even[j] = to_odd[j] = Vec<T>{};
          meet_pixels(w + 6, sum + 6, even[j], odd[j], own, right, to_even[j], to_odd[j]);
        }
        columns.fetch_row(dy + ahead.y, j);
        columns.fetch_two(x + ahead.x, j), columns.fetch_two(x + p.in_w + ahead.x, j);
        if (__builtin_expect(!around, true))
          columns.fetch_two(dx + ahead.dx, j), columns.fetch_two(dx + p.in_w + ahead.dx, j);
      }
      dy += p.out_w, x += 2 * p.in_w, dx += 2 * p.in_w;
    };
    if (p.in_h == 1) {
      meet_row(kNo, kNo);
      continue;
    }
    meet_row(kNo, kYes);
    for (int64_t h = p.in_h / 2 - 1; h > 0; --h) meet_row(kYes, kYes);
    if (p.in_h % 2 != 0) {
      meet_row(kYes, kNo);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) store_pair<S>(dx - p.in_w, j, {to_even[j], to_odd[j]}, width, columns, around);
    }
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) store(total + t * kLanes<T>, load(total + t * kLanes<T>) + sum[t]);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
