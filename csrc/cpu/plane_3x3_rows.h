// The same as plane_3x3.h where 16 vector registers cannot hold a row in progress: some rows of the output at once,
// more than a vector wide, vector by vector. Forward four rows share what they load of x. Backward the sums of dW take
// nine registers and the weights come from the first cache; two rows of dx and their pixels of x fit beside them, and
// each dy serves up to four products.
#pragma once

#include "plane_3x3.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Where in a row a vector lies. The last one ends with the row, and may overlap the one before.
enum class Place { kFirst, kInside, kLast };
template <Place PLACE>
using At = std::integral_constant<Place, PLACE>;

// Calls run(place, offset) for the vectors of a row, at least two.
template <typename T, typename Run>
REFCONV_INLINE void for_vectors(int64_t width, const Run& run) {
  constexpr int64_t kLane = kLanes<T>;
  run(At<Place::kFirst>{}, 0);
  int64_t j = kLane;
  for (; j < width - kLane; j += kLane) run(At<Place::kInside>{}, j);
  run(At<Place::kLast>{}, width - kLane);
}

// Whether a line of what comes next is fetched at this vector of a row: at one of those that share a line.
template <typename S, Place PLACE>
REFCONV_INLINE bool fetches_line(int64_t width, int64_t j) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  if (PLACE == Place::kLast) return (width - 1) / kLine * kLine >= j;
  return PLACE == Place::kFirst || j % kLine == 0;
}

// A vector of a row, and the pixels left of it and right of it; zero outside the plane.
template <typename S, Place PLACE>
REFCONV_INLINE void load_neighbours(const S* from, Vec<Compute<S>>* v) {
  using T = Compute<S>;
  v[1] = in_register(load(from));
  v[0] = in_register(PLACE == Place::kFirst ? lane_up<T>(v[1], Vec<T>{}) : load(from - 1));
  v[2] = in_register(PLACE == Place::kLast ? lane_down<T>(v[1], Vec<T>{}) : load(from + 1));
}

// The planes of one channel in some images.
template <typename S>
REFCONV_APART void correlate_planes_by_rows(const GroupedProblem& p, const Compute<S>* taps, Compute<S> bias,
                                            const S* first_x, S* first_y, const Images& images) {
  using T = Compute<S>;
  constexpr int kRows = 4;
  const int64_t width = p.in_w;
  Vec<T> w[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(taps[t]);
  for (int64_t image = 0; image < images.count; ++image) {
    const S* x = first_x + image * images.x_step;
    S* y = first_y + image * images.y_step;
    const Ahead ahead = images.ahead_of(image);
    // Some rows of y, and whether x has rows above and below them.
    const auto correlate_rows = [&](auto rows, bool above, bool below) __attribute__((always_inline)) {
      constexpr int kAtOnce = decltype(rows)::value;
      for_vectors<T>(width, [&](auto place, int64_t j) __attribute__((always_inline)) {
        Vec<T> sum[kAtOnce];
#pragma GCC unroll 4
        for (int n = 0; n < kAtOnce; ++n) sum[n] = broadcast(bias);
        const auto meet = [&](int row) __attribute__((always_inline)) {
          Vec<T> v[3];
          load_neighbours<S, place()>(x + row * width + j, v);
#pragma GCC unroll 4
          for (int n = 0; n < kAtOnce; ++n) {
            if (row < n - 1 || row > n + 1) continue;
#pragma GCC unroll 3
            for (int b = 0; b < 3; ++b) sum[n] += w[(row - n + 1) * 3 + b] * v[b];
          }
        };
        if (above) meet(-1);
#pragma GCC unroll 4
        for (int row = 0; row < kAtOnce; ++row) meet(row);
        if (below) meet(kAtOnce);
#pragma GCC unroll 4
        for (int n = 0; n < kAtOnce; ++n) store(y + n * width + j, sum[n]);
        if (fetches_line<S, place()>(width, j)) {
#pragma GCC unroll 4
          for (int n = 0; n < kAtOnce; ++n) {
            __builtin_prefetch(x + n * width + j + ahead.x);
            __builtin_prefetch(y + n * width + j + ahead.y);
          }
        }
      });
    };
    int64_t i = 0;
    for (; i + kRows <= p.in_h; i += kRows, x += kRows * width, y += kRows * width) {
      correlate_rows(std::integral_constant<int, kRows>{}, i > 0, i + kRows < p.in_h);
    }
    if (p.in_h - i == 3) correlate_rows(std::integral_constant<int, 3>{}, i > 0, false);
    if (p.in_h - i == 2) correlate_rows(std::integral_constant<int, 2>{}, i > 0, false);
    if (p.in_h - i == 1) correlate_rows(std::integral_constant<int, 1>{}, i > 0, false);
  }
}

// Terms of dW that are added up in one lane of a register: a sum of sums loses less than one of all terms.
constexpr int64_t kTermsInRegisters = 4096;

// Adds the sums of dW in registers to those in memory, total [9][lanes], and begins anew.
template <typename T>
REFCONV_INLINE void move_sums(Vec<T> (&sum)[9], T* total) {
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    store(total + t * kLanes<T>, load(total + t * kLanes<T>) + sum[t]);
    sum[t] = Vec<T>{};
  }
}

