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
#include "exact_gradient.h"
#include "grouped_plane.h"
#include "lanes.h"
#include "planes_3x3.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kTotalsBytes = 32768;  // of running weight gradients per thread: the first cache
constexpr int64_t kTermsInLanes = 1024;  // added up in one lane before they move on to a double

// Goes through the planes of some channels, `images` images after each other, `together` channels at a time.
class Steps {
 public:
  Steps(const GroupedProblem& p, int64_t count, int64_t together, int64_t images)
      : batch_(p.batch),
        channels_(p.channels),
        together_(together),
        images_(images),
        count_(ceil_div(count, together)) {}
  // Through all channels.
  int64_t count() const { return count_; }
  // How many planes further the first one of the next step lies; zero where there is none.
  int64_t to_next(int64_t image, int64_t step) const {
    if (step + 1 < count_) return together_;
    return image + images_ < batch_ ? images_ * channels_ - step * together_ : 0;
  }

 private:
  const int64_t batch_, channels_, together_, images_, count_;
};

// The planes of channels `begin` to `end` - 1, each by `backward`, a Backward or Backward3x3.
template <typename S, typename PlaneBackward>
void backward_planes(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                     S* grad_bias, int64_t begin, int64_t end, PlaneBackward& backward) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  // A block of channels at a time: the planes of neighbouring channels lie side by side in memory, those of one
  // channel do not. Per output channel: its taps, then its bias; channels that are computed together share the lanes.
  const int64_t together = backward.together(), own_lanes = kLane / together;
  const int64_t at_once = backward.images(kTermsInLanes);
  const int64_t totals = (p.taps() + 1) * kLane, per_step = p.multiplier * totals;
  const int64_t fitting = kTotalsBytes / (per_step * static_cast<int64_t>(sizeof(T) + sizeof(double))) * together;
  const int64_t block = most(together, least(fitting, end - begin)), per_block = ceil_div(block, together) * per_step;
  Scratch<T> lanes(per_block);
  Scratch<double> total(per_block);
  Scratch<S> unwanted(grad_x == nullptr ? together * p.in_size() : 0);  // where dx goes when nobody wants it

  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = least(block, end - first);
    const Steps steps(p, count, together, at_once);
    total.clear();
    int64_t terms = 0;
    for (int64_t n = 0, images; n < p.batch; n += images) {
      images = least(at_once, p.batch - n);
      int64_t group = first / p.per_group, member = first % p.per_group;
      for (int64_t step = 0; step < steps.count(); ++step) {
        const int64_t channel = first + step * together, plane = n * p.channels + channel;
        S* dx = grad_x != nullptr ? grad_x + plane * p.in_size() : unwanted.data();
        const int64_t out_channel = group * p.multiplier;
        backward.run(x + plane * p.in_size(), dx, grad_y + (n * p.out_channels() + out_channel) * p.out_size(),
                     weight + (out_channel * p.per_group + member) * p.taps(), lanes.data() + step * per_step,
                     grad_bias != nullptr && member == 0, least(together, first + count - channel), images,
                     steps.to_next(n, step));
        member += together;  // one where a group has several channels
        if (member >= p.per_group) member = 0, group += together;
      }
      terms += images * backward.terms();
      if (terms + at_once * backward.terms() <= kTermsInLanes && n + images < p.batch) continue;
      terms = 0;
      for (int64_t k = 0; k < per_block; ++k) total[k] += static_cast<double>(lanes[k]);
      lanes.clear();
    }
    for (int64_t k = 0; k < count * p.multiplier; ++k) {
      const int64_t c = k / p.multiplier, m = k % p.multiplier, channel = first + c, member = channel % p.per_group;
      const int64_t out_channel = channel / p.per_group * p.multiplier + m;
      const double* sums = total.data() + c / together * per_step + m * totals + c % together * own_lanes;
      if (grad_bias != nullptr && member == 0)
        store_one(grad_bias + out_channel, static_cast<T>(sum_of(sums + p.taps() * kLane, own_lanes)));
      if (grad_weight == nullptr) continue;
      S* to = grad_weight + (out_channel * p.per_group + member) * p.taps();
      bool finite = true;
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        const double sum = sum_of(sums + tap * kLane, own_lanes);
        finite = finite && is_finite(sum);
        store_one(to + tap, static_cast<T>(sum));
      }
      if (!finite) exact_weight_gradient(p, false, grad_y, x, out_channel, channel, to);
    }
  }
  end_streams();
}

template <typename S, int STRIDE>
void backward_3x3(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                  S* grad_bias, int64_t begin, int64_t end) {
  Backward3x3<S, STRIDE> backward(p, grad_x);
  backward_planes(p, grad_y, x, weight, grad_x, grad_weight, grad_bias, begin, end, backward);
}

}  // namespace

template <typename S>
void grouped_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                      S* grad_bias, int64_t begin, int64_t end) {
  if (has_planes_3x3(p)) {
    const auto run = p.stride_h == 1 ? backward_3x3<S, 1> : backward_3x3<S, 2>;
    return run(p, grad_y, x, weight, grad_x, grad_weight, grad_bias, begin, end);
  }
  Backward<S> backward(p);
  backward_planes(p, grad_y, x, weight, grad_x, grad_weight, grad_bias, begin, end, backward);
}

REFCONV_INSTANTIATE_GROUPED_BACKWARD(float)
REFCONV_INSTANTIATE_GROUPED_BACKWARD(double)
REFCONV_INSTANTIATE_GROUPED_BACKWARD(BFloat16)
REFCONV_INSTANTIATE_GROUPED_BACKWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
