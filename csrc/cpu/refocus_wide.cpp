// The Refocusing Transformation of wide groups (depthwise and groupwise bases), and the gradient of its weights.
//
// Equations: csrc/problem.h. As a matrix product per refocus group, with U the unfolded basis
// [group_size * k * k, K_h * K_w]:  W_t = W_b + W_r U  and  dW_r = dW_t U^T.
// Ownership: rows n of W_r (one 2-D kernel each) per task.
// Bytes: forward reads W_r once, backward writes dW_r once; U is rebuilt per thread and call, and stays in cache.
// Multiply-adds: K_h * K_w for each entry of W_r, so at K = 3 and 4 bytes both bounds are close to each other.
// Accumulation: in the compute type, lane by lane along the row; the lanes in double.
#include "elements.h"
#include "entry_points.h"
#include "refocus.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kBlockBytes = 16384;  // of U per pass: half the first cache
constexpr int64_t kRowGroup = 24;       // rows of W_r that use a block of U before the next one

// Columns of U in registers at once, so that few are wasted: they are padded to a multiple of it.
constexpr int kWidest = 9;
inline int columns_at_once(int64_t kernel_size) { return kernel_size == 25 ? 5 : kernel_size == 49 ? 7 : kWidest; }

// Rows beside them: all sums, a vector per row and one of U.
template <int COLUMNS>
constexpr int kRows = (kVectorRegisters - 2) / (COLUMNS + 1) > 1 ? (kVectorRegisters - 2) / (COLUMNS + 1) : 1;

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
    const int64_t k = p_.map_size, half = k / 2;
    int64_t q = 0;
    for (int64_t j = 0; j < p_.group_size; ++j) {
      const T* kernel = basis + j * p_.kernel_size();
      for (int64_t a = 0; a < k; ++a) {
        for (int64_t b = 0; b < k; ++b, ++q) {
          T* entry = data_.data() + q / kLanes<T> * columns_ * kLanes<T> + q % kLanes<T>;
          const int64_t top = most(0, half - a), bottom = least(p_.kernel_h, p_.kernel_h + half - a);
          const int64_t left = most(0, half - b), right = least(p_.kernel_w, p_.kernel_w + half - b);
          for (int64_t h = top; h < bottom; ++h) {
            for (int64_t w = left; w < right; ++w) {
              entry[(h * p_.kernel_w + w) * kLanes<T>] = kernel[(h + a - half) * p_.kernel_w + w + b - half];
            }
          }
        }
      }
    }
  }

  // Entries from q on, a multiple of the lanes.
  const T* at(int64_t q) const { return data_.data() + q * columns_; }
  int64_t columns() const { return columns_; }
  // Entries whose part of U is kBlockBytes, a multiple of the lanes.
  int64_t block() const {
    return most(1, kBlockBytes / (columns_ * kLanes<T> * static_cast<int64_t>(sizeof(T)))) * kLanes<T>;
  }

 private:
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

// sums[r * columns + c] += W_r[r, q0 : q1] . U[q0 : q1, c], lane by lane, for ROWS rows of W_r and all columns. Fetches
// as much of the rows from `next` on meanwhile.
template <typename S, int ROWS, int COLUMNS>
void product(const S* refocus, int64_t row_length, const Unfolded<Compute<S>>& u, int64_t q0, int64_t q1, const S* next,
             Vec<Compute<S>>* sums) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t columns = u.columns();
  for (int64_t c0 = 0; c0 < columns; c0 += COLUMNS) {
    Vec<T> sum[ROWS * COLUMNS];
#pragma GCC unroll 32
    for (int n = 0; n < ROWS * COLUMNS; ++n) sum[n] = sums[n / COLUMNS * columns + c0 + n % COLUMNS];
    const T* from = u.at(q0) + c0 * kLane;
    for (int64_t q = q0; q < q1; q += kLane, from += columns * kLane) {
      Vec<T> row[ROWS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const S* entries = refocus + r * row_length + q;
        row[r] = in_register(load_lanes(entries, q1 - q));
        if (c0 == 0) __builtin_prefetch(next + r * row_length + q - q0, 0, 2);
      }
#pragma GCC unroll 16
      for (int c = 0; c < COLUMNS; ++c) {
        const Vec<T> basis = in_register(load(from + c * kLane));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sum[r * COLUMNS + c] += row[r] * basis;
      }
    }
#pragma GCC unroll 32
    for (int n = 0; n < ROWS * COLUMNS; ++n) sums[n / COLUMNS * columns + c0 + n % COLUMNS] = sum[n];
  }
}

