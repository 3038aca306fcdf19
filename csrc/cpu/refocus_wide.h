// The loops of the product of W_r with the unfolded basis, forward and backward, shared by refocus_wide.cpp and
// fused_sgd.cpp.
#pragma once

#include "elements.h"
#include "lanes.h"
#include "refocus.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kBlockBytes = 16384;  // of U per pass: half the first cache
constexpr int64_t kRowGroup = 24;       // rows of W_r that use a block of U before the next one

constexpr int kTaps3x3 = 9;

// Columns of U in registers at once, so that few are wasted: they are padded to a multiple of it.
constexpr int kColumns = kVectorRegisters == 32 ? 9 : 3, kColumns7x7 = kVectorRegisters == 32 ? 7 : 5;
inline int columns_at_once(int64_t kernel_size) {
  return kernel_size == 25 ? 5 : kernel_size == 49 ? kColumns7x7 : kColumns;
}

// Rows beside them: all sums, a vector per row and one of U.
template <int COLUMNS>
constexpr int kRows = (kVectorRegisters - 1) / (COLUMNS + 1);
// kRowGroup rows, or one more where otherwise some would be left over, to be taken one by one.
template <int COLUMNS>
constexpr int64_t kRowsTogether = (kRowGroup + kRows<COLUMNS> - 1) / kRows<COLUMNS> * kRows<COLUMNS>;

// U of one refocus group, in vectors along the rows of W_r:
// entry q, column c lies at [(q / lanes * columns + c) * lanes + q % lanes]; zero where nothing is defined.
template <typename T>
class Unfolded {
 public:
  explicit Unfolded(const RefocusProblem& p)
      : p_(p),
        columns_(round_up(p.kernel_size(), columns_at_once(p.kernel_size()))),
        data_(round_up(p.row_length(), kLanes<T>) * columns_) {}

  // `basis` points at the group's first 2-D kernel.
  void fill(const T* basis) {
    const bool is_3x3 = p_.map_size == 3 && p_.kernel_h == 3 && p_.kernel_w == 3;
    is_3x3 ? fill(basis, 3, 3, 3) : fill(basis, p_.map_size, p_.kernel_h, p_.kernel_w);
  }

  // Entries from q on, a multiple of the lanes.
  const T* at(int64_t q) const { return data_.data() + q * columns_; }
  int64_t columns() const { return columns_; }
  // Entries whose part of U, or of that many columns of it, is kBlockBytes: a multiple of the lanes.
  int64_t block() const { return block(columns_); }
  int64_t block(int64_t columns) const {
    return most(1, kBlockBytes / (columns * kLanes<T> * static_cast<int64_t>(sizeof(T)))) * kLanes<T>;
  }

 private:
  // Inlined, so that no loops are left where the sizes are constants.
  REFCONV_INLINE void fill(const T* basis, int64_t map_size, int64_t kernel_h, int64_t kernel_w) {
    const int64_t half = map_size / 2;
    int64_t q = 0;
    for (int64_t j = 0; j < p_.group_size; ++j) {
      const T* kernel = basis + j * kernel_h * kernel_w;
#pragma GCC unroll 3
      for (int64_t a = 0; a < map_size; ++a) {
#pragma GCC unroll 3
        for (int64_t b = 0; b < map_size; ++b, ++q) {
          T* entry = data_.data() + q / kLanes<T> * columns_ * kLanes<T> + q % kLanes<T>;
          const int64_t top = most(0, half - a), bottom = least(kernel_h, kernel_h + half - a);
          const int64_t left = most(0, half - b), right = least(kernel_w, kernel_w + half - b);
#pragma GCC unroll 3
          for (int64_t h = top; h < bottom; ++h) {
#pragma GCC unroll 3
            for (int64_t w = left; w < right; ++w) {
              entry[(h * kernel_w + w) * kLanes<T>] = kernel[(h + a - half) * kernel_w + w + b - half];
            }
          }
        }
      }
    }
  }

  const RefocusProblem& p_;
  int64_t columns_;
  Scratch<T> data_;
};

// `count` elements as the kernels compute with them: where they are, or converted to `scratch`.
template <typename S>
const Compute<S>* computed(const S* from, int64_t count, Scratch<Compute<S>>& scratch) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return from;
  } else {
    constexpr int64_t kLane = kLanes<Compute<S>>;
    for (int64_t i = 0; i < count; i += kLane)
      store_lanes(scratch.data() + i, load_lanes(from + i, count - i), count - i);
    return scratch.data();
  }
}

// sums[r * columns + c] += W_r[r, q0 : q1] . U[q0 : q1, c], lane by lane, for ROWS rows of W_r and COLUMNS columns from
// c0 on. With FETCH as much of the rows from `next` on is fetched meanwhile.
template <typename S, int ROWS, int COLUMNS, bool FETCH>
void product_of_columns(const S* refocus, int64_t row_length, const Unfolded<Compute<S>>& u, int64_t q0, int64_t q1,
                        int64_t c0, const S* next, Vec<Compute<S>>* sums) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t columns = u.columns();
  Vec<T> sum[ROWS * COLUMNS];
