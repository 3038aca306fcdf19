// The feature-map convolution: tensors in, tensors out.
#include <algorithm>
#include <memory>

#include "operators.h"

namespace refconv::bindings {
namespace {

// Whose kernels a problem gets, and which of them.
struct Choice {
  const cpu::InstructionSet& set;
  bool turned;  // small planes, NCHW
};

// For elements of so many bytes.
Choice choice_of(const GroupedProblem& p, bool nhwc, int64_t element_bytes, bool backward) {
  // What lies along a vector: groups, or columns of the output in both directions. Wide planes of the 3x3 kernels
  // gain more from wide vectors than they lose by lanes left idle, and narrow ones share them.
  const int64_t lane_bytes = std::max<int64_t>(element_bytes, 4);
  const cpu::InstructionSet& for_groups = cpu::instruction_set_for_rows(p.groups(), lane_bytes);
  const bool turned = !nhwc && cpu::has_turned_planes(p, element_bytes, for_groups.vector_bytes,
                                                      for_groups.kernels.vector_registers, backward);
  if (nhwc || turned) return {for_groups, turned};
  const cpu::InstructionSet& best = cpu::instruction_set();
  if (cpu::has_planes_3x3(p) && (p.out_w > 48 || cpu::has_twin_planes(p, element_bytes, best.vector_bytes))) {
    return {best, false};
  }
  return {cpu::instruction_set_for_rows(p.out_w, lane_bytes), false};
}

GroupedProblem grouped_problem(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation) {
  STD_TORCH_CHECK(input.size() == 4 && weight.size() == 4, "input and weight must have four dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must have two elements");
  GroupedProblem p{};
  p.batch = input[0], p.channels = input[1], p.in_h = input[2], p.in_w = input[3];
  p.kernel_h = weight[2], p.kernel_w = weight[3];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.per_group = weight[1];
  STD_TORCH_CHECK(p.channels > 0 && p.per_group > 0 && p.channels % p.per_group == 0 && weight[0] > 0 &&
                      weight[0] % p.groups() == 0,
                  "weight must be [out_channels, channels / groups, kernel_h, kernel_w], groups a divisor of both");
  STD_TORCH_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 &&
                      p.dilation_w > 0 && p.pad_h >= 0 && p.pad_w >= 0,
                  "kernel, stride and dilation must be positive, padding not negative");
  p.multiplier = weight[0] / p.groups();
  const int64_t span_h = p.in_h + 2 * p.pad_h - (p.kernel_h - 1) * p.dilation_h - 1;
  const int64_t span_w = p.in_w + 2 * p.pad_w - (p.kernel_w - 1) * p.dilation_w - 1;
  STD_TORCH_CHECK(span_h >= 0 && span_w >= 0, "the kernel must fit into the padded input");
  p.out_h = span_h / p.stride_h + 1;
  p.out_w = span_w / p.stride_w + 1;
  return p;
}

// An uninitialised feature map [n, c, h, w] in that layout.
Tensor feature_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool nhwc) {
  if (!nhwc) return empty(like, {n, c, h, w});
  return empty_strided(like, {n, c, h, w}, {h * w * c, 1, w * c, c});
}

std::string name_of(const GroupedProblem& p, bool channels_last, int64_t element_bytes, bool backward) {
  if (channels_last) {
    return cpu::has_nhwc_3x3_tiles(p, element_bytes, backward)   ? "channels_last tiles of 2x2 pixels, 3x3"
           : cpu::has_nhwc_3x3(p)                                ? "channels_last rows, 3x3"
           : !backward && cpu::has_nhwc_direct(p, element_bytes) ? "channels_last pixels, without a copy"
                                                                 : "channels_last tiles";
  }
  const Choice choice = choice_of(p, false, element_bytes, backward);
  const cpu::InstructionSet& set = choice.set;
  if (choice.turned) return "small planes, channels in the lanes";
  if (!cpu::has_planes_3x3(p)) return p.per_group == 1 ? "padded planes" : "padded planes of a group";
  if (cpu::has_twin_planes(p, element_bytes, set.vector_bytes)) return "3x3 planes, two to a vector";
  const bool by_rows = cpu::has_planes_by_rows(p, element_bytes, set.vector_bytes, set.kernels.vector_registers);
  return by_rows ? "3x3 planes, some rows at once" : "3x3 planes in columns";
}

}  // namespace

