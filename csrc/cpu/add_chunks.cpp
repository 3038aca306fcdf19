// dW and dbias from the sums over chunks of the pixels.
#include "elements.h"
#include "entry_points.h"
#include "exact_gradient.h"

namespace refconv::cpu::REFCONV_ISA {

template <typename S>
void add_chunks(const GroupedProblem& p, bool nhwc, const S* grad_y, const S* x, double* totals, int64_t chunks,
                S* grad_weight, S* grad_bias, int64_t begin, int64_t end) {
  const int64_t taps = p.taps(), rows = p.multiplier * taps, size = rows * p.channels + p.out_channels();
  const auto add = [&](double* sums, int64_t from, int64_t to) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const double* more = sums + chunk * size;
      for (int64_t k = from; k < to; ++k) sums[k] += more[k];
    }
  };
  for (int64_t t = 0; grad_weight != nullptr && t < rows; ++t) {
    add(totals + t * p.channels, begin * p.per_group, end * p.per_group);
  }
  for (int64_t pair = begin * p.multiplier * p.per_group;
       grad_weight != nullptr && pair < end * p.multiplier * p.per_group; ++pair) {
    const int64_t out = pair / p.per_group, in = out / p.multiplier * p.per_group + pair % p.per_group;
    const double* sums = totals + out % p.multiplier * taps * p.channels + in;
    S* dw = grad_weight + pair * taps;
    bool finite = true;
    for (int64_t t = 0; t < taps; ++t) {
      const double sum = sums[t * p.channels];
      store_one(dw + t, static_cast<Compute<S>>(sum));
      finite = finite && is_finite(sum);
    }
    if (!finite) exact_weight_gradient(p, nhwc, grad_y, x, out, in, dw);
  }
  if (grad_bias != nullptr) {
    double* sums = totals + rows * p.channels;
    const int64_t first = begin * p.multiplier, last = end * p.multiplier;
    add(sums, first, last);
    for (int64_t c = first; c < last; ++c) store_one(grad_bias + c, static_cast<Compute<S>>(sums[c]));
  }
}

REFCONV_INSTANTIATE_ADD_CHUNKS(float)
REFCONV_INSTANTIATE_ADD_CHUNKS(double)
REFCONV_INSTANTIATE_ADD_CHUNKS(BFloat16)
REFCONV_INSTANTIATE_ADD_CHUNKS(Half)

}  // namespace refconv::cpu::REFCONV_ISA
