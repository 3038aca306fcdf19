// The Refocusing Transformation of narrow groups (dense bases, and few groups), and the gradient of its weights.
//
// Equations: csrc/problem.h. Ownership: 2-D kernels per task. Bytes: forward reads W_b and W_r and writes W_t once,
// backward reads W_b and dW_t and writes dW_r once; for a dense 3 x 3 basis all five have the same size.
// Accumulation: in T, in the order of the taps.
//
// In a group of one kernel, W_t and dW_r are the same sum with their roles exchanged: with B[s][t] the pixel of W_b
// that tap s sees from position t (zero outside), W_t[t] = sum_s W_r[s] B[s][t] and dW_r[s] = sum_t dW_t[t] B[s][t].
// Where a vector holds a whole kernel, B[s] is one permutation of its lanes. Everything else is scalar code.
#include "elements.h"
#include "entry_points.h"
#include "refocus.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// K, MAP fix both sizes at compile time, so that all loops unroll; 0 reads them from p.
template <typename T, int K, int MAP>
void forward_one(const RefocusProblem& p, const T* group_basis, const T* own_basis, const T* refocus, T* transformed) {
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
void backward_one(const RefocusProblem& p, const T* grad, const T* group_basis, T* grad_refocus) {
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
  decltype(&forward_one<T, 0, 0>) forward = forward_one<T, 0, 0>;
  decltype(&backward_one<T, 0, 0>) backward = backward_one<T, 0, 0>;
};

template <typename T>
Narrow<T> narrow(const RefocusProblem& p) {
  if (p.kernel_h != p.kernel_w || p.map_size != 3) return {};
  if (p.kernel_h == 3) return {forward_one<T, 3, 3>, backward_one<T, 3, 3>};
  if (p.kernel_h == 5) return {forward_one<T, 5, 3>, backward_one<T, 5, 3>};
  if (p.kernel_h == 7) return {forward_one<T, 7, 3>, backward_one<T, 7, 3>};
  return {};
}

#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
#define REFCONV_PERMUTES 1

bool one_3x3(const RefocusProblem& p) {
  return p.group_size == 1 && p.kernel_h == 3 && p.kernel_w == 3 && p.map_size == 3;
}

// Both directions of 3 x 3 kernels with 3 x 3 taps: `factors` are W_r or dW_t. `start` is W_b or absent.
void permuted(const float* basis, const float* factors, bool start, float* result, int64_t begin, int64_t end) {
  constexpr int64_t kSize = 9, kZeroLane = 15;
  __m512i lanes[kSize];
  for (int64_t s = 0; s < kSize; ++s) {
    int32_t index[16];
    for (int64_t t = 0; t < 16; ++t) {
      const int64_t row = t / 3 + s / 3 - 1, column = t % 3 + s % 3 - 1;
      const bool inside = t < kSize && row >= 0 && row < 3 && column >= 0 && column < 3;
      index[t] = static_cast<int32_t>(inside ? row * 3 + column : kZeroLane);
    }
    lanes[s] = _mm512_loadu_si512(index);
  }
  // Whole vectors are stored in ascending order: what they write behind a kernel is overwritten by the next one.
  const float* result_end = result + end * kSize;
  const auto one = [&](int64_t n, __m512 kernel) {
    __m512 even = start ? kernel : _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int s = 0; s < kSize; ++s) {
      const __m512 seen = _mm512_permutexvar_ps(lanes[s], kernel), factor = _mm512_set1_ps(factors[n * kSize + s]);
      (s % 2 == 0 ? even : odd) = _mm512_fmadd_ps(factor, seen, s % 2 == 0 ? even : odd);
    }
    store_ahead(result + n * kSize, (Vec<float>)_mm512_add_ps(even, odd), kSize, result_end);
  };
  for (int64_t n = begin; n < end; ++n) one(n, (__m512)load_partial(basis + n * kSize, kSize));
}

#endif

}  // namespace

template <typename T>
void refocus_narrow_forward(const RefocusProblem& p, const T* basis, const T* refocus, T* transformed, int64_t begin,
                            int64_t end) {
#if REFCONV_PERMUTES
  if constexpr (sizeof(T) == sizeof(float)) {
    if (one_3x3(p)) return permuted(basis, refocus, p.identity, transformed, begin, end);
  }
#endif
  const auto run = narrow<T>(p).forward;
  const int64_t size = p.kernel_size();
  for (int64_t n = begin; n < end; ++n) {
    const T* group_basis = basis + n / p.group_size * p.group_size * size;
    run(p, group_basis, basis + n * size, refocus + n * p.row_length(), transformed + n * size);
  }
}

template <typename T>
void refocus_narrow_backward(const RefocusProblem& p, const T* grad_transformed, const T* basis, T* grad_refocus,
                             int64_t begin, int64_t end) {
#if REFCONV_PERMUTES
  if constexpr (sizeof(T) == sizeof(float)) {
    if (one_3x3(p)) return permuted(basis, grad_transformed, false, grad_refocus, begin, end);
  }
#endif
  const auto run = narrow<T>(p).backward;
  const int64_t size = p.kernel_size();
  for (int64_t n = begin; n < end; ++n) {
    const T* group_basis = basis + n / p.group_size * p.group_size * size;
    run(p, grad_transformed + n * size, group_basis, grad_refocus + n * p.row_length());
  }
}

#define REFCONV_INSTANTIATE_NARROW(T)                                                                       \
  template void refocus_narrow_forward<T>(const RefocusProblem&, const T*, const T*, T*, int64_t, int64_t); \
  template void refocus_narrow_backward<T>(const RefocusProblem&, const T*, const T*, T*, int64_t, int64_t);
REFCONV_INSTANTIATE_NARROW(float)
REFCONV_INSTANTIATE_NARROW(double)

}  // namespace refconv::cpu::REFCONV_ISA
