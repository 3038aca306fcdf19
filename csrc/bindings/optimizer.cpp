// What an optimizer computes: tensors in, tensors out.
#include "operators.h"

namespace refconv::bindings {

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
  const Tensor m = contiguous_of(first), u = contiguous_of(root);
  const Tensor g = contiguous_of(gradient), q = contiguous_of(rotation);
  const Tensor direction = empty(m, sizes_of(m));
  const Tensor updated = empty(u, sizes_of(u));
  for_dtype(first, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = cpu::instruction_set().kernels.folded_adam<T>();
    parallel(p.rows, p.columns * (p.root_size() + 3 * p.rank), [&](int64_t begin, int64_t end) {
      kernel(p, data<T>(m), data<T>(u), data<T>(g), data<T>(q), mutable_data<T>(updated), mutable_data<T>(direction),
             begin, end);
    });
  });
  return {direction, updated};
}

void fused_sgd(const Tensor& basis, const Tensor& transformed, const Tensor& refocus, const Tensor& momentum_buffer,
               bool identity, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
               bool maximize, bool first) {
  check_like(refocus, basis, 4);
  check_like(transformed, basis, 4);
  const bool moves = momentum != 0;
  const FusedSgdProblem p{
      refocus_problem(basis, refocus.size(1), refocus.size(2), identity),
      lr,
      momentum,
      dampening,
      weight_decay,
      nesterov,
      maximize,
      first,
  };
  const RefocusProblem& t = p.transformation;
  STD_TORCH_CHECK(t.kernel_h == 3 && t.kernel_w == 3 && refocus.size(0) == t.kernels && refocus.size(3) == t.map_size &&
                      transformed.numel() == basis.numel() && (!moves || momentum_buffer.numel() == refocus.numel()),
                  "refocus must be [kernels, group_size, map_size, map_size] for 3x3 kernels, transformed as large as "
                  "basis and momentum_buffer as refocus");
  STD_TORCH_CHECK(momentum_buffer.scalar_type() == basis.scalar_type() && basis.is_contiguous() &&
                      transformed.is_contiguous() && refocus.is_contiguous() && momentum_buffer.is_contiguous(),
                  "all tensors must be contiguous and of one dtype");
  for_dtype(basis, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = cpu::instruction_set().kernels.fused_sgd<T>();
    const T* b = data<T>(basis);
    T *w = mutable_data<T>(transformed), *r = mutable_data<T>(refocus);
    T* m = moves ? mutable_data<T>(momentum_buffer) : nullptr;
    parallel(t.kernels, 2 * t.row_length() * 9, [&](int64_t begin, int64_t end) { kernel(p, b, w, r, m, begin, end); });
  });
}

}  // namespace refconv::bindings
