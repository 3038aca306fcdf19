// Depthwise convolution on channels_last feature maps, forward, one output channel per input channel.
//
// Bytes: reads x and writes y once.
#include "depthwise_nhwc.h"
#include "depthwise_nhwc_3x3.h"
#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// PIXELS outputs of one row and one vector of channels; `x` is what tap (0, 0) of the first one sees.
template <typename S, int PIXELS, bool FULL>
inline void correlate(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const Window& window, int64_t c,
                      const S* bias, const S* x, S* y, Maps maps) {
  using T = Compute<S>;
  const int64_t count = p.channels - c;
  Vec<T> sum[PIXELS];
  const Vec<T> start = bias != nullptr ? load_channels<FULL>(bias + c, count) : Vec<T>{};
#pragma GCC unroll 8
  for (int n = 0; n < PIXELS; ++n) sum[n] = start;
  for (int64_t a = window.top; a < window.bottom; ++a) {
    for (int64_t b = window.left; b < window.right; ++b) {
      const Vec<T> w = in_register(load(weight.at(a * p.kernel_w + b, c)));
      const S* from = x + (a * p.dilation_h * p.in_w + b * p.dilation_w) * p.channels + c;
#pragma GCC unroll 8
      for (int n = 0; n < PIXELS; ++n) {
        sum[n] += w * load_channels<FULL>(from + n * p.stride_w * p.channels, count);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < PIXELS; ++n) store_channels<FULL>(y + n * p.channels + c, sum[n], count, maps);
}

template <typename S, int PIXELS>
void forward_pixels(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const Window& window, const S* bias,
                    const S* x, S* y, Maps maps) {
  int64_t c = 0;
  for (; c + kLanes<Compute<S>> <= p.channels; c += kLanes<Compute<S>>) {
    correlate<S, PIXELS, true>(p, weight, window, c, bias, x, y, maps);
  }
  if (c < p.channels) correlate<S, PIXELS, false>(p, weight, window, c, bias, x, y, maps);
}

template <typename S>
void forward_row(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* x, const S* bias, S* y, int64_t i,
                 Maps maps) {
  const int64_t h = i * p.stride_h - p.pad_h;
  Window window{};
  clip(h, p.dilation_h, p.in_h, p.kernel_h, &window.top, &window.bottom);
  const int64_t inside = p.in_w - (p.kernel_w - 1) * p.dilation_w;  // columns from which the whole kernel fits
  const int64_t next = ((p.kernel_h - 1) * p.dilation_h + 1) * p.in_w * p.channels;
  for (int64_t j = 0; j < p.out_w;) {
    const int64_t w = j * p.stride_w - p.pad_w;
    const S* from = x + (h * p.in_w + w) * p.channels;
    S* to = y + (i * p.out_w + j) * p.channels;
    const int64_t fitting = w < 0 ? 0 : least(p.out_w - j, ceil_div(inside - w, p.stride_w));
    for (int64_t r = 0; maps != Maps::kCached && r < p.stride_h;
         ++r) {  // of the rows that the next output row needs and this one does not
      prefetch(from + next + r * p.in_w * p.channels, (fitting >= kPixels ? kPixels : 1) * p.stride_w * p.channels);
    }
    clip(w, p.dilation_w, p.in_w, p.kernel_w, &window.left, &window.right);
    if (fitting >= kPixels) {
      forward_pixels<S, kPixels>(p, weight, window, bias, from, to, maps);
      j += kPixels;
    } else if (fitting >= kPixels / 2) {
      forward_pixels<S, kPixels / 2>(p, weight, window, bias, from, to, maps);
      j += kPixels / 2;
    } else {
      forward_pixels<S, 1>(p, weight, window, bias, from, to, maps);
      j += 1;
    }
  }
}

// Rows of y from row i on, `rows` of them, 1 or 2, from `met` rows of x, of which the first meets the row of taps
// `top`.
template <typename S>
void forward_rows_3x3(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* x, const S* bias, S* y,
                      int64_t i, int64_t rows, int64_t met, int64_t top, Maps maps) {
  using T = Compute<S>;
  const int64_t x_pitch = p.in_w * p.channels, y_pitch = p.out_w * p.channels, h = i * p.stride_h - p.pad_h + top;
  Ahead<S> ahead_x{x + (h + met) * x_pitch, maps == Maps::kCached ? 0 : rows * p.stride_h};
  Ahead<S> ahead_y{y + (i + rows) * y_pitch, maps == Maps::kMemory ? rows : 0};
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const int64_t count = p.channels - c;
    const Vec<T> start = bias != nullptr ? load_lanes(bias + c, count) : Vec<T>{};
    const auto run = [&](auto full) {
      constexpr bool kFull = decltype(full)::value;
      const auto by_1 = rows == 2  ? correlate_3x3<S, 2, 4, kFull>
                        : met == 3 ? correlate_3x3<S, 1, 3, kFull>
                                   : correlate_3x3<S, 1, 2, kFull>;
      const auto by_2 = met == 3 ? correlate_3x3_by_2<S, 3, kFull> : correlate_3x3_by_2<S, 2, kFull>;
      const auto kernel = p.stride_h == 1 ? by_1 : by_2;
      kernel(p, {weight.at(top * 3, c), weight.step}, start, x + h * x_pitch + c, y + i * y_pitch + c, count, maps,
             ahead_x, ahead_y);
    };
    count >= kLanes<T> ? run(std::true_type{}) : run(std::false_type{});
    ahead_x.advance(p.in_w), ahead_y.advance(p.out_w);
  }
}

// As many rows of y from row i on as are computed together, at most `most_rows`; how many.
template <typename S>
int64_t forward_rows(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* x, const S* bias, S* y,
                     int64_t i, int64_t most_rows, Maps maps) {
  if (has_nhwc_3x3(p)) {
    const int64_t h = i * p.stride_h - p.pad_h, top = h < 0 ? 1 : 0, met = least(3, p.in_h - h) - top;
    const bool two = kVectorRegisters == 32 && p.stride_h == 1 && most_rows >= 2 && h >= 0 && h + 4 <= p.in_h;
    if (met >= 2) {
      forward_rows_3x3(p, weight, x, bias, y, i, two ? 2 : 1, two ? 4 : met, top, maps);
      return two ? 2 : 1;
    }
  }
  forward_row(p, weight, x, bias, y, i, maps);
  return 1;
}

}  // namespace

template <typename S>
void depthwise_nhwc_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                            int64_t end) {
  const OwnTaps<S> taps(p, weight);
  const Maps maps = maps_of(p, y, p.batch * p.out_size());
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / p.out_h, i = row % p.out_h;
    row += forward_rows<S>(p, taps.view(), x + n * p.in_size() * p.channels, bias, y + n * p.out_size() * p.channels, i,
                           least(end - row, p.out_h - i), maps);
  }
  if (maps == Maps::kAround) end_streams();
}

template <typename T>
void nhwc_forward_image(const GroupedProblem& p, TapMajor<const T> weight, const T* bias, const T* x, T* y) {
  for (int64_t i = 0; i < p.out_h;) i += forward_rows<T>(p, weight, x, bias, y, i, p.out_h - i, Maps::kCached);
}

template void nhwc_forward_image<float>(const GroupedProblem&, TapMajor<const float>, const float*, const float*,
                                        float*);
template void nhwc_forward_image<double>(const GroupedProblem&, TapMajor<const double>, const double*, const double*,
                                         double*);

REFCONV_INSTANTIATE_DEPTHWISE_NHWC_FORWARD(float)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC_FORWARD(double)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC_FORWARD(BFloat16)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC_FORWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
