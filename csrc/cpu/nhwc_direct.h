// Forward of a depthwise convolution on channels_last maps without a copy of their rows: for kernels that meet a pixel
// so few times that the copy would be most of the work. Pixels are read where they are, all channels of some outputs
// after each other, in the order of memory; outputs whose taps lie partly outside are computed one by one.
#pragma once

#include "nhwc.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// The taps that some outputs in a row meet: `rows` rows of `columns`, and what lies ahead.
template <typename S>
struct DirectTaps {
  const S* from;  // what the first output meets at the first of them, first channel
  int64_t rows, row_step, columns, column_step, pixel_step;
  TapMajor<const Compute<S>> weight;  // of the first of them
  int64_t weight_row_step;
};

// PIXELS outputs of a row, the channels [first, last) of each, whole vectors or, unless FULL, less than one.
template <typename S, int PIXELS, bool FULL>
REFCONV_INLINE void correlate_direct(const DirectTaps<S>& taps, const S* bias, S* to, int64_t to_step, int64_t first,
                                     int64_t last, Maps maps, Next<S>& next_x, Next<S>& next_y) {
  using T = Compute<S>;
  for (int64_t c = first; c < last; c += kLanes<T>) {
    const int64_t count = last - c;
    const Vec<T> start = bias != nullptr ? load_channels<FULL>(bias + c, count) : Vec<T>{};
    Vec<T> sum[PIXELS];
#pragma GCC unroll 8
    for (int n = 0; n < PIXELS; ++n) sum[n] = start;
    const S* row = taps.from + c;
    const T* weight_row = taps.weight.at(0, c);
    for (int64_t a = 0; a < taps.rows; ++a, row += taps.row_step, weight_row += taps.weight_row_step) {
      const S* from = row;
      const T* weight = weight_row;
      for (int64_t b = 0; b < taps.columns; ++b, from += taps.column_step, weight += taps.weight.step) {
        const Vec<T> w = in_register(load(weight));
#pragma GCC unroll 8
        for (int n = 0; n < PIXELS; ++n) sum[n] += w * load_channels<FULL>(from + n * taps.pixel_step, count);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < PIXELS; ++n) store_channels<FULL>(to + n * to_step + c, sum[n], count, maps);
    next_x.fetch(PIXELS), next_y.fetch(PIXELS);
  }
}

template <typename S, int PIXELS>
void correlate_direct(const DirectTaps<S>& taps, const S* bias, S* to, int64_t channels, Maps maps, Next<S>& next_x,
                      Next<S>& next_y) {
  const int64_t whole = channels / kLanes<Compute<S>> * kLanes<Compute<S>>;
  correlate_direct<S, PIXELS, true>(taps, bias, to, channels, 0, whole, maps, next_x, next_y);
  if (whole < channels) {
    correlate_direct<S, PIXELS, false>(taps, bias, to, channels, whole, channels, maps, next_x, next_y);
  }
}

// Whether every pixel meets some tap.
inline bool sees_all_pixels(const GroupedProblem& p) {
  const auto sees_all = [](int64_t taps, int64_t stride, int64_t dilation) {
    return taps >= stride && gcd(stride, dilation) == 1;
  };
  return sees_all(p.kernel_h, p.stride_h, p.dilation_h) && sees_all(p.kernel_w, p.stride_w, p.dilation_w);
}

// Row i of y, of one image.
template <typename S>
void direct_row(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* x, const S* bias, S* y, int64_t i,
                Maps maps) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t x_pitch = p.in_w * p.channels, h = i * p.stride_h - p.pad_h;
  int64_t top, bottom;
  clip(h, p.dilation_h, p.in_h, p.kernel_h, &top, &bottom);
  S* to = y + i * p.out_w * p.channels;
  const int64_t after = least(p.in_h, h + (p.kernel_h - 1) * p.dilation_h + 1);
  // Whole rows are fetched, which would cost more than it saves if only parts of them were needed.
  const bool fetched = maps != Maps::kCached && sees_all_pixels(p);
  Next<S> next_x{x + after * x_pitch, fetched ? p.stride_h * p.stride_w * kLane : 0};
  Next<S> next_y{to + p.out_w * p.channels, maps == Maps::kMemory ? kLane : 0};
  DirectTaps<S> taps{nullptr,
                     bottom - top,
                     p.dilation_h * x_pitch,
                     p.kernel_w,
                     p.dilation_w * p.channels,
                     p.stride_w * p.channels,
                     {},
                     p.kernel_w * weight.step};
  const S* rows = x + (h + top * p.dilation_h) * x_pitch;
  const auto single = [&](int64_t j) {
    int64_t left, right;
    const int64_t column = j * p.stride_w - p.pad_w;
    clip(column, p.dilation_w, p.in_w, p.kernel_w, &left, &right);
    taps.from = rows + (column + left * p.dilation_w) * p.channels;
    taps.columns = right - left;
    taps.weight = {weight.at(top * p.kernel_w + left, 0), weight.step};
    correlate_direct<S, 1>(taps, bias, to + j * p.channels, p.channels, maps, next_x, next_y);
  };
  // The outputs that meet all columns of taps. With strides they may share few pixels: two at a time are nearer the
  // order of memory, where a vector is a line, unless that means to load many weights from beyond the first cache.
  constexpr int64_t kWeightBytes = 20 << 10;
  const bool lines = kLane * sizeof(S) == 64 && p.channels % kLane == 0;
  const bool light = meets_at_most(p, 4) || p.taps() * p.channels * static_cast<int64_t>(sizeof(T)) <= kWeightBytes;
  const bool in_pairs = fetched && p.stride_h * p.stride_w > 1 && lines && light;
  const int64_t reach = (p.kernel_w - 1) * p.dilation_w;
  const int64_t begin = least(p.out_w, ceil_div(p.pad_w, p.stride_w));
  const int64_t room = p.in_w + p.pad_w - 1 - reach;  // the last column they may begin with
  const int64_t end = room < 0 ? begin : most(begin, least(p.out_w, room / p.stride_w + 1));
  for (int64_t j = 0; j < begin; ++j) single(j);
  if (end - begin < kLeastTile) {
    for (int64_t j = begin; j < end; ++j) single(j);
  } else {
    const int64_t width = end - begin, pixels = in_pairs ? 2 : ceil_div(width, ceil_div(width, kMostTile));
    const auto run = pixels == 2   ? correlate_direct<S, 2>
                     : pixels == 4 ? correlate_direct<S, 4>
                     : pixels == 5 ? correlate_direct<S, 5>
                     : pixels == 6 ? correlate_direct<S, 6>
                     : pixels == 7 ? correlate_direct<S, 7>
                                   : correlate_direct<S, 8>;
    taps.columns = p.kernel_w;
    taps.weight = {weight.at(top * p.kernel_w, 0), weight.step};
    for (int64_t j = begin; j < end; j = j + pixels >= end ? end : least(j + pixels, end - pixels)) {
      taps.from = rows + (j * p.stride_w - p.pad_w) * p.channels;
      run(taps, bias, to + j * p.channels, p.channels, maps, next_x, next_y);
    }
  }
  for (int64_t j = end; j < p.out_w; ++j) single(j);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
