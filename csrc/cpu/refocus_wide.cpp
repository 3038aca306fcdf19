// The Refocusing Transformation of wide groups (depthwise and groupwise bases), and the gradient of its weights.
//
// Equations: csrc/problem.h. As a matrix product per refocus group, with U the unfolded basis
// [group_size * k * k, K_h * K_w]:  W_t = W_b + W_r U  and  dW_r = dW_t U^T.
// Ownership: rows n of W_r (one 2-D kernel each) per task.
// Bytes: forward reads W_r once, backward writes dW_r once; U is rebuilt per thread and call, and stays in cache.
// Multiply-adds: K_h * K_w for each entry of W_r, so at K = 3 and 4 bytes both bounds are close to each other.
// Accumulation: in the compute type, lane by lane along the row; the lanes in double.
#include "refocus_wide.h"

#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Kernels of one refocus group, kRowsTogether at most and `left` of them. `sums` has room for as many. A row alone
// takes more columns at once, where there are as many. Returns how many were done.
template <typename S, int COLUMNS, int COLUMNS_OF_ONE = COLUMNS>
int64_t forward_rows(const RefocusProblem& p, const Unfolded<Compute<S>>& u, const S* basis, const S* refocus,
                     S* transformed, int64_t left, Vec<Compute<S>>* sums) {
  using T = Compute<S>;
  constexpr int ROWS = kRows<COLUMNS>;
  const int64_t length = p.row_length(), columns = u.columns(), rows = least(left, kRowsTogether<COLUMNS>);
  for (int64_t k = 0; k < rows * columns; ++k) sums[k] = Vec<T>{};
  // Larger kernels: as many columns as are met at once meet all rows before the next ones, so that a part of them long
  // enough for the loop stays in the first cache.
  const int64_t together = p.kernel_size() > kTaps3x3 ? COLUMNS : columns, block = u.block(together);
  for (int64_t q = 0; q < length; q += block) {
    const int64_t end = least(q + block, length);
    for (int64_t c = 0; c < columns; c += together) {
      int64_t r = 0;
      for (; r + ROWS <= rows; r += ROWS) {
        const S* row = refocus + r * length;
        const S* next = r + 2 * ROWS <= rows ? row + ROWS * length + q : refocus + end;
        product<S, ROWS, COLUMNS>(row, length, u, q, end, c, c + together, next, sums + r * columns);
      }
      for (; r < rows; ++r) {
        const S* row = refocus + r * length;
        product<S, 1, COLUMNS_OF_ONE>(row, length, u, q, end, c, c + together, row + length + q, sums + r * columns);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < p.kernel_size(); ++c) {
      const int64_t at = r * p.kernel_size() + c;
      const T start = p.identity ? load_one(basis + at) : T(0);
      store_one(transformed + at, static_cast<T>(static_cast<double>(start) + sum<T>(sums[r * columns + c])));
    }
  }
  return rows;
}

}  // namespace

template <typename S>
void refocus_wide_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                          int64_t end) {
  using T = Compute<S>;
  constexpr int64_t kMostTogether = most(kRowsTogether<5>, most(kRowsTogether<kColumns7x7>, kRowsTogether<kColumns>));
  const int at_once = columns_at_once(p.kernel_size());
  const int64_t size = p.kernel_size(), length = p.row_length();
  const auto run = at_once == 5             ? forward_rows<S, 5>
                   : at_once == kColumns7x7 ? forward_rows<S, kColumns7x7>
                   : size == kTaps3x3       ? forward_rows<S, kColumns, kTaps3x3>
                                            : forward_rows<S, kColumns>;
  Unfolded<T> u(p);
  Scratch<T> group(p.group_size * size);
  Scratch<Vec<T>> sums(kMostTogether * u.columns());
  for_each_group(p, begin, end, [&](int64_t first, int64_t n, int64_t last) {
    u.fill(computed(basis + first * size, p.group_size * size, group));
    while (n < last) {
      n += run(p, u, basis + n * size, refocus + n * length, transformed + n * size, last - n, sums.data());
    }
  });
}

template <typename S>
void refocus_wide_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                           int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int kHeldRows = kRows<kTaps3x3>;
  constexpr int kSharedRows = kVectorRegisters == 32 ? 8 : 4;
  const int64_t size = p.kernel_size(), length = p.row_length();
  const bool held = kHoldsGradients && size == kTaps3x3;
  const int64_t at_once = held ? kHeldRows : kSharedRows;
  const auto run = held ? backward_rows_held<S, kHeldRows, kTaps3x3> : backward_rows<S, kSharedRows>;
  const auto run_one = held ? backward_rows_held<S, 1, kTaps3x3> : backward_rows<S, 1>;
  Unfolded<T> u(p);
  Scratch<T> group(p.group_size * size), rows(p.group_size * size);
  const int64_t block = round_up(u.block(), 2 * kLanes<T>);
  // The next reader is the optimizer, after the whole backward. Only where rows are made of whole aligned vectors.
  const bool around = sizeof(S) == sizeof(T) && length % kLanes<T> == 0 &&
                      p.kernels * length * static_cast<int64_t>(sizeof(S)) >= kAroundBytes &&
                      reinterpret_cast<uintptr_t>(grad_refocus) % sizeof(Vec<T>) == 0;
  for_each_group(p, begin, end, [&](int64_t first, int64_t group_begin, int64_t last) {
    u.fill(computed(basis + first * size, p.group_size * size, group));
    const T* grad = computed(grad_transformed + group_begin * size, (last - group_begin) * size, rows);
    for (int64_t q = 0; q < length; q += block) {
      const int64_t q_end = least(q + block, length);
      int64_t n = group_begin;
      for (; n + at_once <= last; n += at_once) {
        run(p, u, grad + (n - group_begin) * size, grad_refocus + n * length + q, length, q, q_end, around);
      }
      for (; n < last; ++n) {
        run_one(p, u, grad + (n - group_begin) * size, grad_refocus + n * length + q, length, q, q_end, around);
      }
    }
  });
  if (around) end_streams();
}

#define REFCONV_INSTANTIATE_WIDE(S)                                                                       \
  template void refocus_wide_forward<S>(const RefocusProblem&, const S*, const S*, S*, int64_t, int64_t); \
  template void refocus_wide_backward<S>(const RefocusProblem&, const S*, const S*, S*, int64_t, int64_t);
REFCONV_INSTANTIATE_WIDE(float)
REFCONV_INSTANTIATE_WIDE(double)
REFCONV_INSTANTIATE_WIDE(BFloat16)
REFCONV_INSTANTIATE_WIDE(Half)

}  // namespace refconv::cpu::REFCONV_ISA