// dx of the planes of one channel in some images, and what they add to the sums of dW, total [9][lanes].
template <typename S>
REFCONV_APART void meet_planes_by_rows(const GroupedProblem& p, const Compute<S>* taps, const S* first_dy,
                                       const S* first_x, S* first_dx, Compute<S>* total, const Images& images) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kRows = 2;
  const int64_t width = p.in_w;
  Vec<T> w[9], sum[9], lane;
  for (int64_t l = 0; l < kLane; ++l) lane[l] = static_cast<T>(l);
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(taps[t]), sum[t] = Vec<T>{};
  int64_t terms = 0;
  // The lanes of a row's last vector that the one before does not have.
  const auto fresh = lane >= broadcast(static_cast<T>((kLane - width % kLane) % kLane));
  for (int64_t image = 0; image < images.count; ++image) {
    const S *dy = first_dy + image * images.y_step, *x = first_x + image * images.x_step;
    S* dx = first_dx + image * images.dx_step;
    const Ahead ahead = images.ahead_of(image);
    // Some rows of dx, and whether dy has rows above and below them.
    const auto meet_rows = [&](auto rows, bool above, bool below) __attribute__((always_inline)) {
      constexpr int kAtOnce = decltype(rows)::value;
      for_vectors<T>(width, [&](auto place, int64_t j) __attribute__((always_inline)) {
        Vec<T> pixel[kAtOnce], to[kAtOnce];
#pragma GCC unroll 2
        for (int n = 0; n < kAtOnce; ++n) {
          const S* from = x + n * width + j;
          pixel[n] = load(from);
          if constexpr (place() == Place::kLast) pixel[n] = fresh ? pixel[n] : Vec<T>{};
          pixel[n] = in_register(pixel[n]), to[n] = Vec<T>{};
        }
        const auto meet = [&](int row) __attribute__((always_inline)) {
          Vec<T> v[3];
          load_neighbours<S, place()>(dy + row * width + j, v);
#pragma GCC unroll 2
          for (int n = 0; n < kAtOnce; ++n) {
            if (row < n - 1 || row > n + 1) continue;
#pragma GCC unroll 3
            for (int b = 0; b < 3; ++b) {
              const int tap = (n - row + 1) * 3 + 2 - b;
              to[n] += w[tap] * v[b], sum[tap] += pixel[n] * v[b];
            }
          }
        };
        if (above) meet(-1);
#pragma GCC unroll 2
        for (int row = 0; row < kAtOnce; ++row) meet(row);
        if (below) meet(kAtOnce);
#pragma GCC unroll 2
        for (int n = 0; n < kAtOnce; ++n) store(dx + n * width + j, to[n]);
        if (fetches_line<S, place()>(width, j)) {
#pragma GCC unroll 2
          for (int n = 0; n < kAtOnce; ++n) {
            const int64_t at = n * width + j;
            __builtin_prefetch(x + at + ahead.x);
            __builtin_prefetch(dy + at + ahead.y);
            __builtin_prefetch(dx + at + ahead.dx);
          }
        }
      });
    };
    int64_t i = 0;
    for (; i + kRows <= p.in_h; i += kRows, dy += kRows * width, x += kRows * width, dx += kRows * width) {
      meet_rows(std::integral_constant<int, kRows>{}, i > 0, i + kRows < p.in_h);
      terms += kRows * width;
      if (terms >= kTermsInRegisters * kLane) move_sums(sum, total), terms = 0;
    }
    if (i < p.in_h) meet_rows(std::integral_constant<int, 1>{}, i > 0, false);
  }
  move_sums(sum, total);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
