// Depthwise convolution of small NCHW planes, turned to channels_last: called by the kernels for planes.
#pragma once

#include "kernels.h"

namespace refconv::cpu::REFCONV_ISA {

// For problems that has_turned_planes(). Tasks as of GroupedKernels.
template <typename S>
void turned_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                    int64_t end);
template <typename S>
void turned_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                     S* grad_bias, int64_t begin, int64_t end);

}  // namespace refconv::cpu::REFCONV_ISA
