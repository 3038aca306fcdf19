// Convolution with few channels per group, or one (depthwise), on channels_last feature maps, forward.
//
// Bytes: reads x and writes y once.
#include "entry_points.h"
#include "nhwc.h"
#include "nhwc_3x3.h"
#include "nhwc_3x3_tiles.h"
#include "nhwc_direct.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

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

// Rows of x that a row of y may meet, those between the taps too.
int64_t span_of(const GroupedProblem& p) { return (p.kernel_h - 1) * p.dilation_h + 1; }

}  // namespace

template <typename S>
NhwcForward<S>::NhwcForward(const GroupedProblem& p)
    : p_(p),
      tiled_(has_nhwc_3x3_tiles(p, sizeof(S), false)),
      strip_(least(most(1, p.out_h),
                   most(1, strip_bytes() / (p.stride_h * p.in_w * p.channels * static_cast<int64_t>(sizeof(S)))))),
      tiles_(p.out_w, p.stride_w, p.dilation_w),
      x_(least(span_of(p), p.in_h) * p.per_group, p.pad_w, p.in_w,
         (tiles_.padded() - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1,
         seen_every(p.stride_w, p.dilation_w, p.kernel_w)),
      output_(tiles_.padded()),
      met_(strip_, p.per_group * p.kernel_h),
      pixel_((p.per_group + 1) * kLanes<T>) {}

// What rows of y from row i on meet: the rows of x of all input channels of a group.
template <typename S>
void NhwcForward<S>::find_met(TapMajor<const T> weight, int64_t i, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t h = (i + row) * p_.stride_h - p_.pad_h;
    int64_t top, bottom;
    clip(h, p_.dilation_h, p_.in_h, p_.kernel_h, &top, &bottom);
    met_.clear(row);
    for (int64_t m = 0; m < p_.per_group; ++m) {
      for (int64_t a = top; a < bottom; ++a) {
        met_.add(row,
                 {x_.row((h + a * p_.dilation_h) * p_.per_group + m), weight.at(m * p_.taps() + a * p_.kernel_w, 0)});
      }
    }
  }
}

template <typename S>
void NhwcForward<S>::run_strip(TapMajor<const T> weight, const S* x, const S* bias, S* y, int64_t i, int64_t rows,
                               Maps maps) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t x_pitch = p_.in_w * p_.channels, channels = p_.out_channels(), y_pitch = p_.out_w * channels;
  const int64_t every = seen_every(p_.stride_h, p_.dilation_h, p_.kernel_h);  // of the rows that one of y spans
  const int64_t after = least(p_.in_h, (i + rows - 1) * p_.stride_h - p_.pad_h + span_of(p_));
  const bool clips = meets_only_zeros(tiles_.pixels, p_.stride_w, p_.pad_w);
  const bool depthwise = p_.multiplier == 1 && p_.per_group == 1;
  const int64_t seen = p_.stride_h * p_.stride_w * ceil_div(p_.per_group * kLane, p_.multiplier);
  Next<S> next_x{x + after * x_pitch, maps == Maps::kCached ? 0 : seen};
  Next<S> next_y{y + (i + rows) * y_pitch, maps == Maps::kMemory ? kLane : 0};
  find_met(weight, i, rows);
  for (int64_t c = 0; c < channels; c += kLane) {
    const int64_t count = least(kLane, channels - c);
    const Vec<T> start = bias != nullptr ? load_lanes(bias + c, count) : Vec<T>{};
    const MetChannels<T> met_channels(c, count, p_.multiplier, p_.per_group);
    for (int64_t row = i, taken = 0; row < i + rows; ++row) {
      const int64_t h = row * p_.stride_h - p_.pad_h;
      for (taken = most(taken, h); taken < least(p_.in_h, h + span_of(p_)); ++taken) {
        if ((taken - h) % every != 0) continue;
        const S* from = x + taken * x_pitch;
        depthwise ? x_.take(taken, from + c, p_.channels, count)
                  : x_.take_met(taken, from, p_.channels, met_channels, pixel_.data());
      }
      output_.write(
          tiles_, y + row * y_pitch + c, channels, count, maps == Maps::kAround,
          [&](int64_t j, T* to, int64_t to_step, bool around) {
            int64_t left = 0, right = p_.kernel_w;
            if (clips) {
              clip_tile(tiles_.pixels, p_.stride_w, j * p_.stride_w - p_.pad_w, p_.dilation_w, p_.in_w, &left, &right);
            }
            const TileTaps<T> taps{met_.at(row - i), met_.count(row - i),    right - left, p_.stride_w,
                                   p_.dilation_w,    left * weight.step + c, weight.step};
            tiles_.correlate(taps, (j * p_.stride_w + left * p_.dilation_w) * kLane, start, to, to_step, around);
            next_x.fetch(tiles_.pixels), next_y.fetch(tiles_.pixels);
          });
    }
  }
}

