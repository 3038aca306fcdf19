// The autograd Functions of refconv_kernels/autograd once more, in C++: the same operators, the same saved tensors.
//
// Python's ones run everywhere and know everything. These are for the calls that a training repeats, where each call
// into Python costs a small layer more than its kernels, and more still after an operation that went through the
// caches. Unlike csrc/bindings this uses torch's C++ interface, which is stable for one release only: native.py there
// loads it where the release is that of the headers, and does without it elsewhere.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace refconv::autograd {

// In the order of the list in native.py.
enum class Kind : int64_t { kRefocusWeight, kThinRefocusWeight, kGroupedConv2d, kRefConv2d, kThinRefConv2d, kCount };

// What a call has besides its tensors.
struct Options {
  Kind kind;
  std::array<int64_t, 2> stride{}, padding{}, dilation{};
  bool identity = false;
  bool has_bias = false;
  bool own_convolution = false;
};

// `tensors` as the operator has them, without the bias if there is none.
at::Tensor run(const std::vector<at::Tensor>& tensors, const Options& options);

// The backward of a Function in Python: of what only that knows, and of whatever is to be differentiated again. Gives
// one gradient for each of `needs`, which count the bias in any case; undefined where there is none.
std::vector<at::Tensor> backward_in_python(const Options& options, const at::Tensor& grad,
                                           const std::vector<at::Tensor>& saved, const std::vector<bool>& needs);

}  // namespace refconv::autograd
