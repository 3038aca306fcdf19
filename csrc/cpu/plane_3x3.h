// A 3x3 depthwise convolution with stride 1 and one pixel of padding on NCHW planes, without a padded copy of them:
// columns as wide as a vector are gone through from top to bottom, weights and sums in registers, and each row is
// loaded three times, a pixel apart.
#pragma once

#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

struct OneLaneUp {  // zero, a0, a1 ...; b is zero
  static constexpr int of(int i, int lanes) { return i == 0 ? lanes : i - 1; }
};
struct OneLaneDown {  // a1, a2, ... zero
  static constexpr int of(int i, int lanes) { return i == lanes - 1 ? lanes : i + 1; }
};

// Of a column of a plane: whether it is the first and the last one, and how wide that one is.
template <bool FIRST, bool LAST>
struct Column {
  static constexpr bool kFirst = FIRST, kLast = LAST;
  int64_t count;
};

// The pixels left of a row's, the row's, and those right of them; zero outside the plane.
template <typename S, typename C>
inline void load_neighbours(const S* row, const C& column, Vec<Compute<S>>* v) {
  using T = Compute<S>;
  v[1] = C::kLast ? load_lanes(row, column.count) : load(row);
  if constexpr (C::kFirst) {
    v[0] = permute<T, OneLaneUp>(v[1], Vec<T>{});
  } else {
    v[0] = C::kLast ? load_lanes(row - 1, column.count) : load(row - 1);
  }
  if constexpr (C::kLast) {
    v[2] = permute<T, OneLaneDown>(v[1], Vec<T>{});
  } else {
    v[2] = load(row + 1);
  }
}

// What is needed for the plane that comes next, if any: so many vectors of each of its maps for every row of a column.
template <typename S>
struct NextPlane {
  struct Map {
    const S* from;
    int64_t vectors;
  };
  Map maps[3];

  void fetch(int64_t row) const {
#pragma GCC unroll 3
    for (const Map& map : maps) {
      for (int64_t v = 0; v < map.vectors; ++v) {
        __builtin_prefetch(map.from + (row * map.vectors + v) * kLanes<Compute<S>>, 0, 2);
      }
    }
  }
  // After a column of so many rows.
  void advance(int64_t rows) {
    for (Map& map : maps) map.from += rows * map.vectors * kLanes<Compute<S>>;
  }
};

template <typename S, typename C>
inline void store_column(S* to, Vec<Compute<S>> v, const C& column, bool around) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    if (around) return store_around_cache(to, v);
  }
  C::kLast ? store_lanes(to, v, column.count) : store(to, v);
}

template <typename S, typename C>
void correlate_column(const GroupedProblem& p, const Compute<S>* weight, Compute<S> bias, const S* x, S* y, C column,
                      bool around, const NextPlane<S>& next) {
  using T = Compute<S>;
  const Vec<T> start = broadcast(bias);
  Vec<T> w[9], sum[3] = {start, start, start};  // of the rows that a row is the last, second and first to meet
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(weight[t]);
  const auto meet = [&](int64_t i) {
    Vec<T> v[3];
    load_neighbours(x + i * p.in_w, column, v);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      const Vec<T> pixel = in_register(v[b]);
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) sum[2 - a] += w[a * 3 + b] * pixel;
    }
    next.fetch(i);
  };
  const auto advance = [&] { sum[0] = sum[1], sum[1] = sum[2], sum[2] = start; };
  meet(0);
  for (int64_t i = 1; i < p.in_h; ++i) {
    advance();
    meet(i);
    store_column(y + (i - 1) * p.out_w, sum[0], column, around);
  }
  store_column(y + (p.in_h - 1) * p.out_w, sum[1], column, around);
}

// dx of one column, and what it adds to the sums of dW, total [9][lanes].
template <typename S, typename C>
void meet_column(const GroupedProblem& p, const Compute<S>* weight, const S* dy, const S* x, S* dx, Compute<S>* total,
                 C column, bool around, const NextPlane<S>& next) {
  using T = Compute<S>;
  Vec<T> w[9], sum[9], pixel[3] = {}, to[3] = {};  // of the rows of x that a row of dy meets
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(weight[t]), sum[t] = Vec<T>{};
  const auto load_x = [&](int64_t i) {
    return C::kLast ? load_lanes(x + i * p.in_w, column.count) : load(x + i * p.in_w);
  };
  const auto meet = [&](int64_t h) {
    Vec<T> v[3];
    load_neighbours(dy + h * p.out_w, column, v);
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      const Vec<T> g = in_register(v[2 - b]);
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) {
        to[a] += w[a * 3 + b] * g;
        sum[a * 3 + b] += pixel[a] * g;
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
    store_column(dx + (h - 1) * p.in_w, to[0], column, around);
  }
  store_column(dx + (p.in_h - 1) * p.in_w, to[1], column, around);
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) store(total + t * kLanes<T>, load(total + t * kLanes<T>) + sum[t]);
}

// Calls run(column, offset) for the columns of a plane, from left to right.
template <typename T, typename Run>
inline void for_columns(int64_t width, const Run& run) {
  constexpr int64_t kLane = kLanes<T>;
  if (width <= kLane) return run(Column<true, true>{width}, 0);
  run(Column<true, false>{kLane}, 0);
  int64_t j = kLane;
  for (; j + kLane < width; j += kLane) run(Column<false, false>{kLane}, j);
  run(Column<false, true>{width - j}, j);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
