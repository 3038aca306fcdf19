// The inner loop of the backward on NCHW planes.
#pragma once

#include "elements.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int kMaxTaps = kVectorRegisters == 32 ? 9 : 6;  // of one pass: twice that many registers
constexpr int kMaxTapRows = 3, kMaxTapColumns = 7;

// Some taps of one lattice over some rows of it. Steps lead from one tap to the next in the order of LatticeTaps.
template <typename T>
struct Pass {
  const T* dy;  // what lattice pixel (0, 0) meets at the first tap
  int64_t dy_pitch, dy_row_step, dy_column_step;
  const T* x;
  T* dx;
  int64_t x_pitch, rows, columns;
  const T* weight;
  int64_t weight_row_step, weight_column_step;
  T* total;  // [taps][lanes], in the order of the weights
  bool accumulate;
  bool around;  // dx is written around the cache, which takes rows of whole aligned vectors
};

template <typename T, int ROWS, int COLUMNS>
void run_pass(const Pass<T>& pass) {
  constexpr int kTaps = ROWS * COLUMNS;
  constexpr int64_t kLane = kLanes<T>;
  const Pass<T> q = pass;  // a copy that no store can change
  const auto tap = [&](int n) { return n / COLUMNS * q.weight_row_step + n % COLUMNS * q.weight_column_step; };
  Vec<T> weight[kTaps], total[kTaps];
#pragma GCC unroll 16
  for (int n = 0; n < kTaps; ++n) {
    weight[n] = broadcast(q.weight[tap(n)]);
    total[n] = Vec<T>{};
  }
  const T* dx_end = q.dx + q.rows * q.x_pitch;
  for (int64_t u = 0; u < q.rows; ++u) {
    const T* x_row = q.x + u * q.x_pitch;
    T* dx_row = q.dx + u * q.x_pitch;
    const T* dy_row = q.dy + u * q.dy_pitch;
    const auto meet = [&](int64_t v, Vec<T> x, Vec<T> sum) {
#pragma GCC unroll 16
      for (int n = 0; n < kTaps; ++n) {
        const Vec<T> dy = in_register(load(dy_row + n / COLUMNS * q.dy_row_step + n % COLUMNS * q.dy_column_step + v));
        sum += weight[n] * dy;
        total[n] += x * dy;
      }
      return sum;
    };
    int64_t v = 0;
    for (; v + kLane <= q.columns; v += kLane) {
      const Vec<T> sum = meet(v, load(x_row + v), q.accumulate ? load(dx_row + v) : Vec<T>{});
      if (q.around) {
        store_around_cache(dx_row + v, sum);
      } else {
        store(dx_row + v, sum);
      }
    }
    if (v == q.columns) continue;
    const int64_t left = q.columns - v;
    const Vec<T> x = load_partial(x_row + v, left);
    if (q.accumulate) {
      store_partial(dx_row + v, meet(v, x, load_partial(dx_row + v, left)), left);
    } else {
      store_ahead(dx_row + v, meet(v, x, Vec<T>{}), left, dx_end);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < kTaps; ++n) store(q.total + tap(n) * kLane, load(q.total + tap(n) * kLane) + total[n]);
}

template <typename T>
using RunPass = void (*)(const Pass<T>&);

template <typename T, int ROWS>
RunPass<T> pass_of(int64_t columns) {
  switch (columns) {
    case 1:
      return run_pass<T, ROWS, 1>;
    case 2:
      return run_pass<T, ROWS, 2>;
    case 3:
      return run_pass<T, ROWS, 3>;
    case 4:
      return run_pass<T, ROWS, 4>;
    case 5:
      return run_pass < T, ROWS, ROWS * 5 <= kMaxTaps ? 5 : 1 > ;
    case 6:
      return run_pass < T, ROWS, ROWS * 6 <= kMaxTaps ? 6 : 1 > ;
    default:
      return run_pass < T, ROWS, ROWS == 1 ? 7 : 1 > ;
  }
}

template <typename T>
RunPass<T> pass_of(int64_t rows, int64_t columns) {
  return rows == 1 ? pass_of<T, 1>(columns) : rows == 2 ? pass_of<T, 2>(columns) : pass_of<T, 3>(columns);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
