// Both steps of a layer in one operator.
#include "operators.h"

namespace refconv::bindings {

std::tuple<Tensor, Tensor> refconv2d(const Tensor& input, const Tensor& basis, const Tensor& refocus,
                                     const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding,
                                     Ints dilation) {
  const Tensor transformed = refocus_weight(basis, refocus, identity);
  return {grouped_conv2d(input, transformed, bias, stride, padding, dilation), transformed};
}

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

Tensor thin_refconv2d(const Tensor& input, const Tensor& basis, const Tensor& coordinates, const Tensor& factor,
                      const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding, Ints dilation) {
  const Tensor transformed = thin_refocus_weight(basis, coordinates, factor, identity);
  return grouped_conv2d(input, transformed, bias, stride, padding, dilation);
}

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

}  // namespace refconv::bindings
