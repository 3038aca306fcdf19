// The kernels of one instruction set: declared here, defined in depthwise.cpp and refocus.cpp, collected
// into a Kernels table by table.cpp. All three are compiled once per instruction set.
#pragma once

#include "kernels.h"

namespace refconv::cpu::REFCONV_ISA {

template <typename T>
void depthwise_forward(const DepthwiseProblem& p, const T* x, const T* weight, const T* bias, T* y, int64_t begin,
                       int64_t end);

template <typename T>
void depthwise_backward(const DepthwiseProblem& p, const T* grad_y, const T* x, const T* weight, T* grad_x,
                        T* grad_weight, T* grad_bias, int64_t begin, int64_t end);

template <typename T>
void refocus_forward(const RefocusProblem& p, const T* basis, const T* refocus, T* transformed, int64_t begin,
                     int64_t end);

template <typename T>
void refocus_backward(const RefocusProblem& p, const T* grad_transformed, const T* basis, T* grad_refocus,
                      int64_t begin, int64_t end);

#define REFCONV_INSTANTIATE_DEPTHWISE(T)                                                                           \
  template void depthwise_forward<T>(const DepthwiseProblem&, const T*, const T*, const T*, T*, int64_t, int64_t); \
  template void depthwise_backward<T>(const DepthwiseProblem&, const T*, const T*, const T*, T*, T*, T*, int64_t,  \
                                      int64_t);

#define REFCONV_INSTANTIATE_REFOCUS(T)                                                               \
  template void refocus_forward<T>(const RefocusProblem&, const T*, const T*, T*, int64_t, int64_t); \
  template void refocus_backward<T>(const RefocusProblem&, const T*, const T*, T*, int64_t, int64_t);

}  // namespace refconv::cpu::REFCONV_ISA