#pragma GCC unroll 32
  for (int n = 0; n < ROWS * COLUMNS; ++n) sum[n] = sums[n / COLUMNS * columns + c0 + n % COLUMNS];
  const T* from = u.at(q0) + c0 * kLane;
  const auto meet = [&](int64_t q, const auto& load_row) {
    Vec<T> row[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      row[r] = in_register(load_row(refocus + r * row_length + q));
      if constexpr (FETCH) prefetch_next(next + r * row_length + q - q0, 1);
    }
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; ++c) {
      const Vec<T> basis = in_register(load(from + c * kLane));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] += row[r] * basis;
    }
    from += columns * kLane;
  };
  int64_t q = q0;
  for (; q + kLane <= q1; q += kLane) meet(q, [](const S* entries) { return load(entries); });
  if (q < q1) meet(q, [&](const S* entries) { return load_lanes(entries, q1 - q); });
#pragma GCC unroll 32
  for (int n = 0; n < ROWS * COLUMNS; ++n) sums[n / COLUMNS * columns + c0 + n % COLUMNS] = sum[n];
}

// The same for the columns from `begin` to `end` - 1, COLUMNS at once. What is fetched is fetched with column 0.
template <typename S, int ROWS, int COLUMNS>
void product(const S* refocus, int64_t row_length, const Unfolded<Compute<S>>& u, int64_t q0, int64_t q1, int64_t begin,
             int64_t end, const S* next, Vec<Compute<S>>* sums) {
  for (int64_t c = begin; c < end; c += COLUMNS) {
    const auto run = c == 0 ? product_of_columns<S, ROWS, COLUMNS, true> : product_of_columns<S, ROWS, COLUMNS, false>;
    run(refocus, row_length, u, q0, q1, c, next, sums);
  }
}

template <typename S>
inline void put(S* to, Vec<Compute<S>> v, int64_t count, bool around) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    if (around) return store_around_cache(to, v);
  }
  store_lanes(to, v, count);
}

// Whether there are registers enough for the gradients of W_t of some rows of 3x3 kernels.
constexpr bool kHoldsGradients = kVectorRegisters == 32;

// Entries [q0, q1) of ROWS rows of dW_r, the gradients of W_t held in registers: for kernels of COLUMNS taps. Row r
// goes to `to` + r * stride.
template <typename S, int ROWS, int COLUMNS>
void backward_rows_held(const RefocusProblem&, const Unfolded<Compute<S>>& u, const Compute<S>* grad, S* to,
                        int64_t stride, int64_t q0, int64_t q1, bool around) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  Vec<T> dwt[ROWS * COLUMNS];
#pragma GCC unroll 32
  for (int n = 0; n < ROWS * COLUMNS; ++n) dwt[n] = broadcast(grad[n]);
  const T* from = u.at(q0);
  for (int64_t q = q0; q < q1; q += kLane, from += COLUMNS * kLane) {
    Vec<T> sum[ROWS] = {};
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; ++c) {
      const Vec<T> basis = in_register(load(from + c * kLane));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r] += dwt[r * COLUMNS + c] * basis;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) put(to + r * stride + q - q0, sum[r], q1 - q, around);
  }
}

// The same for kernels of any size.
template <typename S, int ROWS>
void backward_rows(const RefocusProblem& p, const Unfolded<Compute<S>>& u, const Compute<S>* grad, S* to,
                   int64_t stride, int64_t q0, int64_t q1, bool around) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kVectors = 2;  // that share each gradient of W_t
  const int64_t size = p.kernel_size(), columns = u.columns();
  for (int64_t q = q0; q < q1; q += kVectors * kLane) {
    const T* from = u.at(q);
    const T* second = q + kLane < q1 ? from + columns * kLane : from;
    Vec<T> sum[ROWS * kVectors] = {};
    for (int64_t c = 0; c < size; ++c) {
      const Vec<T> low = in_register(load(from + c * kLane)), high = in_register(load(second + c * kLane));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> dwt = in_register(broadcast(grad[r * size + c]));
        sum[r * kVectors] += dwt * low;
        sum[r * kVectors + 1] += dwt * high;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      S* row = to + r * stride + q - q0;
      put(row, sum[r * kVectors], q1 - q, around);
      if (q + kLane < q1) put(row + kLane, sum[r * kVectors + 1], q1 - q - kLane, around);
    }
  }
}

// Calls work(first kernel of the group, first row, last row) for each refocus group that [begin, end) touches.
template <typename Work>
void for_each_group(const RefocusProblem& p, int64_t begin, int64_t end, const Work& work) {
  while (begin < end) {
    const int64_t first = begin / p.group_size * p.group_size;
    const int64_t last = least(first + p.group_size, end);
    work(first, begin, last);
    begin = last;
  }
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
