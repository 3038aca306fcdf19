// The kernels of one instruction set: declared here, defined in grouped_*.cpp, turned_planes.cpp, nhwc_*.cpp,
// add_chunks.cpp, refocus.cpp, thin.cpp, folded_adam.cpp and fused_sgd.cpp, collected into a Kernels table by
// table.cpp. All are compiled once per instruction set.
#pragma once

#include "kernels.h"

namespace refconv::cpu::REFCONV_ISA {

template <typename S>
void grouped_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                     int64_t end);

template <typename S>
void grouped_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                      S* grad_bias, int64_t begin, int64_t end);

template <typename S>
void nhwc_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                  int64_t end);

template <typename S>
void nhwc_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                   int64_t chunks, int64_t block, bool need_weight, bool need_bias, int64_t begin, int64_t end);

template <typename S>
void turned_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                    int64_t end);

template <typename S>
void turned_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                     int64_t chunks, bool need_weight, bool need_bias, int64_t begin, int64_t end);

template <typename S>
void add_chunks(const GroupedProblem& p, bool nhwc, const S* grad_y, const S* x, double* totals, int64_t chunks,
                S* grad_weight, S* grad_bias, int64_t begin, int64_t end);

template <typename S>
void refocus_forward(const RefocusProblem& p, const S* basis, const S* refocus, S* transformed, int64_t begin,
                     int64_t end);

template <typename S>
void refocus_backward(const RefocusProblem& p, const S* grad_transformed, const S* basis, S* grad_refocus,
                      int64_t begin, int64_t end);

template <typename S>
void thin_forward(const ThinProblem& p, const S* basis, const S* coordinates, const S* factor, S* transformed,
                  int64_t begin, int64_t end);

template <typename S>
void thin_backward(const ThinProblem& p, const S* grad_transformed, const S* factor, S* grad_coordinates, int64_t begin,
                   int64_t end);

template <typename T>
void folded_adam(const FoldedAdamProblem& p, const T* first, const T* root, const T* gradient, const T* rotation,
                 T* updated, T* direction, int64_t begin, int64_t end);

template <typename T>
void fused_sgd(const FusedSgdProblem& p, const T* basis, T* transformed, T* refocus, T* momentum, int64_t begin,
               int64_t end);

#define REFCONV_INSTANTIATE_GROUPED_FORWARD(S) \
  template void grouped_forward<S>(const GroupedProblem&, const S*, const S*, const S*, S*, int64_t, int64_t);

#define REFCONV_INSTANTIATE_GROUPED_BACKWARD(S) \
  template void grouped_backward<S>(const GroupedProblem&, const S*, const S*, const S*, S*, S*, S*, int64_t, int64_t);

#define REFCONV_INSTANTIATE_NHWC_FORWARD(S) \
  template void nhwc_forward<S>(const GroupedProblem&, const S*, const S*, const S*, S*, int64_t, int64_t);

#define REFCONV_INSTANTIATE_NHWC_BACKWARD(S)                                                                         \
  template void nhwc_backward<S>(const GroupedProblem&, const S*, const S*, const S*, S*, double*, int64_t, int64_t, \
                                 bool, bool, int64_t, int64_t);

#define REFCONV_INSTANTIATE_TURNED(S)                                                                               \
  template void turned_forward<S>(const GroupedProblem&, const S*, const S*, const S*, S*, int64_t, int64_t);       \
  template void turned_backward<S>(const GroupedProblem&, const S*, const S*, const S*, S*, double*, int64_t, bool, \
                                   bool, int64_t, int64_t);

#define REFCONV_INSTANTIATE_ADD_CHUNKS(S)                                                                         \
  template void add_chunks<S>(const GroupedProblem&, bool, const S*, const S*, double*, int64_t, S*, S*, int64_t, \
                              int64_t);

#define REFCONV_INSTANTIATE_REFOCUS(S)                                                               \
  template void refocus_forward<S>(const RefocusProblem&, const S*, const S*, S*, int64_t, int64_t); \
  template void refocus_backward<S>(const RefocusProblem&, const S*, const S*, S*, int64_t, int64_t);

#define REFCONV_INSTANTIATE_THIN(S)                                                                      \
  template void thin_forward<S>(const ThinProblem&, const S*, const S*, const S*, S*, int64_t, int64_t); \
  template void thin_backward<S>(const ThinProblem&, const S*, const S*, S*, int64_t, int64_t);

#define REFCONV_INSTANTIATE_FOLDED_ADAM(T)                                                                        \
  template void folded_adam<T>(const FoldedAdamProblem&, const T*, const T*, const T*, const T*, T*, T*, int64_t, \
                               int64_t);

#define REFCONV_INSTANTIATE_FUSED_SGD(T) \
  template void fused_sgd<T>(const FusedSgdProblem&, const T*, T*, T*, T*, int64_t, int64_t);

}  // namespace refconv::cpu::REFCONV_ISA
