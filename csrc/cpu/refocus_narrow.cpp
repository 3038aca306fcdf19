// The Refocusing Transformation of narrow groups (dense bases, and few groups), and the gradient of its weights.
//
// Equations: csrc/problem.h. Ownership: 2-D kernels per task. Bytes: forward reads W_b and W_r and writes W_t once,
// backward reads W_b and dW_t and writes dW_r once; for a dense 3 x 3 basis all five have the same size.
// Accumulation: in the compute type, in the order of the taps.
//
// In a group of one kernel, W_t and dW_r are the same sum with their roles exchanged: with B[s][t] the pixel of W_b
// that tap s sees from position t (zero outside), W_t[t] = sum_s W_r[s] B[s][t] and dW_r[s] = sum_t dW_t[t] B[s][t].
// Where a vector holds a whole kernel, B[s] is one permutation of its lanes. Everything else is scalar code.
#include <type_traits>

#include "elements.h"
#include "entry_points.h"
#include "refocus.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// K, MAP fix both sizes at compile time, so that all loops unroll; 0 reads them from p.
template <typename S, int K, int MAP>
void forward_one(const RefocusProblem& p, const S* group_basis, const S* own_basis, const S* refocus, S* transformed) {
  using T = Compute<S>;
  const int64_t kernel_h = K > 0 ? K : p.kernel_h, kernel_w = K > 0 ? K : p.kernel_w;
  const int64_t map = MAP > 0 ? MAP : p.map_size, half = map / 2;
  for (int64_t h = 0; h < kernel_h; ++h) {
    for (int64_t w = 0; w < kernel_w; ++w) {
      T total = p.identity ? load_one(own_basis + h * kernel_w + w) : T(0);
      for (int64_t j = 0; j < p.group_size; ++j) {
        const S* kernel = group_basis + j * kernel_h * kernel_w;
        for (int64_t a = 0; a < map; ++a) {
          for (int64_t b = 0; b < map; ++b) {
            const int64_t row = h + a - half, col = w + b - half;
            if (row < 0 || row >= kernel_h || col < 0 || col >= kernel_w) continue;
            total += load_one(refocus + (j * map + a) * map + b) * load_one(kernel + row * kernel_w + col);
          }
        }
      }
      store_one(transformed + h * kernel_w + w, total);
    }
  }
}

template <typename S, int K, int MAP>
void backward_one(const RefocusProblem& p, const S* grad, const S* group_basis, S* grad_refocus) {
  using T = Compute<S>;
  const int64_t kernel_h = K > 0 ? K : p.kernel_h, kernel_w = K > 0 ? K : p.kernel_w;
  const int64_t map = MAP > 0 ? MAP : p.map_size, half = map / 2;
  for (int64_t j = 0; j < p.group_size; ++j) {
    const S* kernel = group_basis + j * kernel_h * kernel_w;
    for (int64_t a = 0; a < map; ++a) {
      for (int64_t b = 0; b < map; ++b) {
        T total = 0;
        for (int64_t h = 0; h < kernel_h; ++h) {
          for (int64_t w = 0; w < kernel_w; ++w) {
            const int64_t row = h + a - half, col = w + b - half;
            if (row < 0 || row >= kernel_h || col < 0 || col >= kernel_w) continue;
            total += load_one(grad + h * kernel_w + w) * load_one(kernel + row * kernel_w + col);
          }
        }
        store_one(grad_refocus + (j * map + a) * map + b, total);
      }
    }
  }
}

template <typename S>
struct Narrow {
  decltype(&forward_one<S, 0, 0>) forward = forward_one<S, 0, 0>;
  decltype(&backward_one<S, 0, 0>) backward = backward_one<S, 0, 0>;
};

template <typename S>
Narrow<S> narrow(const RefocusProblem& p) {
  if (p.kernel_h != p.kernel_w || p.map_size != 3) return {};
  if (p.kernel_h == 3) return {forward_one<S, 3, 3>, backward_one<S, 3, 3>};
  if (p.kernel_h == 5) return {forward_one<S, 5, 3>, backward_one<S, 5, 3>};
  if (p.kernel_h == 7) return {forward_one<S, 7, 3>, backward_one<S, 7, 3>};
  return {};
}

