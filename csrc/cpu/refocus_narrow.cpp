// The Refocusing Transformation of narrow groups (dense bases, and few groups), and the gradient of its weights.
//
// Equations: csrc/problem.h. Ownership: 2-D kernels per task. Bytes: forward reads W_b and W_r and writes W_t once,
// backward reads W_b and dW_t and writes dW_r once; for a dense 3 x 3 basis all five have the same size.
// Accumulation: in the compute type, in the order of the taps.
//
// Dense 3x3 bases with 3x3 taps have refocus_dense_3x3.h, which may write dW_r where dW_t was; everything else is
// scalar code.
#include "elements.h"
#include "entry_points.h"
#include "kernels.h"
#include "refocus.h"
#include "refocus_dense_3x3.h"

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

}  // namespace

namespace {

template <typename S>
int64_t bytes_of(const RefocusProblem& p) {
  return p.kernels * p.row_length() * static_cast<int64_t>(sizeof(S));
}

// Whether W_r and what is as large hardly stay in a cache.
template <typename S>
bool large(const RefocusProblem& p) {
  return bytes_of<S>(p) >= kAroundBytes;
}

// Whether dW_r of a dense basis is written around the cache: it takes a copy, which a last cache with room for what is
// as large saves.
template <typename S>
bool goes_around(const RefocusProblem& p) {
  return large<S>(p) && bytes_of<S>(p) >= last_cache_bytes() / 8;
}

}  // namespace

template <typename S>
void refocus_narrow_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                            int64_t end) {
  if (is_dense_3x3(p)) {
    const auto run = p.identity ? refocus_dense_3x3<S, true> : refocus_dense_3x3<S, false>;
    return run(basis, refocus, transformed, begin, end, large<S>(p), false);
  }
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
  if (is_dense_3x3(p)) {
    const bool around = goes_around<S>(p) && grad_refocus != grad_transformed;
    return refocus_dense_3x3<S, false>(basis, grad_transformed, grad_refocus, begin, end, large<S>(p), around);
  }
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
