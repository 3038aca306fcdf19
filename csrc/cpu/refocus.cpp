// The Refocusing Transformation and the gradient of its weights.
//
// Equations: csrc/problem.h. As a matrix product per refocus group, with U the unfolded basis
// [group_size * k * k, K_h * K_w]:  W_t = W_b + W_r U  and  dW_r = dW_t U^T.
// Ownership: rows n of W_r (one 2-D kernel each) per task.
// Bytes: forward reads W_r once, backward writes dW_r once; U is rebuilt per thread and stays in cache.
// Accumulation: in T, in vector lanes along the row.
//
// Wide groups (depthwise and groupwise bases) take the product with U^T, kept transposed so that W_r is
// read in whole vectors. Narrow groups (dense bases) correlate each small kernel directly.
#include "entry_points.h"
#include "scratch.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kWideRow = 64;       // entries of W_r per kernel from which the product with U^T pays
constexpr int64_t kColumns = 9;        // columns of U in registers at once: a whole 3 x 3 kernel
constexpr int64_t kRowBlock = 1024;    // entries of W_r per pass: a pair of such row blocks stays in the first cache
constexpr int64_t kRowGroup = 16;      // rows of W_r that use a block of U^T before it leaves the second cache
constexpr int64_t kColumnBlock = 512;  // columns of dW_r per pass over the rows, for the same reason

// U^T of one refocus group: [round_up(K_h * K_w, kColumns), pitch], zero where nothing is defined.
template <typename T>
class Unfolded {
 public:
  explicit Unfolded(const RefocusProblem& p)
      : p_(p),
        pitch_(round_up(p.row_length(), kLanes<T>)),
        columns_(round_up(p.kernel_size(), kColumns)),
        data_(columns_ * pitch_) {}

  // `basis` points at the group's first 2-D kernel.
  void fill(const T* basis) {
    const int64_t k = p_.map_size, half = k / 2;
    for (int64_t h = 0; h < p_.kernel_h; ++h) {
      for (int64_t w = 0; w < p_.kernel_w; ++w) {
        T* column = data_.data() + (h * p_.kernel_w + w) * pitch_;
        for (int64_t j = 0; j < p_.group_size; ++j) {
          const T* kernel = basis + j * p_.kernel_size();
          for (int64_t a = 0; a < k; ++a) {
            const int64_t row = h + a - half;
            if (row < 0 || row >= p_.kernel_h) continue;  // stays zero
            for (int64_t b = 0; b < k; ++b) {
              const int64_t col = w + b - half;
              if (col >= 0 && col < p_.kernel_w) column[(j * k + a) * k + b] = kernel[row * p_.kernel_w + col];
            }
          }
        }
      }
    }
  }

  const T* column(int64_t c) const { return data_.data() + c * pitch_; }
  int64_t columns() const { return columns_; }

 private:
  const RefocusProblem& p_;
  int64_t pitch_, columns_;
  Scratch<T> data_;
};

// acc[r * columns + c] += W_r[r, q0 : q1] . U^T[c, q0 : q1], lane by lane, for ROWS rows of W_r.
template <typename T, int ROWS>
void product_block(const T* refocus, int64_t row_length, const Unfolded<T>& u, int64_t q0, int64_t q1, Vec<T>* acc) {
  for (int64_t c0 = 0; c0 < u.columns(); c0 += kColumns) {
    Vec<T> sums[ROWS][kColumns];
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t c = 0; c < kColumns; ++c) sums[r][c] = acc[r * u.columns() + c0 + c];
    }
    const T* column = u.column(c0);
    const int64_t pitch = u.column(1) - u.column(0);
    for (int64_t q = q0; q < q1; q += kLanes<T>) {
      Vec<T> wr[ROWS];
      for (int r = 0; r < ROWS; ++r) {
        const T* from = refocus + r * row_length + q;
        wr[r] = q + kLanes<T> <= q1 ? load(from) : load_partial(from, q1 - q);
      }
      for (int64_t c = 0; c < kColumns; ++c) {
        const Vec<T> basis = load(column + c * pitch + q);
        for (int r = 0; r < ROWS; ++r) sums[r][c] += wr[r] * basis;
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t c = 0; c < kColumns; ++c) acc[r * u.columns() + c0 + c] = sums[r][c];
    }
  }
}

