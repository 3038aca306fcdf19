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
#include <torch/headeronly/core/MemoryFormat.h>
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

using refconv::FoldedAdamProblem;
using refconv::GroupedProblem;
using refconv::RefocusProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 32768;

// Independent parts of a sum over feature maps, where the tasks of a kernel are not the sums' owners.
constexpr int64_t kSumChunks = 16;

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

// A type as a value, for generic lambdas.
template <typename T>
struct Type {
  using type = T;
};

template <typename Body>
void for_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float) return body(Type<float>{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "dtype must be float32 or float64");
  body(Type<double>{});
}

template <typename Body>
void for_storage_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::BFloat16) return body(Type<refconv::BFloat16>{});
  if (tensor.scalar_type() == ScalarType::Half) return body(Type<refconv::Half>{});
  for_dtype(tensor, body);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_like(const Tensor& tensor, const Tensor& like, int64_t dim) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == like.scalar_type() && tensor.dim() == dim,
                  "all tensors must be on the CPU, of one dtype, and of the documented number of dimensions");
}

template <typename S>
const refconv::cpu::GroupedKernels<S>& grouped_kernels(const GroupedProblem& p, bool nhwc) {
  // What lies along a vector: channels, or columns of the output in both directions.
  const int64_t width = nhwc ? p.channels : p.out_w;
  return refconv::cpu::instruction_set_for_rows(width, sizeof(refconv::Compute<S>)).kernels.grouped<S>();
}

template <typename T>
const refconv::cpu::RefocusKernels<T>& refocus_kernels() {
  return refconv::cpu::instruction_set().kernels.refocus<T>();
}

Ints sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

GroupedProblem grouped_problem(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation) {
  check_like(input, input, 4);
  check_like(weight, input, 4);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must have two elements");
  GroupedProblem p{};
  p.batch = input.size(0), p.channels = input.size(1), p.in_h = input.size(2), p.in_w = input.size(3);
  p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.per_group = weight.size(1);
  STD_TORCH_CHECK(p.channels > 0 && p.per_group > 0 && p.channels % p.per_group == 0 && weight.size(0) > 0 &&
                      weight.size(0) % p.groups() == 0,
                  "weight must be [out_channels, channels / groups, kernel_h, kernel_w], groups a divisor of both");
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 &&
                      p.dilation_w > 0 && p.pad_h >= 0 && p.pad_w >= 0,
                  "kernel, stride and dilation must be positive, padding not negative");
  p.multiplier = weight.size(0) / p.groups();
  const int64_t span_h = p.in_h + 2 * p.pad_h - (p.kernel_h - 1) * p.dilation_h - 1;
  const int64_t span_w = p.in_w + 2 * p.pad_w - (p.kernel_w - 1) * p.dilation_w - 1;
  STD_TORCH_CHECK(span_h >= 0 && span_w >= 0, "the kernel must fit into the padded input");
  p.out_h = span_h / p.stride_h + 1;
  p.out_w = span_w / p.stride_w + 1;
  return p;
}

// Whether a feature map is channels_last in memory and not NCHW as well, as PyTorch answers it.
bool is_nhwc(const Tensor& t) {
  int64_t step = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != step) return false;
    step *= t.size(dim);
  }
  return !t.is_contiguous();
}

// Whether a problem with channels_last feature maps (the input's or the weight's decides, as in PyTorch) has kernels of
// that layout; others are copied to NCHW and back.
bool has_nhwc(const GroupedProblem& p) { return p.multiplier == 1 && p.per_group == 1; }

Tensor in_layout(const Tensor& t, bool nhwc) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// An uninitialised feature map [n, c, h, w] in that layout.
Tensor feature_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool nhwc) {
  if (!nhwc) return torch::stable::new_empty(like, {n, c, h, w});
  return torch::stable::transpose(torch::stable::transpose(torch::stable::new_empty(like, {n, h, w, c}), 1, 3), 2, 3);
}