// `rows` kernels of one refocus group. `sums` has room for kRowGroup of them.
template <typename S, int COLUMNS>
void forward_rows(const RefocusProblem& p, const Unfolded<Compute<S>>& u, const S* basis, const S* refocus,
                  S* transformed, int64_t rows, Vec<Compute<S>>* sums) {
  using T = Compute<S>;
  constexpr int ROWS = kRows<COLUMNS>;
  const int64_t length = p.row_length(), columns = u.columns();
  for (int64_t k = 0; k < rows * columns; ++k) sums[k] = Vec<T>{};
  for (int64_t q = 0; q < length; q += u.block()) {
    const int64_t end = least(q + u.block(), length);
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) {
      const S* row = refocus + r * length;
      const S* next = r + 2 * ROWS <= rows ? row + ROWS * length + q : refocus + end;
      product<S, ROWS, COLUMNS>(row, length, u, q, end, next, sums + r * columns);
    }
    for (; r < rows; ++r) {
      const S* row = refocus + r * length;
      product<S, 1, COLUMNS>(row, length, u, q, end, row + length + q, sums + r * columns);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < p.kernel_size(); ++c) {
      const int64_t at = r * p.kernel_size() + c;
      const T start = p.identity ? load_one(basis + at) : T(0);
      store_one(transformed + at, static_cast<T>(static_cast<double>(start) + sum<T>(sums[r * columns + c])));
    }
  }
}

template <typename S>
inline void put(S* to, Vec<Compute<S>> v, int64_t count, bool around) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    if (around) return store_around_cache(to, v);
  }
  store_lanes(to, v, count);
}

// Entries [q0, q1) of ROWS rows of dW_r, the gradients of W_t held in registers: for kernels of COLUMNS taps.
template <typename S, int ROWS, int COLUMNS>
void backward_rows_held(const RefocusProblem& p, const Unfolded<Compute<S>>& u, const Compute<S>* grad, S* grad_refocus,
                        int64_t q0, int64_t q1, bool around) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t length = p.row_length();
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
    for (int r = 0; r < ROWS; ++r) put(grad_refocus + r * length + q, sum[r], q1 - q, around);
  }
}

// The same for kernels of any size.
template <typename S, int ROWS>
void backward_rows(const RefocusProblem& p, const Unfolded<Compute<S>>& u, const Compute<S>* grad, S* grad_refocus,
                   int64_t q0, int64_t q1, bool around) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kVectors = 2;  // that share each gradient of W_t
  const int64_t length = p.row_length(), size = p.kernel_size(), columns = u.columns();
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
      S* to = grad_refocus + r * length + q;
      put(to, sum[r * kVectors], q1 - q, around);
      if (q + kLane < q1) put(to + kLane, sum[r * kVectors + 1], q1 - q - kLane, around);
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

template <typename S>
void refocus_wide_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                          int64_t end) {
  using T = Compute<S>;
  const int at_once = columns_at_once(p.kernel_size());
  const auto run = at_once == 5 ? forward_rows<S, 5> : at_once == 7 ? forward_rows<S, 7> : forward_rows<S, kWidest>;
  const int64_t size = p.kernel_size(), length = p.row_length();
  Unfolded<T> u(p);
  Scratch<T> group(p.group_size * size);
  Scratch<Vec<T>> sums(kRowGroup * u.columns());
  for_each_group(p, begin, end, [&](int64_t first, int64_t n, int64_t last) {
    u.fill(computed(basis + first * size, p.group_size * size, group));
    for (; n < last; n += kRowGroup) {
      const int64_t rows = least(kRowGroup, last - n);
      run(p, u, basis + n * size, refocus + n * length, transformed + n * size, rows, sums.data());
    }
  });
}

template <typename S>
void refocus_wide_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                           int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int kHeldRows = kRows<kWidest>;
  constexpr int kSharedRows = kVectorRegisters == 32 ? 8 : 4;
  const int64_t size = p.kernel_size(), length = p.row_length();
  const bool held = size == kWidest;
  const int64_t at_once = held ? kHeldRows : kSharedRows;
  const auto run = held ? backward_rows_held<S, kHeldRows, kWidest> : backward_rows<S, kSharedRows>;
  const auto run_one = held ? backward_rows_held<S, 1, kWidest> : backward_rows<S, 1>;
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
        run(p, u, grad + (n - group_begin) * size, grad_refocus + n * length, q, q_end, around);
      }
      for (; n < last; ++n) {
        run_one(p, u, grad + (n - group_begin) * size, grad_refocus + n * length, q, q_end, around);
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
