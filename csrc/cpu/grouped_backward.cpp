// Backward of a convolution with few channels per group, or one (depthwise), on NCHW planes: dx, dW and dbias in one
// pass.
//
// Equations: csrc/problem.h. Ownership: one input channel per task, over the whole batch, so that its dW is private
// to it, as is dbias to the first channel of a group, and summed in a fixed order: the result is the same for any
// number of threads. Bytes: reads x once and dy per_group times, writes dx once. Accumulation: dx in the compute type;
// dW and dbias in lanes of it, row by row and strip by strip within a plane, and in double over the planes of about a
// thousand terms.
#include "elements.h"
#include "entry_points.h"
#include "grouped_plane.h"
#include "scratch.h"
#include "simd.h"
#include "small_planes.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kTotalsBytes = 32768;  // of running weight gradients per thread: the first cache
constexpr int64_t kTermsInLanes = 1024;  // added up in one lane before they move on to a double

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

bool is_finite(double value) { return value - value == 0; }

template <typename S>
void backward_small(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                    S* grad_bias, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const bool streamed =
      grad_x != nullptr && streams(p.batch * p.channels * p.in_size() * static_cast<int64_t>(sizeof(S)));
  SmallPlanes<S> planes(p);
  Scratch<S> out(streamed ? kLane * p.in_size() : 0);
  Scratch<Vec<T>> lanes(kSmallTaps + 1);
  Scratch<double> total((kSmallTaps + 1) * kLane);
  for (int64_t count; begin < end; begin += count) {
    count = least(kLane, end - begin);
    planes.take_weight(weight + begin * p.taps(), count);
    total.clear();
    int64_t terms = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      const int64_t plane = n * p.channels + begin;
      S* target = grad_x != nullptr ? grad_x + plane * p.in_size() : nullptr;
      planes.backward(grad_y + plane * p.out_size(), x + plane * p.in_size(), streamed ? out.data() : target, count,
                      lanes.data());
      if (streamed) stream(target, out.data(), count * p.in_size());
      terms += p.out_size();
      if (terms < kTermsInLanes && n + 1 < p.batch) continue;
      terms = 0;
      for (int64_t k = 0; k < (kSmallTaps + 1) * kLane; ++k)
        total[k] += static_cast<double>(lanes[k / kLane][k % kLane]);
      lanes.clear();
    }
    for (int64_t r = 0; r < count; ++r) {
      if (grad_bias != nullptr) store_one(grad_bias + begin + r, static_cast<T>(total[kSmallTaps * kLane + r]));
      if (grad_weight == nullptr) continue;
      S* to = grad_weight + (begin + r) * kSmallTaps;
      bool finite = true;
      for (int64_t t = 0; t < kSmallTaps; ++t) {
        finite = finite && is_finite(total[t * kLane + r]);
        store_one(to + t, static_cast<T>(total[t * kLane + r]));
      }
      if (!finite) exact_weight_gradient(p, grad_y, x, begin + r, begin + r, to);
    }
  }
  if (streamed) end_streams();
}

}  // namespace

template <typename S>
void grouped_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                      S* grad_bias, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  if (has_small_planes(p)) return backward_small(p, grad_y, x, weight, grad_x, grad_weight, grad_bias, begin, end);
  Backward<S> backward(p);
  // A block of channels at a time: the planes of neighbouring channels lie side by side in memory, those of one
  // channel do not. Per output channel: its taps, then its bias.
  const int64_t totals = (p.taps() + 1) * kLane, per_channel = p.multiplier * totals;
  const int64_t fitting = kTotalsBytes / (per_channel * static_cast<int64_t>(sizeof(T) + sizeof(double)));
  const int64_t block = most(1, least(fitting, end - begin));
  Scratch<T> lanes(block * per_channel);
  Scratch<double> total(block * per_channel);
  Scratch<S> unwanted(grad_x == nullptr ? p.in_size() : 0);  // where dx goes when nobody wants it

  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = least(block, end - first);
    total.clear();
    int64_t terms = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      for (int64_t c = 0; c < count; ++c) {
        const int64_t plane = n * p.channels + first + c;
        S* dx = grad_x != nullptr ? grad_x + plane * p.in_size() : unwanted.data();
        const int64_t out_channel = (first + c) / p.per_group * p.multiplier, member = (first + c) % p.per_group;
        backward.run(x + plane * p.in_size(), dx, grad_y + (n * p.out_channels() + out_channel) * p.out_size(),
                     weight + (out_channel * p.per_group + member) * p.taps(), lanes.data() + c * per_channel,
                     grad_bias != nullptr && member == 0, c + 1 == count);
      }
      terms += backward.terms();
      if (terms < kTermsInLanes && n + 1 < p.batch) continue;
      terms = 0;
      for (int64_t k = 0; k < count * per_channel; ++k) total[k] += static_cast<double>(lanes[k]);
      lanes.clear();
    }
    for (int64_t k = 0; k < count * p.multiplier; ++k) {
      const int64_t channel = first + k / p.multiplier, member = channel % p.per_group;
      const int64_t out_channel = channel / p.per_group * p.multiplier + k % p.multiplier;
      const auto sum_of = [&](int64_t tap) {
        double sum = 0;
        for (int64_t lane = 0; lane < kLane; ++lane) sum += total[k * totals + tap * kLane + lane];
        return sum;
      };
      if (grad_bias != nullptr && member == 0) store_one(grad_bias + out_channel, static_cast<T>(sum_of(p.taps())));
      if (grad_weight == nullptr) continue;
      S* to = grad_weight + (out_channel * p.per_group + member) * p.taps();
      bool finite = true;
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        const double sum = sum_of(tap);
        finite = finite && is_finite(sum);
        store_one(to + tap, static_cast<T>(sum));
      }
      if (!finite) exact_weight_gradient(p, grad_y, x, out_channel, channel, to);
    }
  }
  end_streams();
}

REFCONV_INSTANTIATE_GROUPED_BACKWARD(float)
REFCONV_INSTANTIATE_GROUPED_BACKWARD(double)
REFCONV_INSTANTIATE_GROUPED_BACKWARD(BFloat16)
REFCONV_INSTANTIATE_GROUPED_BACKWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