Tensor grouped_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                      Ints padding, Ints dilation) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  const bool channels_last = is_nhwc(input) || is_nhwc(weight), nhwc = channels_last && has_nhwc(p);
  const Tensor x = in_layout(input, nhwc), w = torch::stable::contiguous(weight);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    check_like(*bias, input, 1);
    STD_TORCH_CHECK(bias->size(0) == p.out_channels(), "bias must have one element per output channel");
    b = torch::stable::contiguous(*bias);
  }
  const Tensor y = feature_map(input, p.batch, p.out_channels(), p.out_h, p.out_w, nhwc);
  for_storage_dtype(input, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto& kernels = grouped_kernels<S>(p, nhwc);
    const auto kernel = nhwc ? kernels.nhwc_forward : kernels.forward;
    const S *x_data = data<S>(x), *w_data = data<S>(w), *b_data = b.has_value() ? data<S>(*b) : nullptr;
    S* y_data = mutable_data<S>(y);
    const int64_t tasks = p.batch * (nhwc ? p.out_h : p.out_channels());
    parallel(tasks, y.numel() / std::max<int64_t>(tasks, 1) * p.per_group * p.taps(),
             [&](int64_t begin, int64_t end) { kernel(p, x_data, w_data, b_data, y_data, begin, end); });
  });
  return in_layout(y, channels_last);
}

// dx, dW and dbias on channels_last feature maps. Null where not wanted.
template <typename S>
void nhwc_backward(const GroupedProblem& p, const S* dy, const S* x, const S* w, S* dx, S* dw, S* db) {
  const auto& kernels = grouped_kernels<S>(p, true);
  const int64_t rows = p.batch * p.in_h, out_rows = p.batch * p.out_h, size = (p.taps() + 1) * p.channels;
  // As many for any number of threads: the sums must not depend on it.
  const int64_t chunks = std::min<int64_t>(rows, kSumChunks);
  std::vector<double> totals(static_cast<size_t>(chunks * size));
  parallel(chunks, 2 * rows / std::max<int64_t>(chunks, 1) * p.in_w * p.channels * p.taps(),
           [&](int64_t begin, int64_t end) {
             for (int64_t chunk = begin; chunk < end; ++chunk) {
               double* sums = totals.data() + chunk * size;
               if (dx != nullptr || dw != nullptr) {
                 kernels.nhwc_backward(p, dy, x, w, dx, sums, rows * chunk / chunks, rows * (chunk + 1) / chunks);
               }
               if (db != nullptr) {
                 kernels.nhwc_bias(p, dy, sums + p.taps() * p.channels, out_rows * chunk / chunks,
                                   out_rows * (chunk + 1) / chunks);
               }
             }
           });
  kernels.nhwc_reduce(p, totals.data(), chunks, dw, db);
}

