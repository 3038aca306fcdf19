// The one file that knows torch: tensors in, tensors out, over torch's stable ABI, and the pybind11 module
// with what is not a tensor operator.
//
// Schemas and fake kernels are in refconv_kernels/ops.py, one for all backends; this file implements them
// for the CPU. Callers have validated shapes with messages for people; the checks here only keep a wrong
// call from touching memory that is not its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "problem.h"

namespace {

using refconv::DepthwiseProblem;
using refconv::RefocusProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 32768;

// Runs kernel(begin, end) over [0, tasks) on torch's threads. An exception (only bad_alloc is possible)
// must not leave through the C ABI, so it is carried over.
template <typename Kernel>
void parallel(int64_t tasks, int64_t work_per_task, const Kernel& kernel) {
  if (tasks <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_task));
  std::exception_ptr error;
  std::mutex guard;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    try {
      kernel(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

template <typename Body>
void for_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "dtype must be float32 or float64");
  body(double{});
}

void check_like(const Tensor& tensor, const Tensor& like, int64_t dim) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == like.scalar_type() && tensor.dim() == dim,
                  "all tensors must be on the CPU, of one dtype, and of the documented number of dimensions");
}

template <typename T>
const T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename T>
const refconv::cpu::Kernels<T>& kernels_for_rows(int64_t width) {
  return refconv::cpu::kernels_of<T>(refconv::cpu::instruction_set_for_rows(width, sizeof(T)));
}

DepthwiseProblem depthwise_problem(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                                   const Ints& dilation) {
  check_like(input, input, 4);
  check_like(weight, input, 4);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must have two elements");
  DepthwiseProblem p{};
  p.batch = input.size(0), p.channels = input.size(1), p.in_h = input.size(2), p.in_w = input.size(3);
  p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  STD_TORCH_CHECK(p.channels > 0 && weight.size(0) > 0 && weight.size(0) % p.channels == 0 && weight.size(1) == 1,
                  "weight must be [multiplier * channels, 1, kernel_h, kernel_w]");
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 &&
                      p.dilation_w > 0 && p.pad_h >= 0 && p.pad_w >= 0,
                  "kernel, stride and dilation must be positive, padding not negative");
  p.multiplier = weight.size(0) / p.channels;
  const int64_t span_h = p.in_h + 2 * p.pad_h - (p.kernel_h - 1) * p.dilation_h - 1;
  const int64_t span_w = p.in_w + 2 * p.pad_w - (p.kernel_w - 1) * p.dilation_w - 1;
  STD_TORCH_CHECK(span_h >= 0 && span_w >= 0, "the kernel must fit into the padded input");
  p.out_h = span_h / p.stride_h + 1;
  p.out_w = span_w / p.stride_w + 1;
  return p;
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                        Ints padding, Ints dilation) {
  const DepthwiseProblem p = depthwise_problem(input, weight, stride, padding, dilation);
  const Tensor x = torch::stable::contiguous(input);
  const Tensor w = torch::stable::contiguous(weight);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    check_like(*bias, input, 1);
    STD_TORCH_CHECK(bias->size(0) == p.out_channels(), "bias must have one element per output channel");
    b = torch::stable::contiguous(*bias);
  }
  const Tensor y = torch::stable::new_empty(input, {p.batch, p.out_channels(), p.out_h, p.out_w});
  for_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = kernels_for_rows<T>(p.out_w).depthwise_forward;
    const T* x_data = x.template const_data_ptr<T>();
    const T* w_data = w.template const_data_ptr<T>();
    const T* b_data = optional_data<T>(b);
    T* y_data = y.template mutable_data_ptr<T>();
    parallel(p.batch * p.out_channels(), p.out_h * p.out_w * p.taps(),
             [&](int64_t begin, int64_t end) { kernel(p, x_data, w_data, b_data, y_data, begin, end); });
  });
  return y;
}

// What is not wanted comes back as an empty tensor.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                             const Tensor& weight, Ints stride, Ints padding,
                                                             Ints dilation, bool need_input, bool need_weight,
                                                             bool need_bias) {
  const DepthwiseProblem p = depthwise_problem(input, weight, stride, padding, dilation);
  check_like(grad_output, input, 4);
  STD_TORCH_CHECK(grad_output.size(0) == p.batch && grad_output.size(1) == p.out_channels() &&
                      grad_output.size(2) == p.out_h && grad_output.size(3) == p.out_w,
                  "grad_output must have the shape of the output");
  const Tensor dy = torch::stable::contiguous(grad_output);
  const Tensor x = torch::stable::contiguous(input);
  const Tensor w = torch::stable::contiguous(weight);
  const auto output = [&](bool wanted, const Tensor& like) {
    return wanted ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  const Tensor grad_input = output(need_input, x);
  const Tensor grad_weight = output(need_weight, w);
  const Tensor grad_bias = torch::stable::new_empty(weight, {need_bias ? p.out_channels() : 0});
  for_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = kernels_for_rows<T>(p.out_w).depthwise_backward;
    const T* dy_data = dy.template const_data_ptr<T>();
    const T* x_data = x.template const_data_ptr<T>();
    const T* w_data = w.template const_data_ptr<T>();
    T* grad_input_data = need_input ? grad_input.template mutable_data_ptr<T>() : nullptr;
    T* grad_weight_data = need_weight ? grad_weight.template mutable_data_ptr<T>() : nullptr;
    T* grad_bias_data = need_bias ? grad_bias.template mutable_data_ptr<T>() : nullptr;
    const int64_t work = 2 * p.batch * p.multiplier * p.out_h * p.out_w * p.taps();
    parallel(p.channels, work, [&](int64_t begin, int64_t end) {
      kernel(p, dy_data, x_data, w_data, grad_input_data, grad_weight_data, grad_bias_data, begin, end);
    });
  });
  return {grad_input, grad_weight, grad_bias};
}

