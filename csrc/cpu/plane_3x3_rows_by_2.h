// The same as plane_3x3_rows.h for stride 2: lanes are columns of y, and the columns of x are sorted into even and odd
// ones. Sorting within blocks of 16 bytes takes one instruction for each of the two, and leaves the columns in an order
// of its own, in which sums are computed and dy is brought.
#pragma once

#include "plane_3x3_by_2.h"
#include "plane_3x3_rows.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Lane i of a block of two vectors' elements, in blocks of 16 bytes: half of them from each, every second one.
template <typename T, int ODD>
struct SecondInBlocks {
  static constexpr int of(int i, int lanes) {
    constexpr int kBlock = 16 / sizeof(T);
    return i / kBlock * kBlock + i % (kBlock / 2) * 2 + ODD + (i % kBlock < kBlock / 2 ? 0 : lanes);
  }
};
// The reverse: one of the two vectors that were sorted.
template <typename T, int SECOND>
struct MergedInBlocks {
  static constexpr int of(int i, int lanes) {
    constexpr int kBlock = 16 / sizeof(T);
    return i / kBlock * kBlock + SECOND * kBlock / 2 + i % kBlock / 2 + i % 2 * lanes;
  }
};
// From the order of memory to the other one, or back: of two blocks, the inner halves change places; one stays as it
// is.
template <typename T>
struct ExchangedOrder {
  static constexpr int of(int i, int lanes) {
    constexpr int kBlock = 16 / sizeof(T), kHalf = kBlock / 2;
    return i / kBlock * kHalf + i % kHalf + (i % kBlock < kHalf ? 0 : lanes / 2);
  }
};
template <typename T>
Vec<T> exchange_order(Vec<T> v) {
  static_assert(sizeof(v) <= 32);  // with more blocks the way back would be another one
  return permute<T, ExchangedOrder<T>>(v, v);
}

// The vectors of a row of x that belong to one of y; `width` pixels follow.
template <typename S, Place PLACE>
REFCONV_INLINE Pair<Compute<S>> load_sorted(const S* from, int64_t width) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const Vec<T> first = load(from);
  const Vec<T> second = PLACE == Place::kLast ? load_lanes(from + kLane, width - kLane) : load(from + kLane);
  return {in_register(permute<T, SecondInBlocks<T, 0>>(first, second)),
          in_register(permute<T, SecondInBlocks<T, 1>>(first, second))};
}

template <typename S>
REFCONV_APART void correlate_planes_by_rows_by_2(const GroupedProblem& p, const Compute<S>* taps, Compute<S> bias,
                                                 const S* first_x, S* first_y, const Images& images) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kRows = 2;
  const int64_t in_w = p.in_w, out_w = p.out_w;
  Vec<T> w[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(taps[t]);
  for (int64_t image = 0; image < images.count; ++image) {
    const S* x = first_x + image * images.x_step;
    S* y = first_y + image * images.y_step;
    const Ahead ahead = images.ahead_of(image);
    // Some rows of y. `above`, `below`: whether x has the rows before and after those between them.
    const auto correlate_rows = [&](auto rows, bool above, bool below) __attribute__((always_inline)) {
      constexpr int kAtOnce = decltype(rows)::value;
      for_vectors<T>(out_w, [&](auto place, int64_t j) __attribute__((always_inline)) {
        Vec<T> sum[kAtOnce];
#pragma GCC unroll 2
        for (int n = 0; n < kAtOnce; ++n) sum[n] = broadcast(bias);
        const auto meet = [&](int row) __attribute__((always_inline)) {
          const S* from = x + row * in_w + 2 * j;
          const Pair<T> pair = load_sorted<S, place()>(from, in_w - 2 * j);
          Vec<T> left;  // the odd ones, one further left
          if constexpr (place() == Place::kFirst) {
            left = exchange_order<T>(lane_up<T>(exchange_order<T>(pair.odd), Vec<T>{}));
          } else {
            left = permute<T, SecondInBlocks<T, 1>>(load(from - 2), load(from + kLane - 2));
          }
          const Vec<T> v[3] = {in_register(left), pair.even, pair.odd};
#pragma GCC unroll 2
          for (int n = 0; n < kAtOnce; ++n) {
            if (row < 2 * n - 1 || row > 2 * n + 1) continue;
#pragma GCC unroll 3
            for (int b = 0; b < 3; ++b) sum[n] += w[(row - 2 * n + 1) * 3 + b] * v[b];
          }
        };
        if (above) meet(-1);
#pragma GCC unroll 3
        for (int row = 0; row < 2 * kAtOnce - 1; ++row) meet(row);
        if (below) meet(2 * kAtOnce - 1);
#pragma GCC unroll 2
        for (int n = 0; n < kAtOnce; ++n) store(y + n * out_w + j, exchange_order<T>(sum[n]));
        if (fetches_line<S, place()>(out_w, j)) {
#pragma GCC unroll 2
          for (int n = 0; n < kAtOnce; ++n) __builtin_prefetch(y + n * out_w + j + ahead.y);
        }
#pragma GCC unroll 4
        for (int row = 0; row < 2 * kAtOnce; ++row) __builtin_prefetch(x + row * in_w + 2 * j + ahead.x);
      });
    };
    int64_t i = 0;
    for (; i + kRows <= p.out_h; i += kRows, x += 2 * kRows * in_w, y += kRows * out_w) {
      correlate_rows(std::integral_constant<int, kRows>{}, i > 0, 2 * (i + kRows) <= p.in_h);
    }
    if (i < p.out_h) correlate_rows(std::integral_constant<int, 1>{}, i > 0, 2 * (i + 1) <= p.in_h);
  }
}

