// The two ways to compute the Refocusing Transformation; refocus.cpp chooses. Tasks are 2-D kernels [begin, end).
#pragma once

#include "../problem.h"

#ifndef REFCONV_ISA
#error "compiled once per instruction set, see CMakeLists.txt"
#endif

namespace refconv::cpu::REFCONV_ISA {

// Of dW_r, from which it is written around the cache: the next reader is the optimizer, after the whole backward.
constexpr int64_t kAroundBytes = 4 << 20;

// Many kernels per refocus group: a matrix product with the unfolded basis.
template <typename S>
void refocus_wide_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                          int64_t end);
template <typename S>
void refocus_wide_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                           int64_t begin, int64_t end);

// Few: each small kernel by itself.
template <typename S>
void refocus_narrow_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                            int64_t end);
template <typename S>
void refocus_narrow_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                             int64_t begin, int64_t end);

}  // namespace refconv::cpu::REFCONV_ISA
