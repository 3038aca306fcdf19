// What every operator needs of torch's stable ABI: types, checks, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <vector>

#include "../cpu/kernels.h"
#include "../problem.h"

namespace refconv::bindings {

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

inline void check_like(const Tensor& tensor, const Tensor& like, int64_t dim) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == like.scalar_type() && tensor.dim() == dim,
                  "all tensors must be on the CPU, of one dtype, and of the documented number of dimensions");
}

inline Ints sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// Whether a feature map is channels_last in memory and not NCHW as well, as PyTorch answers it.
inline bool is_nhwc(const Tensor& t) {
  int64_t step = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != step) return false;
    step *= t.size(dim);
  }
  return !t.is_contiguous();
}

// Torch's operations are called by name, which costs microseconds even where there is nothing to do.
inline Tensor contiguous_of(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor in_layout(const Tensor& t, bool nhwc) {
  if (!nhwc) return contiguous_of(t);
  return is_nhwc(t) ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// For calls of torch's C interface, which return a code. (The header's own macro changed its name.)
inline void succeeded(AOTITorchError code) {
  STD_TORCH_CHECK(code == AOTI_TORCH_SUCCESS, "an operation of PyTorch failed; its message is on standard error");
}

inline Tensor empty_strided(const Tensor& like, const Ints& sizes, const Ints& strides) {
  int32_t dtype = 0;
  succeeded(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made = nullptr;
  succeeded(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                     aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor empty(const Tensor& like, const Ints& sizes) {
  Ints strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) strides[d] = step, step *= std::max<int64_t>(sizes[d], 1);
  return empty_strided(like, sizes, strides);
}

// The memory of a tensor as another one that is no view of it.
inline Tensor reinterpret(const Tensor& t, const Ints& sizes, const Ints& strides) {
  AtenTensorHandle made = nullptr;
  succeeded(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                                           &made));
  return Tensor(made);
}

inline Tensor in_type_of(const Tensor& like, const Tensor& t) {
  return t.scalar_type() == like.scalar_type() ? t : torch::stable::to(t, like.scalar_type());
}

}  // namespace refconv::bindings
