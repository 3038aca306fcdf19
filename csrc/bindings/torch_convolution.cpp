// PyTorch's own convolution, through torch's C interface, for the layers whose convolution is not ours.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "operators.h"

namespace refconv::bindings {
namespace {

constexpr int64_t kNoPadding[] = {0, 0};  // of the output

int64_t groups_of(const Tensor& input, const Tensor& weight) {
  check_like(input, input, 4);
  check_like(weight, input, 4);
  STD_TORCH_CHECK(weight.size(1) > 0 && input.size(1) % weight.size(1) == 0,
                  "weight must be [out_channels, channels / groups, kernel_h, kernel_w]");
  return input.size(1) / weight.size(1);
}

}  // namespace

Tensor torch_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                    Ints padding, Ints dilation) {
  AtenTensorHandle b = bias.has_value() ? bias->get() : nullptr, y = nullptr;
  succeeded(aoti_torch_cpu_convolution(input.get(), weight.get(), bias.has_value() ? &b : nullptr, stride.data(), 2,
                                       padding.data(), 2, dilation.data(), 2, false, kNoPadding, 2,
                                       groups_of(input, weight), &y));
  return Tensor(y);
}

std::tuple<Tensor, Tensor, Tensor> torch_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                         const Tensor& weight, Ints stride, Ints padding, Ints dilation,
                                                         bool need_input, bool need_weight, bool need_bias) {
  check_like(grad_output, input, 4);
  const int64_t bias_size = weight.size(0), *bias_sizes = &bias_size;
  const int32_t needs[] = {need_input, need_weight, need_bias};
  AtenTensorHandle dx = nullptr, dw = nullptr, db = nullptr;
  succeeded(aoti_torch_cpu_convolution_backward(grad_output.get(), input.get(), weight.get(), &bias_sizes, 1,
                                                stride.data(), 2, padding.data(), 2, dilation.data(), 2, false,
                                                kNoPadding, 2, groups_of(input, weight), needs, 3, &dx, &dw, &db));
  // Instead of what PyTorch leaves undefined:
  const auto taken = [&](AtenTensorHandle handle) {
    const Tensor grad(handle);
    return grad.defined() ? grad : empty(input, {0});
  };
  return {taken(dx), taken(dw), taken(db)};
}

}  // namespace refconv::bindings