// `rows` kernels of one refocus group. `acc` has room for kRowGroup of them.
template <typename T>
void wide_forward(const RefocusProblem& p, const Unfolded<T>& u, const T* basis, const T* refocus, T* transformed,
                  int64_t rows, Vec<T>* acc) {
  const int64_t length = p.row_length(), columns = u.columns();
  for (int64_t k = 0; k < rows * columns; ++k) acc[k] = Vec<T>{};
  for (int64_t q = 0; q < length; q += kRowBlock) {
    const int64_t end = q + kRowBlock < length ? q + kRowBlock : length;
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) product_block<T, 2>(refocus + r * length, length, u, q, end, acc + r * columns);
    for (; r < rows; ++r) product_block<T, 1>(refocus + r * length, length, u, q, end, acc + r * columns);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < p.kernel_size(); ++c) {
      const int64_t at = r * p.kernel_size() + c;
      const T start = p.identity ? basis[at] : T(0);
      transformed[at] = static_cast<T>(static_cast<double>(start) + sum<T>(acc[r * columns + c]));
    }
  }
}

// Entries [q0, q1) of ROWS rows of dW_r.
template <typename T, int ROWS>
void wide_backward(const RefocusProblem& p, const Unfolded<T>& u, const T* grad, T* grad_refocus, int64_t q0,
                   int64_t q1) {
  const int64_t length = p.row_length(), size = p.kernel_size();
  for (int64_t q = q0; q < q1; q += kLanes<T>) {
    Vec<T> sums[ROWS] = {};
    for (int64_t c = 0; c < size; ++c) {
      const Vec<T> basis = load(u.column(c) + q);
      for (int r = 0; r < ROWS; ++r) sums[r] += grad[r * size + c] * basis;
    }
    for (int r = 0; r < ROWS; ++r) {
      T* to = grad_refocus + r * length + q;
      if (q + kLanes<T> <= q1) {
        store<T>(to, sums[r]);
      } else {
        store_partial<T>(to, sums[r], q1 - q);
      }
    }
  }
}

// Narrow groups. K, MAP fix both sizes at compile time, so that all loops unroll; 0 reads them from p.
template <typename T, int K, int MAP>
void narrow_forward(const RefocusProblem& p, const T* group_basis, const T* own_basis, const T* refocus,
                    T* transformed) {
  const int64_t kernel_h = K > 0 ? K : p.kernel_h, kernel_w = K > 0 ? K : p.kernel_w;
  const int64_t map = MAP > 0 ? MAP : p.map_size, half = map / 2;
  for (int64_t h = 0; h < kernel_h; ++h) {
    for (int64_t w = 0; w < kernel_w; ++w) {
      T total = p.identity ? own_basis[h * kernel_w + w] : T(0);
      for (int64_t j = 0; j < p.group_size; ++j) {
        const T* kernel = group_basis + j * kernel_h * kernel_w;
        for (int64_t a = 0; a < map; ++a) {
          for (int64_t b = 0; b < map; ++b) {
            const int64_t row = h + a - half, col = w + b - half;
            if (row < 0 || row >= kernel_h || col < 0 || col >= kernel_w) continue;
            total += refocus[(j * map + a) * map + b] * kernel[row * kernel_w + col];
          }
        }
      }
      transformed[h * kernel_w + w] = total;
    }
  }
}

template <typename T, int K, int MAP>
void narrow_backward(const RefocusProblem& p, const T* grad, const T* group_basis, T* grad_refocus) {
  const int64_t kernel_h = K > 0 ? K : p.kernel_h, kernel_w = K > 0 ? K : p.kernel_w;
  const int64_t map = MAP > 0 ? MAP : p.map_size, half = map / 2;
  for (int64_t j = 0; j < p.group_size; ++j) {
    const T* kernel = group_basis + j * kernel_h * kernel_w;
    for (int64_t a = 0; a < map; ++a) {
      for (int64_t b = 0; b < map; ++b) {
        T total = 0;
        for (int64_t h = 0; h < kernel_h; ++h) {
          for (int64_t w = 0; w < kernel_w; ++w) {
            const int64_t row = h + a - half, col = w + b - half;
            if (row < 0 || row >= kernel_h || col < 0 || col >= kernel_w) continue;
            total += grad[h * kernel_w + w] * kernel[row * kernel_w + col];
          }
        }
        grad_refocus[(j * map + a) * map + b] = total;
      }
    }
  }
}

