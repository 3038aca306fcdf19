// The Refocusing Transformation and the gradient of its weights: which of the two ways.
#include "refocus.h"

#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kWideRow = 64;  // entries of W_r per kernel from which the matrix product pays

bool wide(const RefocusProblem& p) { return p.row_length() >= kWideRow; }

}  // namespace

template <typename S>
void refocus_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                     int64_t end) {
  const auto run = wide(p) ? refocus_wide_forward<S> : refocus_narrow_forward<S>;
  run(p, basis, refocus, transformed, begin, end);
}

template <typename S>
void refocus_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                      int64_t begin, int64_t end) {
  const auto run = wide(p) ? refocus_wide_backward<S> : refocus_narrow_backward<S>;
  run(p, grad_transformed, basis, grad_refocus, begin, end);
}

REFCONV_INSTANTIATE_REFOCUS(float)
REFCONV_INSTANTIATE_REFOCUS(double)
REFCONV_INSTANTIATE_REFOCUS(BFloat16)
REFCONV_INSTANTIATE_REFOCUS(Half)

}  // namespace refconv::cpu::REFCONV_ISA