GroupedProblem grouped_problem(const Tensor& input, const Tensor& weight, const Ints& stride, const Ints& padding,
                               const Ints& dilation) {
  check_like(input, input, 4);
  check_like(weight, input, 4);
  return grouped_problem(sizes_of(input), sizes_of(weight), stride, padding, dilation);
}

void check_grad_output(const GroupedProblem& p, const Tensor& grad_output, const Tensor& input) {
  check_like(grad_output, input, 4);
  STD_TORCH_CHECK(grad_output.size(0) == p.batch && grad_output.size(1) == p.out_channels() &&
                      grad_output.size(2) == p.out_h && grad_output.size(3) == p.out_w,
                  "grad_output must have the shape of the output");
}

void check_bias(const GroupedProblem& p, const Tensor& bias, const Tensor& input) {
  check_like(bias, input, 1);
  STD_TORCH_CHECK(bias.size(0) == p.out_channels(), "bias must have one element per output channel");
}

std::string grouped_kernel(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                           const Ints& dilation, bool channels_last, int64_t element_bytes) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  const auto named = [&](bool backward) {
    return name_of(p, channels_last, element_bytes, backward) + " (" +
           choice_of(p, channels_last, element_bytes, backward).set.name + ")";
  };
  const std::string forward = named(false), back = named(true);
  return forward == back ? forward : forward + ", backward by " + back;
}

Tensor grouped_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                      Ints padding, Ints dilation) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  const bool nhwc = is_nhwc(input) || is_nhwc(weight);  // either decides, as in PyTorch
  const Tensor x = in_layout(input, nhwc), w = contiguous_of(weight);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    check_bias(p, *bias, input);
    b = contiguous_of(*bias);
  }
  const Tensor y = feature_map(input, p.batch, p.out_channels(), p.out_h, p.out_w, nhwc);
  for_storage_dtype(input, [&](auto type) {
    using S = typename decltype(type)::type;
    const Choice choice = choice_of(p, nhwc, sizeof(S), false);
    const cpu::GroupedKernels<S>& kernels = choice.set.kernels.template grouped<S>();
    const auto kernel = nhwc ? kernels.nhwc_forward : choice.turned ? kernels.turned_forward : kernels.forward;
    const S *x_data = data<S>(x), *w_data = data<S>(w), *b_data = b.has_value() ? data<S>(*b) : nullptr;
    S* y_data = mutable_data<S>(y);
    const int64_t tasks = p.batch * (nhwc ? p.out_h : choice.turned ? p.groups() : p.out_channels());
    parallel(tasks, y.numel() / std::max<int64_t>(tasks, 1) * p.per_group * p.taps(),
             [&](int64_t begin, int64_t end) { kernel(p, x_data, w_data, b_data, y_data, begin, end); });
  });
  return y;
}

