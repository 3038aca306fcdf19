// The two ways to compute the Refocusing Transformation; refocus.cpp chooses. Tasks are 2-D kernels [begin, end).
#pragma once

#include "kernels.h"

#ifndef REFCONV_ISA
#error "compiled once per instruction set, see CMakeLists.txt"
#endif

namespace refconv::cpu::REFCONV_ISA {

template <typename S>
int64_t bytes_of(const RefocusProblem& p) {
  return p.kernels * p.row_length() * static_cast<int64_t>(sizeof(S));
}

// Whether W_r and what is as large hardly stay in the caches of a few cores.
template <typename S>
bool is_large(const RefocusProblem& p) {
  return bytes_of<S>(p) >= 4 << 20;
}

// Whether dW_r is written around the cache: the next reader is the optimizer, after the whole backward, so only a last
// cache with room for what is as large holds it until then.
template <typename S>
bool goes_around(const RefocusProblem& p) {
  return is_large<S>(p) && bytes_of<S>(p) >= last_cache_bytes() / 8;
}

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
