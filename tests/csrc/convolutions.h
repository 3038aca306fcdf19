// Problems of a convolution, and all their results by loops written from the equations in csrc/problem.h, in double.
#pragma once

#include "checks.h"

using refconv::GroupedProblem;

// Calls visit(out index, in index, weight index) for every term of the convolution.
template <typename Visit>
void for_each_term(const GroupedProblem& p, const Visit& visit) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t co = 0; co < p.out_channels(); ++co)
      for (int64_t i = 0; i < p.out_h; ++i)
        for (int64_t j = 0; j < p.out_w; ++j)
          for (int64_t a = 0; a < p.kernel_h; ++a)
            for (int64_t b = 0; b < p.kernel_w; ++b) {
              const int64_t h = i * p.stride_h - p.pad_h + a * p.dilation_h;
              const int64_t w = j * p.stride_w - p.pad_w + b * p.dilation_w;
              if (h < 0 || h >= p.in_h || w < 0 || w >= p.in_w) continue;
              for (int64_t m = 0; m < p.per_group; ++m) {
                const int64_t ci = co / p.multiplier * p.per_group + m;
                visit(((n * p.out_channels() + co) * p.out_h + i) * p.out_w + j,
                      ((n * p.channels + ci) * p.in_h + h) * p.in_w + w,
                      ((co * p.per_group + m) * p.kernel_h + a) * p.kernel_w + b);
              }
            }
}

// All results of one problem, in NCHW.
struct Expected {
  std::vector<double> y, y_biased, dx, dw, db;

  template <typename T>
  Expected(const GroupedProblem& p, const T* x, const T* w, const T* bias, const T* grad)
      : y(p.batch * p.out_channels() * p.out_size()),
        dx(p.batch * p.channels * p.in_size()),
        dw(p.out_channels() * p.per_group * p.taps()),
        db(p.out_channels()) {
    // So many terms that a double would be no better than what is tested.
    std::vector<long double> sums(dw.size()), bias_sums(db.size());
    for_each_term(p, [&](int64_t o, int64_t i, int64_t t) {
      y[o] += value(w[t]) * value(x[i]);
      dx[i] += value(w[t]) * value(grad[o]);
      sums[t] += value(x[i]) * value(grad[o]);
    });
    dw.assign(sums.begin(), sums.end());
    y_biased = y;
    for (size_t o = 0; o < y.size(); ++o) {
      const int64_t channel = static_cast<int64_t>(o) / p.out_size() % p.out_channels();
      bias_sums[channel] += value(grad[o]);
      y_biased[o] += value(bias[channel]);
    }
    db.assign(bias_sums.begin(), bias_sums.end());
  }
};

inline GroupedProblem depthwise(int64_t channels, int64_t multiplier, int64_t in_h, int64_t in_w, int64_t kernel_h,
                                int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                                int64_t dilation_h, int64_t dilation_w) {
  GroupedProblem p{2,        channels, multiplier, in_h,  in_w,  0,          0,         kernel_h,
                   kernel_w, stride_h, stride_w,   pad_h, pad_w, dilation_h, dilation_w};
  p.out_h = (in_h + 2 * pad_h - (kernel_h - 1) * dilation_h - 1) / stride_h + 1;
  p.out_w = (in_w + 2 * pad_w - (kernel_w - 1) * dilation_w - 1) / stride_w + 1;
  return p;
}

// The same with `per_group` input channels per group, `groups` groups.
inline GroupedProblem grouped(int64_t groups, int64_t per_group, GroupedProblem p) {
  p.channels = groups * per_group;
  p.per_group = per_group;
  return p;
}