#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
#define REFCONV_PERMUTES 1

bool one_3x3(const RefocusProblem& p) {
  return p.group_size == 1 && p.kernel_h == 3 && p.kernel_w == 3 && p.map_size == 3;
}

// Both directions of 3 x 3 kernels with 3 x 3 taps: `factors` are W_r or dW_t. `start` is W_b or absent. `around`: the
// result is written around the cache.
void permuted(const float* basis, const float* factors, bool start, float* result, int64_t begin, int64_t end,
              bool around) {
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
  const auto one = [&](int64_t n, __m512 kernel, float* to, const float* to_end) {
    __m512 even = start ? kernel : _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int s = 0; s < kSize; ++s) {
      const __m512 seen = _mm512_permutexvar_ps(lanes[s], kernel), factor = _mm512_set1_ps(factors[n * kSize + s]);
      (s % 2 == 0 ? even : odd) = _mm512_fmadd_ps(factor, seen, s % 2 == 0 ? even : odd);
    }
    store_ahead(to, (Vec<float>)_mm512_add_ps(even, odd), kSize, to_end);
  };
  // Whole vectors are stored in ascending order: what they write behind a kernel is overwritten by the next one.
  const auto some = [&](int64_t first, int64_t last, float* to) {
    const float* to_end = to + (last - first) * kSize;
    for (int64_t n = first; n < last; ++n, to += kSize)
      one(n, (__m512)load_partial(basis + n * kSize, kSize), to, to_end);
  };
  if (!around) return some(begin, end, result + begin * kSize);
  constexpr int64_t kAtOnce = 64;
  alignas(64) float held[kAtOnce * kSize];
  for (int64_t n = begin; n < end; n += kAtOnce) {
    const int64_t count = least(kAtOnce, end - n);
    some(n, n + count, held);
    stream(result + n * kSize, held, count * kSize);
  }
  end_streams();
}

#endif

}  // namespace

template <typename S>
void refocus_narrow_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                            int64_t end) {
#if REFCONV_PERMUTES
  if constexpr (std::is_same_v<S, float>) {
    if (one_3x3(p)) return permuted(basis, refocus, p.identity, transformed, begin, end, false);
  }
#endif
  const auto run = narrow<S>(p).forward;
  const int64_t size = p.kernel_size();
  for (int64_t n = begin; n < end; ++n) {
    const S* group_basis = basis + n / p.group_size * p.group_size * size;
    run(p, group_basis, basis + n * size, refocus + n * p.row_length(), transformed + n * size);
  }
}

template <typename S>
void refocus_narrow_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                             int64_t begin, int64_t end) {
#if REFCONV_PERMUTES
  if constexpr (std::is_same_v<S, float>) {
    if (one_3x3(p)) {
      const bool around = p.kernels * p.row_length() * static_cast<int64_t>(sizeof(float)) >= kAroundBytes;
      return permuted(basis, grad_transformed, false, grad_refocus, begin, end, around);
    }
  }
#endif
  const auto run = narrow<S>(p).backward;
  const int64_t size = p.kernel_size();
  for (int64_t n = begin; n < end; ++n) {
    const S* group_basis = basis + n / p.group_size * p.group_size * size;
    run(p, grad_transformed + n * size, group_basis, grad_refocus + n * p.row_length());
  }
}

#define REFCONV_INSTANTIATE_NARROW(S)                                                                       \
  template void refocus_narrow_forward<S>(const RefocusProblem&, const S*, const S*, S*, int64_t, int64_t); \
  template void refocus_narrow_backward<S>(const RefocusProblem&, const S*, const S*, S*, int64_t, int64_t);
REFCONV_INSTANTIATE_NARROW(float)
REFCONV_INSTANTIATE_NARROW(double)
REFCONV_INSTANTIATE_NARROW(BFloat16)
REFCONV_INSTANTIATE_NARROW(Half)

}  // namespace refconv::cpu::REFCONV_ISA
