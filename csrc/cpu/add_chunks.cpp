// dW and dbias from the sums over chunks of the pixels.
#include "elements.h"
#include "entry_points.h"
#include "exact_gradient.h"

namespace refconv::cpu::REFCONV_ISA {

template <typename S>
void add_chunks(const GroupedProblem& p, bool nhwc, const S* grad_y, const S* x, double* totals, int64_t chunks,
                S* grad_weight, S* grad_bias, int64_t begin, int64_t end) {
  const int64_t size = (p.taps() + 1) * p.channels;
  for (int64_t t = grad_weight != nullptr ? 0 : p.taps(); t < p.taps() + (grad_bias != nullptr ? 1 : 0); ++t) {
    double* sums = totals + t * p.channels;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const double* more = sums + chunk * size;
      for (int64_t c = begin; c < end; ++c) sums[c] += more[c];
    }
    S* to = t < p.taps() ? grad_weight + t : grad_bias;
    const int64_t step = t < p.taps() ? p.taps() : 1;
    for (int64_t c = begin; c < end; ++c) store_one(to + c * step, static_cast<Compute<S>>(sums[c]));
  }
  for (int64_t c = begin; grad_weight != nullptr && c < end; ++c) {
    bool finite = true;
    for (int64_t t = 0; t < p.taps(); ++t) finite = finite && is_finite(totals[t * p.channels + c]);
    if (!finite) exact_weight_gradient(p, nhwc, grad_y, x, c, c, grad_weight + c * p.taps());
  }
}

REFCONV_INSTANTIATE_ADD_CHUNKS(float)
REFCONV_INSTANTIATE_ADD_CHUNKS(double)
REFCONV_INSTANTIATE_ADD_CHUNKS(BFloat16)
REFCONV_INSTANTIATE_ADD_CHUNKS(Half)

}  // namespace refconv::cpu::REFCONV_ISA
