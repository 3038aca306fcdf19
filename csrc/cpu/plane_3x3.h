// A 3x3 depthwise convolution with stride 1 and one pixel of padding on NCHW planes, without a padded copy of them:
// some vectors of each row are gone through from top to bottom, in the order of memory, weights and sums in registers,
// and each vector is loaded three times, a pixel apart.
#pragma once

#include "kernels.h"
#include "plane_columns.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// What is fetched while a row is computed: what lies so many elements further; 0 fetches nothing new.
struct Ahead {
  int64_t x = 0, y = 0, dx = 0;  // y: or dy
};

// The planes of one channel in some images, one after the other: how far they lie from each other, and what is fetched
// meanwhile: `last` from image `last_from` on.
struct Images {
  int64_t count, x_step, y_step, dx_step;  // y: or dy
  Ahead ahead, last;
  int64_t last_from;

  Ahead ahead_of(int64_t image) const { return image < last_from ? ahead : last; }
};

constexpr std::true_type kYes;
constexpr std::false_type kNo;

// The vectors of a row one after the other, each with the pixels left of its own (0), its own (1), and those right of
// them (2); zero outside the plane. Pixels of 16 bits are converted once: two neighbours make what lies between them.
template <typename S, typename C>
struct Neighbours {
  using T = Compute<S>;
  const S* row;
  const C& columns;
  Vec<T> before, next;

  REFCONV_INLINE void load(int j, Vec<T>* v) {
    constexpr bool kOnce = sizeof(S) < sizeof(T);
    const bool first = j == 0, last = j == C::kVectors - 1;
    v[1] = kOnce && !first ? next : in_register(columns.load_row(row, j));
    if (kOnce && !last) next = in_register(columns.load_row(row, j + 1));
    v[0] = in_register(kOnce && !first ? lane_up<T>(v[1], before) : columns.load_left(row, j, v[1]));
    v[2] = in_register(kOnce && !last ? lane_down<T>(v[1], next) : columns.load_right(row, j, v[1]));
    before = v[1];
  }
};

template <typename S, typename C>
REFCONV_APART void correlate_columns(const GroupedProblem& p, const Compute<S>* weight, const Compute<S>* bias,
                                     const S* first_x, S* first_y, const C columns, bool around, const Images& images) {
  using T = Compute<S>;
  constexpr int N = C::kVectors;
  const int64_t width = p.in_w;
  const Vec<T> start = columns.bias(bias);
  Vec<T> w[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = columns.weight(weight, t);
  for (int64_t image = 0; image < images.count; ++image) {
    const S* x = first_x + image * images.x_step;
    S* y = first_y + image * images.y_step;
    const Ahead ahead = images.ahead_of(image);
    Vec<T> above[N], own[N];  // sums of the rows of y above a row of x, and beside it
    const auto meet = [&](auto has_above) {
      Neighbours<S, C> neighbours{x, columns, {}, {}};
#pragma GCC unroll 7
      for (int j = 0; j < N; ++j) {
        Vec<T> v[3], below = start;
        neighbours.load(j, v);
        if constexpr (!has_above) own[j] = start;
#pragma GCC unroll 3
        for (int b = 0; b < 3; ++b) {
          if constexpr (has_above) above[j] += w[6 + b] * v[b];
          own[j] += w[3 + b] * v[b];
          below += w[b] * v[b];
        }
        if constexpr (has_above) columns.store_row(y, j, above[j], around);
        above[j] = own[j], own[j] = below;
        columns.fetch_row(x + ahead.x, j);
        if (__builtin_expect(!around, true)) columns.fetch_row(y + ahead.y, j);
      }
    };
    meet(kNo);
    for (int64_t i = p.in_h - 1; i > 0; --i, y += width) {
      x += width;
      meet(kYes);
    }
#pragma GCC unroll 7
    for (int j = 0; j < N; ++j) columns.store_row(y, j, above[j], around);
  }
}

// dx of some columns, and what they add to the sums of dW, total [9][lanes].
template <typename S, typename C>
REFCONV_APART void meet_columns(const GroupedProblem& p, const Compute<S>* weight, const S* first_dy, const S* first_x,
                                S* first_dx, Compute<S>* total, const C columns, bool around, const Images& images) {
  using T = Compute<S>;
  constexpr int N = C::kVectors;
  constexpr bool kHeld = N <= 2;  // rows of x that are met again stay in registers
  const int64_t width = p.in_w;
  Vec<T> w[9], sum[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = columns.weight(weight, t), sum[t] = Vec<T>{};
  for (int64_t image = 0; image < images.count; ++image) {
    const S *dy = first_dy + image * images.y_step, *x = first_x + image * images.x_step;
    S* dx = first_dx + image * images.dx_step;
    const Ahead ahead = images.ahead_of(image);
    Vec<T> above[N], own[N];  // dx of the rows above a row of dy, and beside it
    Vec<T> pixel_above[N], pixel_own[N];
    const auto meet = [&](auto has_above, auto has_below) {
      Neighbours<S, C> neighbours{dy, columns, {}, {}};
#pragma GCC unroll 7
      for (int j = 0; j < N; ++j) {
        Vec<T> v[3], below = {};
        neighbours.load(j, v);
        if constexpr (has_above) {
          const Vec<T> pixel = kHeld ? pixel_above[j] : in_register(columns.load_row(x - width, j));
#pragma GCC unroll 3
          for (int b = 0; b < 3; ++b) above[j] += w[b] * v[2 - b], sum[b] += pixel * v[2 - b];
          columns.store_row(dx - width, j, above[j], around);
        } else {
          own[j] = Vec<T>{};
        }
        const Vec<T> pixel = kHeld && has_above ? pixel_own[j] : in_register(columns.load_row(x, j));
#pragma GCC unroll 3
        for (int b = 0; b < 3; ++b) own[j] += w[3 + b] * v[2 - b], sum[3 + b] += pixel * v[2 - b];
        if constexpr (has_below) {
          const Vec<T> pixel_below = in_register(columns.load_row(x + width, j));
#pragma GCC unroll 3
          for (int b = 0; b < 3; ++b) below += w[6 + b] * v[2 - b], sum[6 + b] += pixel_below * v[2 - b];
          pixel_above[j] = pixel, pixel_own[j] = pixel_below;
        }
        above[j] = own[j], own[j] = below;
        columns.fetch_row(x + ahead.x, j), columns.fetch_row(dy + ahead.y, j);
        if (__builtin_expect(!around, true)) columns.fetch_row(dx + ahead.dx, j);
      }
      dy += width, x += width, dx += width;
    };
    if (p.in_h == 1) {
      meet(kNo, kNo);
    } else {
      meet(kNo, kYes);
      for (int64_t h = p.in_h - 2; h > 0; --h) meet(kYes, kYes);
      meet(kYes, kNo);
    }
#pragma GCC unroll 7
    for (int j = 0; j < N; ++j) columns.store_row(dx - width, j, above[j], around);
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) store(total + t * kLanes<T>, load(total + t * kLanes<T>) + sum[t]);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
