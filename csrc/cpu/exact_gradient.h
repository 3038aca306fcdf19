// dW where the fast loops found NaN or infinity.
#pragma once

#include "../problem.h"
#include "elements.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// dW of one output channel by the definition. The fast passes multiply padding by zero instead of leaving it out, so
// an infinite number makes NaN of taps that never meet it; such a channel is computed again.
template <typename S>
void exact_weight_gradient(const GroupedProblem& p, bool nhwc, const S* grad_y, const S* x, int64_t out_channel,
                           int64_t channel, S* grad) {
  const int64_t x_step = nhwc ? p.channels : 1, dy_step = nhwc ? p.out_channels() : 1;  // from pixel to pixel
  const int64_t x_first = channel * (nhwc ? 1 : p.in_size()), dy_first = out_channel * (nhwc ? 1 : p.out_size());
  for (int64_t a = 0; a < p.kernel_h; ++a) {
    for (int64_t b = 0; b < p.kernel_w; ++b) {
      double total = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        const S* source = x + n * p.channels * p.in_size() + x_first;
        const S* dy = grad_y + n * p.out_channels() * p.out_size() + dy_first;
        for (int64_t i = 0; i < p.out_h; ++i) {
          const int64_t h = i * p.stride_h - p.pad_h + a * p.dilation_h;
          if (h < 0 || h >= p.in_h) continue;
          for (int64_t j = 0; j < p.out_w; ++j) {
            const int64_t w = j * p.stride_w - p.pad_w + b * p.dilation_w;
            if (w < 0 || w >= p.in_w) continue;
            total += static_cast<double>(load_one(dy + (i * p.out_w + j) * dy_step)) *
                     load_one(source + (h * p.in_w + w) * x_step);
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
