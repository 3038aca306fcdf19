// Both steps of a layer in one operator, and the registration of all operators.
#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace refconv::bindings {
namespace {

// Both steps of a RefConv: the output and W_t.
std::tuple<Tensor, Tensor> refconv2d(const Tensor& input, const Tensor& basis, const Tensor& refocus,
                                     const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding,
                                     Ints dilation) {
  const Tensor transformed = refocus_weight(basis, refocus, identity);
  return {grouped_conv2d(input, transformed, bias, stride, padding, dilation), transformed};
}

// The gradients of the input, of W_t, of W_r and of the bias; what is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> refconv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                              const Tensor& transformed, const Tensor& basis,
                                                              int64_t group_size, int64_t map_size, Ints stride,
                                                              Ints padding, Ints dilation, bool need_input,
                                                              bool need_basis, bool need_refocus, bool need_bias) {
  const auto [grad_input, grad_weight, grad_bias] = grouped_conv2d_backward(
      grad_output, input, transformed, stride, padding, dilation, need_input, need_basis || need_refocus, need_bias);
  const Tensor grad_refocus = need_refocus ? refocus_weight_backward(grad_weight, basis, group_size, map_size)
                                           : torch::stable::new_empty(basis, {0});
  return {grad_input, grad_weight, grad_refocus, grad_bias};
}

// Both steps of a RefConv in the thin form. The backward makes W_t again.
Tensor thin_refconv2d(const Tensor& input, const Tensor& basis, const Tensor& coordinates, const Tensor& factor,
                      const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding, Ints dilation) {
  const Tensor transformed = thin_refocus_weight(basis, coordinates, factor, identity);
  return grouped_conv2d(input, transformed, bias, stride, padding, dilation);
}

// The gradients of the input, of W_t, of E and of the bias; what is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> thin_refconv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                                   const Tensor& basis, const Tensor& coordinates,
                                                                   const Tensor& factor, bool identity, Ints stride,
                                                                   Ints padding, Ints dilation, bool need_input,
                                                                   bool need_weight, bool need_coordinates,
                                                                   bool need_bias) {
  const Tensor transformed = thin_refocus_weight(basis, coordinates, factor, identity);
  const auto [grad_input, grad_weight, grad_bias] =
      grouped_conv2d_backward(grad_output, input, transformed, stride, padding, dilation, need_input,
                              need_weight || need_coordinates, need_bias);
  const Tensor none = torch::stable::new_empty(basis, {0});
  const Tensor grad_coordinates = need_coordinates ? thin_refocus_weight_backward(grad_weight, factor) : none;
  return {grad_input, need_weight ? grad_weight : none, grad_coordinates, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refconv_cpu, CPU, m) {
  m.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d));
  m.impl("grouped_conv2d_backward", TORCH_BOX(&grouped_conv2d_backward));
  m.impl("refconv2d", TORCH_BOX(&refconv2d));
  m.impl("refconv2d_backward", TORCH_BOX(&refconv2d_backward));
  m.impl("refocus_weight", TORCH_BOX(&refocus_weight));
  m.impl("refocus_weight_backward", TORCH_BOX(&refocus_weight_backward));
  m.impl("thin_refconv2d", TORCH_BOX(&thin_refconv2d));
  m.impl("thin_refconv2d_backward", TORCH_BOX(&thin_refconv2d_backward));
  m.impl("thin_refocus_weight", TORCH_BOX(&thin_refocus_weight));
  m.impl("thin_refocus_weight_backward", TORCH_BOX(&thin_refocus_weight_backward));
}

}  // namespace refconv::bindings
