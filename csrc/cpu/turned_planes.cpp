// Depthwise convolution of small NCHW planes: a block of channels at a time is turned, so that lanes are channels,
// convolved, and turned back.
//
// Rows of a few pixels leave lanes idle, and whatever is done per plane (copying, weights, sums over lanes) outweighs
// its multiply-adds. Turned, a block of planes shares all of it, dW needs no sum over lanes, and a row has no tail.
// Ownership: forward, planes; backward, channels, with sums of dW and dbias over some of the images. A lane sees its
// own channel only, so results do not depend on the blocks. Accumulation: in the compute type; dW and dbias in double
// over a few hundred pixels.
#include "elements.h"
#include "entry_points.h"
#include "scratch.h"
#include "streaming.h"
#include "turn.h"
#include "turned_maps.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kTermsInLanes = 256;  // added up in one lane before they move on to a double

// One block of channels: what is turned in and out, and what is fetched meanwhile. MAPS: ImageMaps or PaddedMaps.
template <typename S, typename Maps>
class Block {
  using T = Compute<S>;
  static constexpr int64_t kLane = kLanes<T>;

 public:
  Block(const GroupedProblem& p, bool backward) : p_(p), maps_(p, backward), weight_(p.taps() * kLane), bias_(kLane) {}

  // Of `count` channels; bias may be null.
  void take_weight(const S* weight, const S* bias, int64_t count) {
    turn_in<S>({weight, p_.taps(), count, nullptr, nullptr, 0},
               [&](int64_t t, Vec<T> v) { store(weight_.data() + t * kLane, v); });
    if (bias != nullptr) store(bias_.data(), load_lanes(bias, count));
  }

  // `next` are the planes of x that follow.
  void forward(const S* x, const S* next, S* y, int64_t count, bool fetch_y) {
    turn_in<S>({x, p_.in_size(), count, next, fetch_y ? y : nullptr, p_.out_size()},
               [&](int64_t k, Vec<T> v) { store(maps_.x(k), v); });
    maps_.forward({weight_.data(), kLane}, bias_.data());
    turn_out([&](int64_t k) { return load(maps_.y(k)); }, p_.out_size(), count, y);
  }

  // dx of `count` planes, unless null; adds to the sums of dW, and of dbias unless null. added(n) is called whenever
  // they got up to n more terms. The planes that follow, if any, are `step` planes further.
  template <typename Added>
  void backward(const S* grad_y, const S* x, S* grad_x, int64_t count, int64_t step, bool fetch_dx, TapMajor<T> total,
                T* total_bias, const Added& added) {
    const int64_t in_size = p_.in_size(), out_size = p_.out_size();
    const S *next_x = step != 0 ? x + step * in_size : nullptr, *next_dy = grad_y + step * out_size;
    turn_in<S>({x, in_size, count, next_x, fetch_dx ? grad_x : nullptr, in_size},
               [&](int64_t k, Vec<T> v) { store(maps_.x(k), v); });
    turn_in<S>({grad_y, out_size, count, step != 0 ? next_dy : nullptr, nullptr, 0},
               [&](int64_t k, Vec<T> v) { store(maps_.y(k), v); });
    maps_.backward({weight_.data(), kLane}, total, added);
    for (int64_t k = 0; total_bias != nullptr && k < out_size;) {
      const int64_t terms = least(kTermsInLanes, out_size - k);
      Vec<T> sum = load(total_bias);
      for (const int64_t last = k + terms; k < last; ++k) sum += load(maps_.y(k));
      store(total_bias, sum);
      added(terms);
    }
    if (grad_x != nullptr) turn_out([&](int64_t k) { return load(maps_.dx(k)); }, in_size, count, grad_x);
  }

 private:
  const GroupedProblem& p_;
  Maps maps_;
  Scratch<T> weight_, bias_;
};

template <typename S>
bool streams_planes(const GroupedProblem& p, int64_t size) {
  return streams(p.batch * p.channels * size * static_cast<int64_t>(sizeof(S)));
}

