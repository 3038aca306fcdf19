// PyTorch's own convolution, called by its name, for the layers whose convolution is not ours.
#include <array>

#include "operators.h"

namespace refconv::bindings {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

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
  const bool transposed = false;
  const Ints output_padding{0, 0};
  std::array stack{from(input),      from(weight),         from(bias),
                   from(stride),     from(padding),        from(dilation),
                   from(transposed), from(output_padding), from(groups_of(input, weight))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor> torch_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                         const Tensor& weight, Ints stride, Ints padding, Ints dilation,
                                                         bool need_input, bool need_weight, bool need_bias) {
  check_like(grad_output, input, 4);
  const bool transposed = false;
  const Ints output_padding{0, 0};
  const std::optional<Ints> bias_sizes = Ints{weight.size(0)};
  const std::array<bool, 3> needs{need_input, need_weight, need_bias};
  std::array stack{from(grad_output),
                   from(input),
                   from(weight),
                   from(bias_sizes),
                   from(stride),
                   from(padding),
                   from(dilation),
                   from(transposed),
                   from(output_padding),
                   from(groups_of(input, weight)),
                   from(torch::headeronly::HeaderOnlyArrayRef<bool>(needs.data(), needs.size()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 3> grads{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  for (Tensor& grad : grads) {
    if (!grad.defined()) grad = torch::stable::new_empty(input, {0});
  }
  return {grads[0], grads[1], grads[2]};
}

}  // namespace refconv::bindings
