// dW where the fast loops found NaN or infinity.
#pragma once

#include "../problem.h"
#include "elements.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// dW of one output channel by the definition. The fast passes multiply padding by zero instead of leaving it out, so
// an infinite x makes NaN of taps that never see it; such a channel is computed again.
template <typename S>
void exact_weight_gradient(const GroupedProblem& p, const S* grad_y, const S* x, int64_t out_channel, int64_t channel,
                           S* grad) {
  for (int64_t a = 0; a < p.kernel_h; ++a) {
    for (int64_t b = 0; b < p.kernel_w; ++b) {
      double total = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        const S* source = x + (n * p.channels + channel) * p.in_size();
        const S* dy = grad_y + (n * p.out_channels() + out_channel) * p.out_size();
        for (int64_t i = 0; i < p.out_h; ++i) {
          const int64_t h = i * p.stride_h - p.pad_h + a * p.dilation_h;
          if (h < 0 || h >= p.in_h) continue;
          for (int64_t j = 0; j < p.out_w; ++j) {
            const int64_t w = j * p.stride_w - p.pad_w + b * p.dilation_w;
            if (w < 0 || w >= p.in_w) continue;
            total += static_cast<double>(load_one(dy + i * p.out_w + j)) * load_one(source + h * p.in_w + w);
          }
        }
      }
      store_one(grad + a * p.kernel_w + b, static_cast<Compute<S>>(total));
    }
  }
}

inline bool is_finite(double value) { return value - value == 0; }

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
