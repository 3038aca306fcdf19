// The operators: tensors in, tensors out, over torch's stable ABI.
//
// Schemas and fake kernels are in refconv_kernels/schemas.py, one for all backends; these files implement them
// for the CPU. Callers have validated shapes with messages for people; the checks here only keep a wrong
// call from touching memory that is not its own.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace refconv::bindings {

// convolution.cpp
// A convolution by the sizes of its tensors; throws where they do not fit.
GroupedProblem grouped_problem(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation);
void check_grad_output(const GroupedProblem& p, const Tensor& grad_output, const Tensor& input);
void check_bias(const GroupedProblem& p, const Tensor& bias, const Tensor& input);
// Which kernel runs a problem of these sizes forward, and its instruction set, for people.
std::string grouped_kernel(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                           const Ints& dilation, bool channels_last, int64_t element_bytes);
Tensor grouped_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                      Ints padding, Ints dilation);
// dx, dW and dbias; what is not wanted comes back as an empty tensor.
std::tuple<Tensor, Tensor, Tensor> grouped_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, Ints stride, Ints padding,
                                                           Ints dilation, bool need_input, bool need_weight,
                                                           bool need_bias);

// torch_convolution.cpp: the same by PyTorch.
Tensor torch_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                    Ints padding, Ints dilation);
std::tuple<Tensor, Tensor, Tensor> torch_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                         const Tensor& weight, Ints stride, Ints padding, Ints dilation,
                                                         bool need_input, bool need_weight, bool need_bias);

// weights.cpp
// A transformation by the sizes of its tensors; throws where they do not fit.
RefocusProblem refocus_problem(const Tensor& basis, int64_t group_size, int64_t map_size, bool identity);
Tensor refocus_weight(const Tensor& basis, const Tensor& refocus, bool identity);
Tensor refocus_weight_backward(const Tensor& grad_transformed, const Tensor& basis, int64_t group_size,
                               int64_t map_size);
// The same, in the memory of grad_transformed where dW_r fits into it.
Tensor refocus_weight_backward_over(const Tensor& grad_transformed, const Tensor& basis, int64_t group_size,
                                    int64_t map_size);
Tensor thin_refocus_weight(const Tensor& basis, const Tensor& coordinates, const Tensor& factor, bool identity);
Tensor thin_refocus_weight_backward(const Tensor& grad_transformed, const Tensor& factor);

// layers.cpp: both steps, W_t in the type of the input, the gradients of the parameters in theirs. The convolution is
// ours or, not `own_convolution`, PyTorch's. What is not wanted is empty.
// The output and W_t.
std::tuple<Tensor, Tensor> refconv2d(const Tensor& input, const Tensor& basis, const Tensor& refocus,
                                     const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding,
                                     Ints dilation, bool own_convolution);
// The gradients of the input, of W_t where that of the basis is wanted, of W_r and of the bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> refconv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                              const Tensor& transformed, const Tensor& basis,
                                                              int64_t group_size, int64_t map_size, Ints stride,
                                                              Ints padding, Ints dilation, bool need_input,
                                                              bool need_basis, bool need_refocus, bool need_bias,
                                                              bool own_convolution);
// The thin form. Its backward makes W_t again.
Tensor thin_refconv2d(const Tensor& input, const Tensor& basis, const Tensor& coordinates, const Tensor& factor,
                      const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding, Ints dilation,
                      bool own_convolution);
// The gradients of the input, of W_t, of E and of the bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> thin_refconv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                                   const Tensor& basis, const Tensor& coordinates,
                                                                   const Tensor& factor, bool identity, Ints stride,
                                                                   Ints padding, Ints dilation, bool need_input,
                                                                   bool need_weight, bool need_coordinates,
                                                                   bool need_bias, bool own_convolution);

// optimizer.cpp
// AdamW's direction on W_r in the coordinates of the thin form, and the updated root of the second moment.
std::tuple<Tensor, Tensor> folded_adam(const Tensor& first, const Tensor& root, const Tensor& gradient,
                                       const Tensor& rotation, double keep, double scale_first, double scale_second,
                                       double eps);
// SGD's step on W_r and its momentum (empty if that is 0), in place, and W_t in the place of dW_t (csrc/problem.h).
void fused_sgd(const Tensor& basis, const Tensor& transformed, const Tensor& refocus, const Tensor& momentum_buffer,
               bool identity, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool first);

}  // namespace refconv::bindings
