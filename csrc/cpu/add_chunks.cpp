// dW and dbias from the sums over chunks of the pixels.
#include "elements.h"
#include "entry_points.h"
#include "exact_gradient.h"

namespace refconv::cpu::REFCONV_ISA {

template <typename S>
void add_chunks(const GroupedProblem& p, bool nhwc, const S* grad_y, const S* x, double* totals, int64_t chunks,
                S* grad_weight, S* grad_bias, int64_t begin, int64_t end) {
  const int64_t taps = p.group_taps(), groups = p.groups(), size = taps * groups + p.out_channels();
  const auto add = [&](double* sums, int64_t from, int64_t to) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const double* more = sums + chunk * size;
      for (int64_t k = from; k < to; ++k) sums[k] += more[k];
    }
  };
  for (int64_t t = 0; grad_weight != nullptr && t < taps; ++t) {
    double* sums = totals + t * groups;
    add(sums, begin, end);
    for (int64_t g = begin; g < end; ++g) store_one(grad_weight + g * taps + t, static_cast<Compute<S>>(sums[g]));
  }
  if (grad_bias != nullptr) {
    double* sums = totals + taps * groups;
    const int64_t first = begin * p.multiplier, last = end * p.multiplier;
    add(sums, first, last);
    for (int64_t c = first; c < last; ++c) store_one(grad_bias + c, static_cast<Compute<S>>(sums[c]));
  }
  for (int64_t g = begin; grad_weight != nullptr && g < end; ++g) {
    for (int64_t channels = 0; channels < p.multiplier * p.per_group; ++channels) {
      const double* sums = totals + channels * p.taps() * groups + g;
      bool finite = true;
      for (int64_t t = 0; t < p.taps(); ++t) finite = finite && is_finite(sums[t * groups]);
      if (finite) continue;
      const int64_t out = g * p.multiplier + channels / p.per_group, in = g * p.per_group + channels % p.per_group;
      exact_weight_gradient(p, nhwc, grad_y, x, out, in, grad_weight + g * taps + channels * p.taps());
    }
  }
}

REFCONV_INSTANTIATE_ADD_CHUNKS(float)
REFCONV_INSTANTIATE_ADD_CHUNKS(double)
REFCONV_INSTANTIATE_ADD_CHUNKS(BFloat16)
REFCONV_INSTANTIATE_ADD_CHUNKS(Half)

}  // namespace refconv::cpu::REFCONV_ISA