// As many rows of y from row i on as are computed together, at most `most_rows`; how many, possibly none.
template <typename S>
int64_t NhwcForward<S>::run_3x3(TapMajor<const T> weight, const S* x, const S* bias, S* y, int64_t i, int64_t most_rows,
                                Maps maps) {
  const int64_t h = i * p_.stride_h - p_.pad_h, top = h < 0 ? 1 : 0, met = least(3, p_.in_h - h) - top;
  if (met < 2) return 0;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (tiled_ && most_rows >= 2 && h >= 0 && h + p_.stride_h + 3 <= p_.in_h) {
      forward_rows_of_tiles(p_, weight, x, bias, y, i, maps);
      return 2;
    }
  }
  const bool two = kVectorRegisters == 32 && p_.stride_h == 1 && most_rows >= 2 && h >= 0 && h + 4 <= p_.in_h;
  forward_rows_3x3(p_, weight, x, bias, y, i, two ? 2 : 1, two ? 4 : met, top, maps);
  return two ? 2 : 1;
}

template <typename S>
void NhwcForward<S>::run(TapMajor<const T> weight, const S* x, const S* bias, S* y, int64_t i, int64_t rows,
                         Maps maps) {
  const bool is_3x3 = has_nhwc_3x3(p_);
  if (has_nhwc_direct(p_, sizeof(S))) {
    for (int64_t row = i; row < i + rows; ++row) direct_row(p_, weight, x, bias, y, row, maps);
    return;
  }
  for (const int64_t end = i + rows; i < end;) {
    int64_t done = is_3x3 ? run_3x3(weight, x, bias, y, i, end - i, maps) : 0;
    if (done == 0) {
      done = is_3x3 ? 1 : strip_rows(end - i, strip_);
      run_strip(weight, x, bias, y, i, done, maps);
    }
    i += done;
  }
}

template class NhwcForward<float>;
template class NhwcForward<double>;

template <typename S>
void nhwc_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                  int64_t end) {
  const int64_t size = p.per_group * p.taps();
  const OwnTaps<S> taps(1, size, p.out_channels(), [&](int64_t c, int64_t) { return weight + c * size; });
  NhwcForward<S> forward(p);
  const Maps maps = maps_of(p, y, p.batch * p.out_size());
  while (begin < end) {
    const int64_t n = begin / p.out_h, i = begin % p.out_h, rows = least(end - begin, p.out_h - i);
    forward.run(taps.view(), x + n * p.in_size() * p.channels, bias, y + n * p.out_size() * p.out_channels(), i, rows,
                maps);
    begin += rows;
  }
  if (maps == Maps::kAround) end_streams();
}

REFCONV_INSTANTIATE_NHWC_FORWARD(float)
REFCONV_INSTANTIATE_NHWC_FORWARD(double)
REFCONV_INSTANTIATE_NHWC_FORWARD(BFloat16)
REFCONV_INSTANTIATE_NHWC_FORWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
