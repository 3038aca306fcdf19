// The Refocusing Transformation and the gradient of its weights: which of the two ways.
#include "refocus.h"

#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kWideRow = 64;  // entries of W_r per kernel from which the matrix product pays

bool wide(const RefocusProblem& p) { return p.row_length() >= kWideRow; }

}  // namespace

template <typename T>
void refocus_forward(const RefocusProblem& p, const T* basis, const T* refocus, T* transformed, int64_t begin,
                     int64_t end) {
  const auto run = wide(p) ? refocus_wide_forward<T> : refocus_narrow_forward<T>;
  run(p, basis, refocus, transformed, begin, end);
}

template <typename T>
void refocus_backward(const RefocusProblem& p, const T* grad_transformed, const T* basis, T* grad_refocus,
                      int64_t begin, int64_t end) {
  const auto run = wide(p) ? refocus_wide_backward<T> : refocus_narrow_backward<T>;
  run(p, grad_transformed, basis, grad_refocus, begin, end);
}

REFCONV_INSTANTIATE_REFOCUS(float)
REFCONV_INSTANTIATE_REFOCUS(double)

}  // namespace refconv::cpu::REFCONV_ISA
