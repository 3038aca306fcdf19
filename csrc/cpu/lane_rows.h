// Rows of channels_last maps for loops that want neither edges nor types nor steps between pixels (lane_tiles.h): one
// vector of channels wide, converted to the compute type, one vector per pixel, with zeros on both sides.
#pragma once

#include "elements.h"
#include "lanes.h"
#include "scratch.h"

namespace refconv::cpu::REFCONV_ISA {

// The channels of another map that lanes meet where these are the channels [begin, begin + count) of one: a group has
// `own` channels in the one and `met` in the other. Lane i meets the channels first + index[i] + m, m < met.
template <typename T>
struct MetChannels {
  int64_t first, met, span;  // all of them are the `span` channels from `first` on
  Indices<T> index;

  MetChannels(int64_t begin, int64_t count, int64_t own, int64_t met)
      : first(begin / own * met), met(met), span(met), index{} {
    for (int64_t lane = 0, member = begin % own; lane < count; ++lane) {
      if (member == own) span += met, member = 0;
      index[lane] = static_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(span - met);
      ++member;
    }
  }
};

// Of `count` pixels, `step` apart, the channels index[lane] of their first `span`, which fit VECTORS vectors.
template <typename S, int VECTORS, typename T>
REFCONV_APART void choose_channels(const S* from, int64_t step, int64_t span, Indices<T> index, T* to, int64_t to_step,
                                   int64_t count) {
  constexpr int64_t kLane = kLanes<T>;
  for (int64_t j = 0; j < count; ++j, from += step, to += to_step) {
    if constexpr (VECTORS == 1) {
      store(to, choose<T>(span == kLane ? load(from) : load_partial(from, span), index));
    } else {
      const Vec<T> low = choose<T>(load(from), index), high = choose<T>(load_lanes(from + kLane, span - kLane), index);
      store(to, index < kLane ? low : high);
    }
  }
}

// The last few rows of a map, `rows` of them, each with `left` pixels of zeros before its `width` pixels and
// `pitch` in all. Of the pixels only those are taken that lie a multiple of `every` from the first zero: others no tap
// sees.
template <typename T>
class LaneRows {
  static constexpr int64_t kLane = kLanes<T>;

 public:
  LaneRows(int64_t rows, int64_t left, int64_t width, int64_t pitch, int64_t every = 1)
      : rows_(rows),
        left_(left),
        width_(width),
        pitch_(most(pitch, left + width)),
        every_(every),
        first_(round_up(left, every) - left),
        data_(rows * pitch_ * kLane) {}

  // Row h, from the zeros on.
  T* row(int64_t h) { return data_.data() + h % rows_ * pitch_ * kLane; }
  // Row h, from its first pixel on.
  T* pixels(int64_t h) { return row(h) + left_ * kLane; }

  // Row h becomes what is in memory from `from` on, `step` from pixel to pixel, of which `count` channels are wanted.
  template <typename S>
  void take(int64_t h, const S* from, int64_t step, int64_t count) {
    T* to = pixels(h);
    if (count >= kLane) {
      for (int64_t j = first_; j < width_; j += every_) store(to + j * kLane, load(from + j * step));
    } else {
      for (int64_t j = first_; j < width_; j += every_) store(to + j * kLane, load_partial(from + j * step, count));
    }
  }

  // Rows h * met to h * met + met - 1 become, in each lane, the channels that it meets, of the map whose first channel
  // is at `from`; the number of rows is a multiple of `met`. `scratch` holds a pixel of them.
  template <typename S>
  void take_met(int64_t h, const S* from, int64_t step, const MetChannels<T>& channels, T* scratch) {
    from += channels.first + first_ * step;
    T* to = pixels(h * channels.met) + first_ * kLane;
    const int64_t count = ceil_div(width_ - first_, every_), from_step = every_ * step, to_step = every_ * kLane;
    if (channels.span <= 2 * kLane) {
      const auto take = channels.span <= kLane ? choose_channels<S, 1, T> : choose_channels<S, 2, T>;
      Indices<T> index = channels.index;
      for (int64_t m = 0; m < channels.met; ++m, index += 1, to += pitch_ * kLane) {
        take(from, from_step, channels.span, index, to, to_step, count);
      }
      return;
    }
    for (int64_t j = 0; j < count; ++j, from += from_step, to += to_step) {
      const T* pixel;
      if constexpr (sizeof(S) == sizeof(T)) {
        pixel = from;
      } else {
        for (int64_t k = 0; k < channels.span; k += kLane) {
          store(scratch + k, load_lanes(from + k, channels.span - k));
        }
        pixel = scratch;
      }
      for (int64_t m = 0; m < channels.met; ++m) {
        T* row = to + m * pitch_ * kLane;
        for (int64_t lane = 0; lane < kLane; ++lane) row[lane] = pixel[static_cast<int64_t>(channels.index[lane]) + m];
      }
    }
  }

 private:
  int64_t rows_, left_, width_, pitch_, every_, first_;
  Scratch<T> data_;
};

}  // namespace refconv::cpu::REFCONV_ISA
