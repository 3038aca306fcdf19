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

}  // namespace refconv::bindings