template <typename S, typename Maps>
void forward_blocks(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                    int64_t end) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  const bool streamed = streams_planes<S>(p, p.out_size());
  Block<S, Maps> block(p, false);
  Scratch<S> out(streamed ? kLane * p.out_size() : 0);
  while (begin < end) {
    const int64_t channel = begin % p.channels, count = least(kLane, least(end - begin, p.channels - channel));
    block.take_weight(weight + channel * p.taps(), bias != nullptr ? bias + channel : nullptr, count);
    S* target = y + begin * p.out_size();
    S* to = streamed ? out.data() : target;
    const S* from = x + begin * p.in_size();
    block.forward(from, begin + count < end ? from + count * p.in_size() : nullptr, to, count, !streamed);
    if (streamed) stream(target, to, count * p.out_size());
    begin += count;
  }
  if (streamed) end_streams();
}

template <typename S, typename Maps>
void backward_blocks(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                     int64_t chunks, bool need_bias, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const bool streamed = grad_x != nullptr && streams_planes<S>(p, p.in_size());
  const int64_t rows = p.taps() + 1;  // of the sums: those of dW, then dbias
  Block<S, Maps> block(p, true);
  Scratch<S> out(streamed ? kLane * p.in_size() : 0);
  Scratch<T> lanes(rows * kLane);
  for (int64_t count; begin < end; begin += count) {
    const int64_t chunk = begin / p.channels, channel = begin % p.channels;
    count = least(kLane, least(end - begin, p.channels - channel));
    block.take_weight(weight + channel * p.taps(), nullptr, count);
    double* sums = totals + chunk * rows * p.channels + channel;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t r = 0; r < count; ++r) sums[t * p.channels + r] = 0;
    }
    const int64_t last = p.batch * (chunk + 1) / chunks;
    int64_t terms = 0;
    const auto move_on = [&] {
      terms = 0;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t r = 0; r < count; ++r) sums[t * p.channels + r] += static_cast<double>(lanes[t * kLane + r]);
      }
      lanes.clear();
    };
    const auto added = [&](int64_t more) {
      terms += more;
      if (terms >= kTermsInLanes) move_on();
    };
    for (int64_t n = p.batch * chunk / chunks; n < last; ++n) {
      const int64_t plane = n * p.channels + channel;
      S* target = grad_x != nullptr ? grad_x + plane * p.in_size() : nullptr;
      block.backward(grad_y + plane * p.out_size(), x + plane * p.in_size(), streamed ? out.data() : target, count,
                     n + 1 < p.batch ? p.channels : 0, !streamed, {lanes.data(), kLane},
                     need_bias ? lanes.data() + p.taps() * kLane : nullptr, added);
      if (streamed) stream(target, out.data(), count * p.in_size());
    }
    move_on();
  }
  if (streamed) end_streams();
}

// Whether a problem is so small, padding included, that pixel by pixel is faster than row by row.
bool is_tiny_3x3(const GroupedProblem& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && (p.in_h + 2 * p.pad_h) * (p.in_w + 2 * p.pad_w) <= 256;
}

}  // namespace

template <typename S>
void turned_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                    int64_t end) {
  using T = Compute<S>;
  const auto run = is_tiny_3x3(p) ? forward_blocks<S, PaddedMaps<T>> : forward_blocks<S, ImageMaps<T>>;
  run(p, x, weight, bias, y, begin, end);
}

template <typename S>
void turned_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                     int64_t chunks, bool, bool need_bias, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const auto run = is_tiny_3x3(p) ? backward_blocks<S, PaddedMaps<T>> : backward_blocks<S, ImageMaps<T>>;
  run(p, grad_y, x, weight, grad_x, totals, chunks, need_bias, begin, end);
}

REFCONV_INSTANTIATE_TURNED(float)
REFCONV_INSTANTIATE_TURNED(double)
REFCONV_INSTANTIATE_TURNED(BFloat16)
REFCONV_INSTANTIATE_TURNED(Half)

}  // namespace refconv::cpu::REFCONV_ISA
