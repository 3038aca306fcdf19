// Both steps of a layer in one operator.
#include "operators.h"

namespace refconv::bindings {
namespace {

// A convolution by our kernels or PyTorch's, in the layout that input and basis ask for.
class Convolution {
 public:
  Convolution(const Tensor& input, const Tensor& basis, Ints stride, Ints padding, Ints dilation, bool own)
      : nhwc_(is_nhwc(input) || is_nhwc(basis)),
        input_(in_layout(input, nhwc_)),
        stride_(std::move(stride)),
        padding_(std::move(padding)),
        dilation_(std::move(dilation)),
        own_(own) {}

  Tensor forward(const Tensor& transformed, const std::optional<Tensor>& bias) const {
    std::optional<Tensor> b;
    if (bias.has_value()) b = in_type_of(input_, *bias);
    const auto run = own_ ? grouped_conv2d : torch_conv2d;
    return in_layout(run(input_, transformed, b, stride_, padding_, dilation_), nhwc_);
  }

  // dx, dW_t and dbias. The last two are given in the type of `like`.
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& transformed, const Tensor& like,
                                              bool need_input, bool need_weight, bool need_bias) const {
    const auto run = own_ ? grouped_conv2d_backward : torch_conv2d_backward;
    const auto [grad_input, grad_weight, grad_bias] =
        run(grad_output, input_, transformed, stride_, padding_, dilation_, need_input, need_weight, need_bias);
    return {need_input ? in_layout(grad_input, nhwc_) : grad_input, contiguous_of(in_type_of(like, grad_weight)),
            in_type_of(like, grad_bias)};
  }

 private:
  const bool nhwc_;
  const Tensor input_;
  const Ints stride_, padding_, dilation_;
  const bool own_;
};

}  // namespace

std::tuple<Tensor, Tensor> refconv2d(const Tensor& input, const Tensor& basis, const Tensor& refocus,
                                     const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding,
                                     Ints dilation, bool own_convolution) {
  const Convolution convolution(input, basis, stride, padding, dilation, own_convolution);
  const Tensor transformed = in_type_of(input, refocus_weight(basis, refocus, identity));
  return {convolution.forward(transformed, bias), transformed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> refconv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                              const Tensor& transformed, const Tensor& basis,
                                                              int64_t group_size, int64_t map_size, Ints stride,
                                                              Ints padding, Ints dilation, bool need_input,
                                                              bool need_basis, bool need_refocus, bool need_bias,
                                                              bool own_convolution) {
  const Convolution convolution(input, basis, stride, padding, dilation, own_convolution);
  auto [grad_input, grad_weight, grad_bias] =
      convolution.backward(grad_output, transformed, basis, need_input, need_basis || need_refocus, need_bias);
  Tensor grad_refocus = empty(basis, {0});
  if (need_refocus) {
    // dW_t is nobody else's, so that dW_r may take its place.
    grad_refocus = need_basis ? refocus_weight_backward(grad_weight, basis, group_size, map_size)
                              : refocus_weight_backward_over(grad_weight, basis, group_size, map_size);
  }
  if (!need_basis) grad_weight = empty(basis, {0});
  return {grad_input, grad_weight, grad_refocus, grad_bias};
}

Tensor thin_refconv2d(const Tensor& input, const Tensor& basis, const Tensor& coordinates, const Tensor& factor,
                      const std::optional<Tensor>& bias, bool identity, Ints stride, Ints padding, Ints dilation,
                      bool own_convolution) {
  const Convolution convolution(input, basis, stride, padding, dilation, own_convolution);
  const Tensor transformed = in_type_of(input, thin_refocus_weight(basis, coordinates, factor, identity));
  return convolution.forward(transformed, bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> thin_refconv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                                   const Tensor& basis, const Tensor& coordinates,
                                                                   const Tensor& factor, bool identity, Ints stride,
                                                                   Ints padding, Ints dilation, bool need_input,
                                                                   bool need_weight, bool need_coordinates,
                                                                   bool need_bias, bool own_convolution) {
  const Convolution convolution(input, basis, stride, padding, dilation, own_convolution);
  const Tensor transformed = in_type_of(input, thin_refocus_weight(basis, coordinates, factor, identity));
  const auto [grad_input, grad_weight, grad_bias] =
      convolution.backward(grad_output, transformed, basis, need_input, need_weight || need_coordinates, need_bias);
  const Tensor none = empty(basis, {0});
  const Tensor grad_coordinates = need_coordinates ? thin_refocus_weight_backward(grad_weight, factor) : none;
  return {grad_input, need_weight ? grad_weight : none, grad_coordinates, grad_bias};
}

}  // namespace refconv::bindings