template <typename T>
struct Narrow {
  decltype(&narrow_forward<T, 0, 0>) forward = narrow_forward<T, 0, 0>;
  decltype(&narrow_backward<T, 0, 0>) backward = narrow_backward<T, 0, 0>;
};

template <typename T>
Narrow<T> narrow(const RefocusProblem& p) {
  if (p.kernel_h != p.kernel_w || p.map_size != 3) return {};
  if (p.kernel_h == 3) return {narrow_forward<T, 3, 3>, narrow_backward<T, 3, 3>};
  if (p.kernel_h == 5) return {narrow_forward<T, 5, 3>, narrow_backward<T, 5, 3>};
  if (p.kernel_h == 7) return {narrow_forward<T, 7, 3>, narrow_backward<T, 7, 3>};
  return {};
}

// Calls work(first kernel of the group, first row, last row) for each refocus group that [begin, end) touches.
template <typename Work>
void for_each_group(const RefocusProblem& p, int64_t begin, int64_t end, const Work& work) {
  while (begin < end) {
    const int64_t first = begin / p.group_size * p.group_size;
    const int64_t last = first + p.group_size < end ? first + p.group_size : end;
    work(first, begin, last);
    begin = last;
  }
}

}  // namespace

template <typename T>
void refocus_forward(const RefocusProblem& p, const T* basis, const T* refocus, T* transformed, int64_t begin,
                     int64_t end) {
  const int64_t size = p.kernel_size(), length = p.row_length();
  if (length < kWideRow) {
    const auto run = narrow<T>(p).forward;
    for (int64_t n = begin; n < end; ++n) {
      const T* group_basis = basis + n / p.group_size * p.group_size * size;
      run(p, group_basis, basis + n * size, refocus + n * length, transformed + n * size);
    }
    return;
  }
  Unfolded<T> u(p);
  Scratch<Vec<T>> acc(kRowGroup * u.columns());
  for_each_group(p, begin, end, [&](int64_t first, int64_t n, int64_t last) {
    u.fill(basis + first * size);
    for (; n < last; n += kRowGroup) {
      const int64_t rows = kRowGroup < last - n ? kRowGroup : last - n;
      wide_forward(p, u, basis + n * size, refocus + n * length, transformed + n * size, rows, acc.data());
    }
  });
}

template <typename T>
void refocus_backward(const RefocusProblem& p, const T* grad_transformed, const T* basis, T* grad_refocus,
                      int64_t begin, int64_t end) {
  const int64_t size = p.kernel_size(), length = p.row_length();
  if (length < kWideRow) {
    const auto run = narrow<T>(p).backward;
    for (int64_t n = begin; n < end; ++n) {
      const T* group_basis = basis + n / p.group_size * p.group_size * size;
      run(p, grad_transformed + n * size, group_basis, grad_refocus + n * length);
    }
    return;
  }
  Unfolded<T> u(p);
  for_each_group(p, begin, end, [&](int64_t first, int64_t group_begin, int64_t last) {
    u.fill(basis + first * size);
    for (int64_t q = 0; q < length; q += kColumnBlock) {
      const int64_t q_end = q + kColumnBlock < length ? q + kColumnBlock : length;
      int64_t n = group_begin;
      for (; n + 4 <= last; n += 4) {
        wide_backward<T, 4>(p, u, grad_transformed + n * size, grad_refocus + n * length, q, q_end);
      }
      for (; n < last; ++n) {
        wide_backward<T, 1>(p, u, grad_transformed + n * size, grad_refocus + n * length, q, q_end);
      }
    }
  });
}

REFCONV_INSTANTIATE_REFOCUS(float)
REFCONV_INSTANTIATE_REFOCUS(double)

}  // namespace refconv::cpu::REFCONV_ISA