namespace {

// The parts of a backward. Sums over pixels are made of `chunks`, as many for any number of threads: they must not
// depend on it. They do not depend on how many channels of x are one task.
struct Parts {
  int64_t chunks, block;
};

// Of 192 pixels or more, and where there are more than 16 chunks of 768 or more, since their sums go through memory,
// too. Very many weights take as long as the pixels: those of few channels at a time stay in the caches.
Parts nhwc_parts(const GroupedProblem& p) {
  constexpr int64_t kMost = 64, kPixels = 192, kSmall = 16, kPixelsOfMany = 768;
  constexpr int64_t kManyWeights = 1 << 16, kPixelsOfManyWeights = 3072, kChannelsOfManyWeights = 32;
  constexpr int64_t kChannels = 64;  // of a task at least, otherwise
  const int64_t pixels = p.batch * p.in_size(), rows = std::clamp<int64_t>(p.batch * p.in_h, 1, kMost);
  if (p.group_taps() * p.groups() >= kManyWeights) {
    return {std::clamp<int64_t>(pixels / kPixelsOfManyWeights, 1, rows), kChannelsOfManyWeights};
  }
  const int64_t wanted = std::max(std::min(pixels / kPixels, kSmall), pixels / kPixelsOfMany);
  const int64_t chunks = std::clamp<int64_t>(wanted, 1, rows);
  const bool whole = cpu::has_nhwc_3x3(p) || chunks >= torch::stable::get_num_threads();
  return {chunks, whole ? p.channels : kChannels};
}

// Parts of the batch in which small planes are turned, so that there are blocks of channels for many threads.
Parts turned_parts(const GroupedProblem& p) {
  constexpr int64_t kChannels = 1024, kPixels = 192;  // of all chunks at least, and of each
  const int64_t wanted = (kChannels + p.channels - 1) / p.channels;
  const int64_t most = std::min(wanted, p.batch * p.in_size() / kPixels);
  return {std::clamp<int64_t>(most, 1, std::max<int64_t>(p.batch, 1)), p.per_group};
}

// dx, dW and dbias on channels_last feature maps, or on small planes. Null where not wanted.
template <typename S>
void chunked_backward(const cpu::GroupedKernels<S>& kernels, const GroupedProblem& p, bool nhwc, const S* dy,
                      const S* x, const S* w, S* dx, S* dw, S* db) {
  const Parts parts = nhwc ? nhwc_parts(p) : turned_parts(p);
  const int64_t chunks = parts.chunks, tasks = chunks * ((p.channels + parts.block - 1) / parts.block);
  const std::unique_ptr<double[]> totals(
      new double[static_cast<size_t>(chunks * (p.per_group * p.taps() + 1) * p.out_channels())]);
  parallel(tasks, 2 * p.batch * p.in_size() * p.out_channels() / tasks * p.per_group * p.taps(),
           [&](int64_t begin, int64_t end) {
             const bool need_weight = dw != nullptr, need_bias = db != nullptr;
             if (nhwc) {
               kernels.nhwc_backward(p, dy, x, w, dx, totals.get(), chunks, parts.block, need_weight, need_bias, begin,
                                     end);
             } else {
               kernels.turned_backward(p, dy, x, w, dx, totals.get(), chunks, need_weight, need_bias, begin, end);
             }
           });
  parallel(p.groups(), chunks * p.multiplier * (p.per_group * p.taps() + 1), [&](int64_t begin, int64_t end) {
    kernels.add_chunks(p, nhwc, dy, x, totals.get(), chunks, dw, db, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grouped_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, Ints stride, Ints padding,
                                                           Ints dilation, bool need_input, bool need_weight,
                                                           bool need_bias) {
  const GroupedProblem p = grouped_problem(input, weight, stride, padding, dilation);
  check_grad_output(p, grad_output, input);
  const bool nhwc = is_nhwc(input) || is_nhwc(weight);
  const Tensor dy = in_layout(grad_output, nhwc), x = in_layout(input, nhwc), w = contiguous_of(weight);
  const Tensor grad_input = need_input ? feature_map(x, p.batch, p.channels, p.in_h, p.in_w, nhwc) : empty(x, {0});
  const Tensor grad_weight = empty(w, need_weight ? sizes_of(w) : Ints{0});
  const Tensor grad_bias = empty(w, {need_bias ? p.out_channels() : 0});
  for_storage_dtype(input, [&](auto type) {
    using S = typename decltype(type)::type;
    const S *dy_data = data<S>(dy), *x_data = data<S>(x), *w_data = data<S>(w);
    S* dx = need_input ? mutable_data<S>(grad_input) : nullptr;
    S* dw = need_weight ? mutable_data<S>(grad_weight) : nullptr;
    S* db = need_bias ? mutable_data<S>(grad_bias) : nullptr;
    const Choice choice = choice_of(p, nhwc, sizeof(S), true);
    const cpu::GroupedKernels<S>& kernels = choice.set.kernels.template grouped<S>();
    if (nhwc || choice.turned) return chunked_backward<S>(kernels, p, nhwc, dy_data, x_data, w_data, dx, dw, db);
    const int64_t work = 2 * p.batch * p.multiplier * p.out_size() * p.taps();
    parallel(p.channels, work,
             [&](int64_t begin, int64_t end) { kernels.backward(p, dy_data, x_data, w_data, dx, dw, db, begin, end); });
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace refconv::bindings
