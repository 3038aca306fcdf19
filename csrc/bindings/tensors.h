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

inline Tensor in_layout(const Tensor& t, bool nhwc) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor in_type_of(const Tensor& like, const Tensor& t) {
  return t.scalar_type() == like.scalar_type() ? t : torch::stable::to(t, like.scalar_type());
}

}  // namespace refconv::bindings