// What is not wanted comes back as an empty tensor.
std::tuple<Tensor, Tensor, Tensor> grouped_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, Ints stride, Ints padding,
                                                           Ints dilation, bool need_input, bool need_weight,
                                                           bool need_bias) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  check_like(grad_output, input, 4);
  STD_TORCH_CHECK(grad_output.size(0) == p.batch && grad_output.size(1) == p.out_channels() &&
                      grad_output.size(2) == p.out_h && grad_output.size(3) == p.out_w,
                  "grad_output must have the shape of the output");
  const bool channels_last = is_nhwc(input) || is_nhwc(weight), nhwc = channels_last && has_nhwc(p);
  const Tensor dy = in_layout(grad_output, nhwc), x = in_layout(input, nhwc), w = torch::stable::contiguous(weight);
  const Tensor grad_input =
      need_input ? feature_map(x, p.batch, p.channels, p.in_h, p.in_w, nhwc) : torch::stable::new_empty(x, {0});
  const Tensor grad_weight = torch::stable::new_empty(w, need_weight ? sizes_of(w) : Ints{0});
  const Tensor grad_bias = torch::stable::new_empty(w, {need_bias ? p.out_channels() : 0});
  for_storage_dtype(input, [&](auto type) {
    using S = typename decltype(type)::type;
    const S *dy_data = data<S>(dy), *x_data = data<S>(x), *w_data = data<S>(w);
    S* dx = need_input ? mutable_data<S>(grad_input) : nullptr;
    S* dw = need_weight ? mutable_data<S>(grad_weight) : nullptr;
    S* db = need_bias ? mutable_data<S>(grad_bias) : nullptr;
    if (nhwc) return nhwc_backward<S>(p, dy_data, x_data, w_data, dx, dw, db);
    const auto kernel = grouped_kernels<S>(p, false).backward;
    const int64_t work = 2 * p.batch * p.multiplier * p.out_size() * p.taps();
    parallel(p.channels, work,
             [&](int64_t begin, int64_t end) { kernel(p, dy_data, x_data, w_data, dx, dw, db, begin, end); });
  });
  return {need_input ? in_layout(grad_input, channels_last) : grad_input, grad_weight, grad_bias};
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
  const Tensor transformed = torch::stable::new_empty(b, sizes_of(b));
  for_dtype(basis, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = refocus_kernels<T>().forward;
    const T* b_data = data<T>(b);
    const T* r_data = data<T>(r);
    T* t_data = mutable_data<T>(transformed);
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
  for_dtype(basis, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = refocus_kernels<T>().backward;
    const T* g_data = data<T>(g);
    const T* b_data = data<T>(b);
    T* r_data = mutable_data<T>(grad_refocus);
    parallel(p.kernels, p.row_length() * p.kernel_size(),
             [&](int64_t begin, int64_t end) { kernel(p, g_data, b_data, r_data, begin, end); });
  });
  return grad_refocus;
}

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

// AdamW's direction on W_r in the coordinates of the thin form, and the updated root of the second moment.
std::tuple<Tensor, Tensor> folded_adam(const Tensor& first, const Tensor& root, const Tensor& gradient,
                                       const Tensor& rotation, double keep, double scale_first, double scale_second,
                                       double eps) {
  for (const Tensor* rows : {&first, &root, &gradient}) check_like(*rows, first, 2);
  check_like(rotation, first, 3);
  const int64_t groups = rotation.size(0);
  FoldedAdamProblem p{first.size(0), 0, rotation.size(2), first.size(1), keep, scale_first, scale_second, eps};
  STD_TORCH_CHECK(groups > 0 && p.rows % groups == 0 && rotation.size(1) == p.rank && gradient.size(0) == p.rows &&
                      gradient.size(1) == p.rank && root.size(0) == p.rows && root.size(1) == p.root_size(),
                  "first and gradient must be [rows, rank], root [rows, rank (rank + 1) / 2] and rotation "
                  "[rows / per_group, rank, columns]");
  p.per_group = p.rows / groups;
  const Tensor m = torch::stable::contiguous(first), u = torch::stable::contiguous(root);
  const Tensor g = torch::stable::contiguous(gradient), q = torch::stable::contiguous(rotation);
  const Tensor direction = torch::stable::new_empty(m, sizes_of(m));
  const Tensor updated = torch::stable::new_empty(u, sizes_of(u));
  for_dtype(first, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = refconv::cpu::instruction_set().kernels.folded_adam<T>();
    parallel(p.rows, p.columns * (p.root_size() + 3 * p.rank), [&](int64_t begin, int64_t end) {
      kernel(p, data<T>(m), data<T>(u), data<T>(g), data<T>(q), mutable_data<T>(updated), mutable_data<T>(direction),
             begin, end);
    });
  });
  return {direction, updated};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refconv_cpu, CPU, m) {
  m.impl("folded_adam", TORCH_BOX(&folded_adam));
  m.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d));
  m.impl("grouped_conv2d_backward", TORCH_BOX(&grouped_conv2d_backward));
  m.impl("refconv2d", TORCH_BOX(&refconv2d));
  m.impl("refconv2d_backward", TORCH_BOX(&refconv2d_backward));
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
      "The instruction set that a grouped convolution with output rows of `width` elements gets.");
  m.def(
      "set_instruction_set", [](const std::string& name) { refconv::cpu::set_instruction_set(name); },
      pybind11::arg("name"), "Use only this instruction set from now on, for tests and measurements; or \"auto\".");
}