// A row of dx from its even and odd columns.
template <typename S, Place PLACE>
REFCONV_INLINE void store_merged(S* to, Vec<Compute<S>> even, Vec<Compute<S>> odd, int64_t width) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const Vec<T> first = permute<T, MergedInBlocks<T, 0>>(even, odd),
               second = permute<T, MergedInBlocks<T, 1>>(even, odd);
  store(to, first);
  PLACE == Place::kLast ? store_lanes(to + kLane, second, width - kLane) : store(to + kLane, second);
}

template <typename S>
REFCONV_APART void meet_planes_by_rows_by_2(const GroupedProblem& p, const Compute<S>* taps, const S* first_dy,
                                            const S* first_x, S* first_dx, Compute<S>* total, const Images& images) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t in_w = p.in_w, out_w = p.out_w;
  Vec<T> w[9], sum[9], lane;
  for (int64_t l = 0; l < kLane; ++l) lane[l] = static_cast<T>(l);
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(taps[t]), sum[t] = Vec<T>{};
  int64_t terms = 0;
  // The lanes of a row's last vector that the one before does not have.
  const auto fresh = exchange_order<T>(lane) >= broadcast(static_cast<T>((kLane - out_w % kLane) % kLane));
  for (int64_t image = 0; image < images.count; ++image) {
    const S *dy = first_dy + image * images.y_step, *x = first_x + image * images.x_step;
    S* dx = first_dx + image * images.dx_step;
    const Ahead ahead = images.ahead_of(image);
    // Two rows of x for one of dy; the second one also meets the next of dy.
    for (int64_t i = 0; i < p.out_h; ++i, dy += out_w, x += 2 * in_w, dx += 2 * in_w) {
      const bool both = 2 * i + 1 < p.in_h, below = i + 1 < p.out_h;
      for_vectors<T>(out_w, [&](auto place, int64_t j) __attribute__((always_inline)) {
        const int64_t left = in_w - 2 * j;
        const auto load_dy = [&](const S* row, Vec<T>* v) __attribute__((always_inline)) {
          v[0] = load(row);
          v[1] = place() == Place::kLast ? lane_down<T>(v[0], Vec<T>{}) : load(row + 1);
          v[0] = in_register(exchange_order<T>(v[0])), v[1] = in_register(exchange_order<T>(v[1]));
        };
        const auto load_x = [&](const S* row) __attribute__((always_inline)) {
          Pair<T> pixels = load_sorted<S, place()>(row, left);
          if constexpr (place() == Place::kLast) {
            pixels.even = fresh ? pixels.even : Vec<T>{}, pixels.odd = fresh ? pixels.odd : Vec<T>{};
          }
          return pixels;
        };
        Vec<T> v[2];
        load_dy(dy + j, v);
        const auto meet = [&](int row, auto next) __attribute__((always_inline)) {
          const int64_t at = row * in_w + 2 * j;
          const Pair<T> pixels = load_x(x + at);
          Vec<T> even = {}, odd = {};
          meet_pixels(w + 3 + 3 * row, sum + 3 + 3 * row, pixels.even, pixels.odd, v[0], v[1], even, odd);
          if (next) {
            Vec<T> of_next[2];
            load_dy(dy + out_w + j, of_next);
            meet_pixels(w, sum, pixels.even, pixels.odd, of_next[0], of_next[1], even, odd);
          }
          store_merged<S, place()>(dx + at, even, odd, left);
          __builtin_prefetch(x + at + ahead.x), __builtin_prefetch(dx + at + ahead.dx);
        };
        meet(0, kNo);
        if (both) meet(1, below);
        if (fetches_line<S, place()>(out_w, j)) __builtin_prefetch(dy + j + ahead.y);
      });
      terms += out_w;
      if (terms >= kTermsInRegisters * kLane) move_sums(sum, total), terms = 0;
    }
  }
  move_sums(sum, total);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
