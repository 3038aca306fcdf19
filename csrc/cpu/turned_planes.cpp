// Convolution of small NCHW planes: the planes of some groups are turned, so that lanes are channels, convolved, and
// turned back.
//
// Rows of a few pixels leave lanes idle, and whatever is done per plane (copying, weights, sums over lanes) outweighs
// its multiply-adds. Turned, a block of planes shares all of it, dW needs no sum over lanes, and a row has no tail.
// Ownership: groups of some images, with sums of dW and dbias over those. A group's results do not depend on the others
// of its block. Accumulation: in the compute type; dW and dbias in double over a few hundred pixels.
#include "elements.h"
#include "entry_points.h"
#include "scratch.h"
#include "streaming.h"
#include "turn.h"
#include "turned_maps.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kTermsInLanes = 256;  // added up in one lane before they move on to a double

// The groups of one block: what is turned in and out, and what is fetched meanwhile. MAPS: ImageMaps or PaddedMaps.
template <typename S, typename Maps>
class Block {
  using T = Compute<S>;
  static constexpr int64_t kLane = kLanes<T>;

 public:
  Block(const GroupedProblem& p, bool backward)
      : p_(p),
        groups_(Maps::groups_at_once(p)),
        in_(groups_ * p.per_group),
        out_(groups_ * p.multiplier),
        maps_(p, backward),
        weight_(p.per_group * p.taps() * out_),
        bias_(out_) {}

  int64_t groups() const { return groups_; }  // at most
  int64_t in() const { return in_; }          // their channels
  int64_t out() const { return out_; }

  // Of `groups` groups, for forward(); bias may be null.
  void take_weight(const S* weight, const S* bias, int64_t groups) {
    const int64_t size = p_.per_group * p_.taps(), count = groups * p_.multiplier;
    turn_rows<S>(count, size, [&](int64_t lane) { return weight + lane * size; }, weight_.data(), out_);
    for (int64_t c = 0; bias != nullptr && c < count; c += kLane) {
      store(bias_.data() + c, load_lanes(bias + c, count - c));
    }
  }
  // The same for backward(), where lanes are input channels (TapMajor).
  void take_weight_back(const S* weight, int64_t groups) {
    const int64_t taps = p_.taps();
    for (int64_t k = 0; k < p_.multiplier; ++k) {
      const auto run = [&](int64_t lane) {
        const int64_t out = lane / p_.per_group * p_.multiplier + k;
        return weight + (out * p_.per_group + lane % p_.per_group) * taps;
      };
      turn_rows<S>(groups * p_.per_group, taps, run, weight_.data() + k * taps * in_, in_);
    }
  }

  // `ahead` planes of x further are the next ones, none if zero.
  void forward(const S* x, S* y, int64_t groups, int64_t ahead, bool fetch_y) {
    const int64_t in_size = p_.in_size(), out_size = p_.out_size();
    take(x, in_size, groups * p_.per_group, in_, ahead, fetch_y ? y : nullptr, out_size,
         [&](int64_t k, int64_t c) { return maps_.x(k, c); });
    maps_.forward({weight_.data(), out_}, bias_.data());
    give(y, out_size, groups * p_.multiplier, [&](int64_t k, int64_t c) { return maps_.y(k, c); });
  }

  // dx, unless null; adds to the sums of dW, and of dbias unless null. added(n) is called whenever they got up to n
  // more terms. The next images are `ahead` further, none if zero.
  template <typename Added>
  void backward(const S* grad_y, const S* x, S* grad_x, int64_t groups, int64_t ahead, bool fetch_dx, TapMajor<T> total,
                T* total_bias, const Added& added) {
    const int64_t in_size = p_.in_size(), out_size = p_.out_size();
    const int64_t in = groups * p_.per_group, out = groups * p_.multiplier;
    take(x, in_size, in, in_, ahead * p_.channels, fetch_dx ? grad_x : nullptr, in_size,
         [&](int64_t k, int64_t c) { return maps_.x(k, c); });
    take(grad_y, out_size, out, out_, ahead * p_.out_channels(), nullptr, 0,
         [&](int64_t k, int64_t c) { return maps_.y(k, c); });
    maps_.backward({weight_.data(), in_}, total, added);
    for (int64_t k = 0; total_bias != nullptr && k < out_size;) {
      const int64_t first = k, terms = least(kTermsInLanes, out_size - k);
      for (int64_t c = 0; c < out_; c += kLane) {
        Vec<T> sum = load(total_bias + c);
        for (k = first; k < first + terms; ++k) sum += load(maps_.y(k, c));
        store(total_bias + c, sum);
      }
      added(terms);
    }
    if (grad_x != nullptr) give(grad_x, in_size, in, [&](int64_t k, int64_t c) { return maps_.dx(k, c); });
  }

