// Transformed weights, in the full and in the thin form: tensors in, tensors out.
#include "operators.h"

namespace refconv::bindings {
namespace {

template <typename S>
const refconv::cpu::RefocusKernels<S>& refocus_kernels(const RefocusProblem& p) {
  return refconv::cpu::instruction_set_for(p).kernels.refocus<S>();
}

}  // namespace

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
  const Tensor b = contiguous_of(basis);
  const Tensor r = contiguous_of(refocus);
  const Tensor transformed = empty(b, sizes_of(b));
  for_storage_dtype(basis, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto kernel = refocus_kernels<S>(p).forward;
    const S* b_data = data<S>(b);
    const S* r_data = data<S>(r);
    S* t_data = mutable_data<S>(transformed);
    parallel(p.kernels, p.row_length() * p.kernel_size(),
             [&](int64_t begin, int64_t end) { kernel(p, b_data, r_data, t_data, begin, end); });
  });
  return transformed;
}

namespace {

// dW_r from contiguous dW_t and W_b, into `grad_refocus`.
void refocus_backward_into(const RefocusProblem& p, const Tensor& grad, const Tensor& basis,
                           const Tensor& grad_refocus) {
  for_storage_dtype(basis, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto kernel = refocus_kernels<S>(p).backward;
    const S* g_data = data<S>(grad);
    const S* b_data = data<S>(basis);
    S* r_data = mutable_data<S>(grad_refocus);
    parallel(p.kernels, p.row_length() * p.kernel_size(),
             [&](int64_t begin, int64_t end) { kernel(p, g_data, b_data, r_data, begin, end); });
  });
}

RefocusProblem backward_problem(const Tensor& grad_transformed, const Tensor& basis, int64_t group_size,
                                int64_t map_size) {
  check_like(grad_transformed, basis, 4);
  STD_TORCH_CHECK(grad_transformed.numel() == basis.numel(), "grad_transformed must have the shape of basis");
  return refocus_problem(basis, group_size, map_size, false);
}

}  // namespace

Tensor refocus_weight_backward(const Tensor& grad_transformed, const Tensor& basis, int64_t group_size,
                               int64_t map_size) {
  const RefocusProblem p = backward_problem(grad_transformed, basis, group_size, map_size);
  const Tensor g = contiguous_of(grad_transformed), b = contiguous_of(basis);
  const Tensor grad_refocus = empty(b, {p.kernels, group_size, map_size, map_size});
  refocus_backward_into(p, g, b, grad_refocus);
  return grad_refocus;
}

Tensor refocus_weight_backward_over(const Tensor& grad_transformed, const Tensor& basis, int64_t group_size,
                                    int64_t map_size) {
  const RefocusProblem p = backward_problem(grad_transformed, basis, group_size, map_size);
  if (!cpu::is_dense_3x3(p) || !grad_transformed.is_contiguous()) {
    return refocus_weight_backward(grad_transformed, basis, group_size, map_size);
  }
  const int64_t size = map_size * map_size;
  const Tensor grad_refocus =
      reinterpret(grad_transformed, {p.kernels, 1, map_size, map_size}, {size, size, map_size, 1});
  refocus_backward_into(p, grad_transformed, contiguous_of(basis), grad_refocus);
  return grad_refocus;
}

namespace {

ThinProblem thin_problem(const Tensor& weight, const Tensor& factor, bool identity) {
  check_like(weight, weight, 4);
  check_like(factor, weight, 3);
  ThinProblem p{};
  p.kernels = weight.size(0) * weight.size(1);
  p.rank = factor.size(1), p.kernel_size = factor.size(2);
  p.identity = identity;
  STD_TORCH_CHECK(
      factor.size(0) > 0 && p.kernels % factor.size(0) == 0 && p.kernel_size == weight.size(2) * weight.size(3),
      "factor must be [groups, rank, kernel_h * kernel_w], groups a divisor of the number of 2-D kernels");
  p.group_size = p.kernels / factor.size(0);
  return p;
}

}  // namespace

Tensor thin_refocus_weight(const Tensor& basis, const Tensor& coordinates, const Tensor& factor, bool identity) {
  const ThinProblem p = thin_problem(basis, factor, identity);
  check_like(coordinates, basis, 2);
  STD_TORCH_CHECK(coordinates.size(0) == p.kernels && coordinates.size(1) == p.rank,
                  "coordinates must be [kernels, rank]");
  const Tensor b = contiguous_of(basis), e = contiguous_of(coordinates);
  const Tensor f = contiguous_of(factor), transformed = empty(b, sizes_of(b));
  for_storage_dtype(basis, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto kernel = cpu::instruction_set().kernels.thin<S>().forward;
    const S *b_data = data<S>(b), *e_data = data<S>(e), *f_data = data<S>(f);
    S* t_data = mutable_data<S>(transformed);
    parallel(p.kernels, p.rank * p.kernel_size,
             [&](int64_t begin, int64_t end) { kernel(p, b_data, e_data, f_data, t_data, begin, end); });
  });
  return transformed;
}

Tensor thin_refocus_weight_backward(const Tensor& grad_transformed, const Tensor& factor) {
  const ThinProblem p = thin_problem(grad_transformed, factor, false);
  const Tensor g = contiguous_of(grad_transformed), f = contiguous_of(factor);
  const Tensor grad_coordinates = empty(g, {p.kernels, p.rank});
  for_storage_dtype(g, [&](auto type) {
    using S = typename decltype(type)::type;
    const auto kernel = cpu::instruction_set().kernels.thin<S>().backward;
    const S *g_data = data<S>(g), *f_data = data<S>(f);
    S* e_data = mutable_data<S>(grad_coordinates);
    parallel(p.kernels, p.rank * p.kernel_size,
             [&](int64_t begin, int64_t end) { kernel(p, g_data, f_data, e_data, begin, end); });
  });
  return grad_coordinates;
}

}  // namespace refconv::bindings
