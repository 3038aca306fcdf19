// PyTorch's own convolution, through torch's C interface, for the layers whose convolution is not ours.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "operators.h"

namespace refconv::bindings {
namespace {

constexpr int64_t kNoPadding[] = {0, 0};  // of the output

}  // namespace

Tensor torch_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                    Ints padding, Ints dilation) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  if (bias.has_value()) check_bias(p, *bias, input);
  AtenTensorHandle b = bias.has_value() ? bias->get() : nullptr, y = nullptr;
  succeeded(aoti_torch_cpu_convolution(input.get(), weight.get(), bias.has_value() ? &b : nullptr, stride.data(), 2,
                                       padding.data(), 2, dilation.data(), 2, false, kNoPadding, 2, p.groups(), &y));
  return Tensor(y);
}

std::tuple<Tensor, Tensor, Tensor> torch_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                         const Tensor& weight, Ints stride, Ints padding, Ints dilation,
                                                         bool need_input, bool need_weight, bool need_bias) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  check_grad_output(p, grad_output, input);
  const int64_t bias_size = p.out_channels(), *bias_sizes = &bias_size;
  const int32_t needs[] = {need_input, need_weight, need_bias};
  AtenTensorHandle dx = nullptr, dw = nullptr, db = nullptr;
  succeeded(aoti_torch_cpu_convolution_backward(grad_output.get(), input.get(), weight.get(), &bias_sizes, 1,
                                                stride.data(), 2, padding.data(), 2, dilation.data(), 2, false,
                                                kNoPadding, 2, p.groups(), needs, 3, &dx, &dw, &db));
  // Instead of what PyTorch leaves undefined:
  const auto taken = [&](AtenTensorHandle handle) {
    const Tensor grad(handle);
    return grad.defined() ? grad : empty(input, {0});
  };
  return {taken(dx), taken(dw), taken(db)};
}

}  // namespace refconv::bindings