 private:
  // `count` planes into a map of `all` channels, where pixel k is at place(k, channel) from that channel on. Fetches
  // what is `ahead` planes further, and `out`.
  template <typename Place>
  void take(const S* from, int64_t size, int64_t count, int64_t all, int64_t ahead, const S* out, int64_t out_size,
            const Place& place) {
    for (int64_t c = 0; c < all; c += kLane) {
      const S* planes = from + c * size;
      turn_in<S>({planes, size, least(kLane, count - c), ahead != 0 && c < count ? planes + ahead * size : nullptr,
                  out != nullptr && c < count ? out + c * out_size : nullptr, out_size},
                 [&](int64_t k, Vec<T> v) { store(place(k, c), v); });
    }
  }
  template <typename Place>
  void give(S* to, int64_t size, int64_t count, const Place& place) {
    for (int64_t c = 0; c < count; c += kLane) {
      turn_out([&](int64_t k) { return load(place(k, c)); }, size, least(kLane, count - c), to + c * size);
    }
  }

  const GroupedProblem& p_;
  const int64_t groups_, in_, out_;
  Maps maps_;
  Scratch<T> weight_, bias_;
};

// Outputs of `channels` planes of `size` pixels, in blocks of so many.
template <typename S>
bool streams_planes(const GroupedProblem& p, int64_t channels, int64_t size, int64_t block) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(S));
  return streams(p.batch * channels * bytes, least(block, channels) * bytes);
}

template <typename S, typename Maps>
void forward_blocks(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                    int64_t end) {
  Block<S, Maps> block(p, false);
  const bool streamed = streams_planes<S>(p, p.out_channels(), p.out_size(), block.out());
  Scratch<S> out(streamed ? block.out() * p.out_size() : 0);
  for (int64_t held = -1, held_end = -1, count; begin < end; begin += count) {
    // All images of a block before the next one.
    const int64_t first = begin / p.batch / block.groups() * block.groups();
    const int64_t groups = least(block.groups(), p.groups() - first), within = begin - first * p.batch;
    const int64_t n = within / groups, group = first + within % groups;
    count = least(first + groups - group, end - begin);
    if (group != held || group + count != held_end) {
      block.take_weight(weight + group * p.group_taps(), bias != nullptr ? bias + group * p.multiplier : nullptr,
                        count);
      held = group, held_end = group + count;
    }
    S* target = y + (n * p.out_channels() + group * p.multiplier) * p.out_size();
    block.forward(x + (n * p.channels + group * p.per_group) * p.in_size(), streamed ? out.data() : target, count,
                  n + 1 < p.batch ? p.channels : 0, !streamed);
    if (streamed) stream(target, out.data(), count * p.multiplier * p.out_size());
  }
  if (streamed) end_streams();
}

template <typename S, typename Maps>
void backward_blocks(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                     int64_t chunks, bool need_bias, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const int64_t rows = p.multiplier * p.taps();  // of sums of dW; then those of dbias
  Block<S, Maps> block(p, true);
  const bool streamed = grad_x != nullptr && streams_planes<S>(p, p.channels, p.in_size(), block.in());
  Scratch<S> out(streamed ? block.in() * p.in_size() : 0);
  Scratch<T> lanes(rows * block.in() + block.out());
  T* const bias_lanes = lanes.data() + rows * block.in();
  for (int64_t count; begin < end; begin += count) {
    const int64_t chunk = begin / p.groups(), group = begin % p.groups();
    count = least(block.groups(), least(end - begin, p.groups() - group));
    const int64_t channel = group * p.per_group, in = count * p.per_group;
    const int64_t out_channel = group * p.multiplier, outs = count * p.multiplier;
    block.take_weight_back(weight + group * p.group_taps(), count);
    double* sums = totals + chunk * (rows * p.channels + p.out_channels());
    double* bias_sums = sums + rows * p.channels + out_channel;
    sums += channel;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < in; ++c) sums[t * p.channels + c] = 0;
    }
    for (int64_t c = 0; c < outs; ++c) bias_sums[c] = 0;
    int64_t terms = 0;
    const auto move_on = [&] {
      terms = 0;
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t c = 0; c < in; ++c) sums[t * p.channels + c] += static_cast<double>(lanes[t * block.in() + c]);
      }
      for (int64_t c = 0; c < outs; ++c) bias_sums[c] += static_cast<double>(bias_lanes[c]);
      lanes.clear();
    };
    const auto added = [&](int64_t more) {
      terms += more;
      if (terms >= kTermsInLanes) move_on();
    };
    const int64_t last = p.batch * (chunk + 1) / chunks;
    for (int64_t n = p.batch * chunk / chunks; n < last; ++n) {
      const int64_t plane = n * p.channels + channel;
      S* target = grad_x != nullptr ? grad_x + plane * p.in_size() : nullptr;
      block.backward(grad_y + (n * p.out_channels() + out_channel) * p.out_size(), x + plane * p.in_size(),
                     streamed ? out.data() : target, count, n + 1 < p.batch ? 1 : 0, !streamed,
                     {lanes.data(), block.in()}, need_bias ? bias_lanes : nullptr, added);
      if (streamed) stream(target, out.data(), in * p.in_size());
    }
    move_on();
  }
  if (streamed) end_streams();
}

// Whether a problem is so small, padding included, that pixel by pixel is faster than row by row.
bool is_tiny_3x3(const GroupedProblem& p) {
  return p.per_group == 1 && p.multiplier == 1 && p.kernel_h == 3 && p.kernel_w == 3 &&
         (p.in_h + 2 * p.pad_h) * (p.in_w + 2 * p.pad_w) <= 256;
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