RefocusProblem refocus_problem(const Tensor& basis, int64_t group_size, int64_t map_size, bool identity) {
  check_like(basis, basis, 4);
  RefocusProblem p{};
  p.kernels = basis.size(0) * basis.size(1);
  p.group_size = group_size;
  p.kernel_h = basis.size(2), p.kernel_w = basis.size(3);
  p.map_size = map_size;
  p.identity = identity;
  STD_TORCH_CHECK(group_size > 0 && p.kernels % group_size == 0 && map_size > 0 && map_size % 2 == 1,
                  "group_size must divide the number of 2-D kernels and map_size must be odd");
  return p;
}

Tensor refocus_weight(const Tensor& basis, const Tensor& refocus, bool identity) {
  check_like(refocus, basis, 4);
  const RefocusProblem p = refocus_problem(basis, refocus.size(1), refocus.size(2), identity);
  STD_TORCH_CHECK(refocus.size(0) == p.kernels && refocus.size(3) == p.map_size,
                  "refocus must be [kernels, group_size, map_size, map_size]");
  const Tensor b = torch::stable::contiguous(basis);
  const Tensor r = torch::stable::contiguous(refocus);
  const Tensor transformed = torch::stable::new_empty(b, b.sizes());
  for_dtype(basis, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = refconv::cpu::kernels_of<T>(refconv::cpu::instruction_set()).refocus_forward;
    const T* b_data = b.template const_data_ptr<T>();
    const T* r_data = r.template const_data_ptr<T>();
    T* t_data = transformed.template mutable_data_ptr<T>();
    parallel(p.kernels, p.row_length() * p.kernel_size(),
             [&](int64_t begin, int64_t end) { kernel(p, b_data, r_data, t_data, begin, end); });
  });
  return transformed;
}

Tensor refocus_weight_backward(const Tensor& grad_transformed, const Tensor& basis, int64_t group_size,
                               int64_t map_size) {
  check_like(grad_transformed, basis, 4);
  const RefocusProblem p = refocus_problem(basis, group_size, map_size, false);
  STD_TORCH_CHECK(grad_transformed.numel() == basis.numel(), "grad_transformed must have the shape of basis");
  const Tensor g = torch::stable::contiguous(grad_transformed);
  const Tensor b = torch::stable::contiguous(basis);
  const Tensor grad_refocus = torch::stable::new_empty(b, {p.kernels, group_size, map_size, map_size});
  for_dtype(basis, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = refconv::cpu::kernels_of<T>(refconv::cpu::instruction_set()).refocus_backward;
    const T* g_data = g.template const_data_ptr<T>();
    const T* b_data = b.template const_data_ptr<T>();
    T* r_data = grad_refocus.template mutable_data_ptr<T>();
    parallel(p.kernels, p.row_length() * p.kernel_size(),
             [&](int64_t begin, int64_t end) { kernel(p, g_data, b_data, r_data, begin, end); });
  });
  return grad_refocus;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refconv_cpu, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  m.impl("refocus_weight", TORCH_BOX(&refocus_weight));
  m.impl("refocus_weight_backward", TORCH_BOX(&refocus_weight_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of refconv_kernels: build facts and the choice of instruction set.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = REFCONV_COMPILER;
        info["torch_headers"] = TORCH_VERSION;
        info["torch_abi_target"] = REFCONV_TORCH_TARGET;
        info["build_type"] = REFCONV_BUILD_TYPE;
        return info;
      },
      "Compiler, the torch whose headers were used, the oldest torch this binary runs with, and the build type.");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const auto* set : refconv::cpu::instruction_sets()) names.emplace_back(set->name);
        return names;
      },
      "Instruction sets compiled in that this machine runs, best first.");
  m.def(
      "instruction_set", [] { return refconv::cpu::instruction_set().name; },
      "The instruction set in use: the one named, or the best.");
  m.def(
      "instruction_set_for_rows",
      [](int64_t width, int64_t element_bytes) {
        return refconv::cpu::instruction_set_for_rows(width, element_bytes).name;
      },
      pybind11::arg("width"), pybind11::arg("element_bytes"),
      "The instruction set that a depthwise convolution with output rows of `width` elements gets.");
  m.def(
      "set_instruction_set", [](const std::string& name) { refconv::cpu::set_instruction_set(name); },
      pybind11::arg("name"), "Use only this instruction set from now on, for tests and measurements; or \"auto\".");
}
