// Convolution with few channels per group, or one (depthwise), on channels_last feature maps, fused backward.
//
// Ownership: rows of x, of all channels or of some, with sums of dW and dbias private to chunks of them. Their number
// does not depend on the threads, and they are added up in order: the result is the same for any number of threads.
// Bytes: reads x and dy once, writes dx once.
// Accumulation: dx in the compute type; dW and dbias in it over a strip of rows, then in double.
#include "entry_points.h"
#include "nhwc.h"
#include "nhwc_3x3.h"
#include "nhwc_3x3_tiles.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Adds the channels [first, last) of the pixels of rows of dy to totals [out_channels].
template <typename S>
void add_rows(const GroupedProblem& p, const S* grad_y, double* totals, int64_t first, int64_t last, int64_t begin,
              int64_t end) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  const int64_t channels = p.out_channels();
  for (int64_t row = begin; row < end; ++row) {
    const S* dy = grad_y + row * p.out_w * channels;
    for (int64_t c = first; c < last; c += kLane) {
      const int64_t count = least(kLane, last - c);
      Vec<Compute<S>> sum = {};
      for (int64_t j = 0; j < p.out_w; ++j) sum += load_lanes(dy + j * channels + c, count);
      for (int64_t lane = 0; lane < count; ++lane) totals[c + lane] += static_cast<double>(sum[lane]);
    }
  }
}

// Adds what a row of x, from its zeros on, and one of dy add to sums of dW, `step` apart, some taps at a time by `add`.
template <typename T, typename Add>
void add_row(const GroupedProblem& p, const Add& add, const T* x, const T* dy, T* total, int64_t step) {
  for (int64_t b = 0; b < p.kernel_w; b += kMostTaps) {
    const int64_t taps = least(kMostTaps, p.kernel_w - b), offset = b * p.dilation_w;
    int64_t first = 0, last = p.out_w;
    // Taps of large kernels meet mostly zeros: from the first output that meets a pixel with one of them to the last.
    if (p.kernel_w > kMostTaps) {
      first = most(0, ceil_div(p.pad_w - offset - (taps - 1) * p.dilation_w, p.stride_w));
      last = least(last, ceil_div(p.in_w + p.pad_w - offset, p.stride_w));
    }
    if (first >= last) continue;
    add(x + (first * p.stride_w + offset) * kLanes<T>, dy + first * kLanes<T>, last - first, p.stride_w, p.dilation_w,
        taps, total + b * step, step);
  }
}

// Row i of x, which meets `rows` rows of dy, the first of them, h, with the row of taps `tap_row`.
template <typename S, int STRIDE>
void backward_row_3x3(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* grad_y, const S* x,
                      S* grad_x, int64_t i, int64_t h, int64_t rows, int64_t tap_row, TapMajor<Compute<S>> total,
                      Maps maps) {
  using T = Compute<S>;
  const int64_t x_pitch = p.in_w * p.channels, y_pitch = p.out_w * p.channels;
  const bool fetched = maps != Maps::kCached;
  BackwardAhead<S> ahead{{x + (i + 1) * x_pitch, fetched ? 1 : 0},
                         {grad_y + (h + rows) * y_pitch, fetched && (STRIDE == 1 || tap_row != 1) ? 1 : 0},
                         {grad_x + (i + 1) * x_pitch, maps == Maps::kMemory ? 1 : 0}};
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const int64_t count = p.channels - c;
    const auto run = [&](auto full) {
      constexpr bool kFull = decltype(full)::value;
      const auto kernel =
          rows == 4 - STRIDE ? meet_3x3<S, STRIDE, 4 - STRIDE, kFull> : meet_3x3<S, STRIDE, 3 - STRIDE, kFull>;
      kernel(p, {weight.at(0, c), weight.step}, tap_row, grad_y + h * y_pitch + c, x + i * x_pitch + c,
             grad_x + i * x_pitch + c, {total.at(0, c), total.step}, count, maps, ahead);
    };
    count >= kLanes<T> ? run(std::true_type{}) : run(std::false_type{});
    ahead.x.advance(p.in_w), ahead.dy.advance(p.out_w), ahead.dx.advance(p.in_w);
  }
}

// Zeros that pixels of dx meet before the first and behind the last pixel of a row of dy.
int64_t zeros_before(const Lattices& lattices, const GroupedProblem& p) {
  int64_t zeros = 0;
  for (int64_t f = 0; f < p.stride_w; ++f) zeros = most(zeros, -lattices.columns[f].first_dy);
  return zeros;
}
int64_t zeros_behind(const Lattices& lattices, const GroupedProblem& p) {
  int64_t zeros = 0;
  for (int64_t f = 0; f < p.stride_w; ++f) {
    const LatticeTaps& columns = lattices.columns[f];
    const int64_t pixels = most(kLeastTile, ceil_div(p.in_w - f, p.stride_w));
    zeros = most(zeros, pixels - 1 + columns.first_dy + (columns.count - 1) * columns.shift + 1 - p.out_w);
  }
  return zeros;
}

// Rows of so many channels of x whose data, with that of dy, fit a strip.
template <typename S>
int64_t strip_of(const GroupedProblem& p, int64_t channels) {
  const int64_t row = p.in_w * channels + p.out_w * ceil_div(channels * p.multiplier, p.per_group) / p.stride_h;
  return most(1, least(strip_bytes() / (row * static_cast<int64_t>(sizeof(S))), kStripTerms / p.in_w));
}

}  // namespace

template <typename S>
NhwcBackward<S>::NhwcBackward(const GroupedProblem& p, int64_t begin, int64_t end, bool need_input, bool need_weight)
    : p_(p),
      begin_(begin),
      end_(end),
      need_input_(need_input),
      need_weight_(need_weight),
      tiled_(has_nhwc_3x3_tiles(p, sizeof(S), true)),
      lattices_(p),
      strip_(strip_of<S>(p, end - begin)),
      left_(zeros_before(lattices_, p)),
      x_(1, p.pad_w, p.in_w, (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1,
         seen_every(p.stride_w, p.dilation_w, p.kernel_w)),
      dy_(least(p.out_h, (p.kernel_h - 1) * p.dilation_h / p.stride_h + 1) * p.multiplier, left_, p.out_w,
          left_ + p.out_w + zeros_behind(lattices_, p)),
      output_(most(kLeastTile, ceil_div(p.in_w, p.stride_w))),
      met_(most(1, least(strip_, p.in_h)), p.multiplier * p.kernel_h),
      pixel_((p.multiplier + 1) * kLanes<T>) {}

// What rows of x from row i on meet: the rows of dy of all output channels of a group.
template <typename S>
void NhwcBackward<S>::find_met(TapMajor<const T> weight, int64_t i, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const LatticeTaps& taps = lattices_.rows[(i + row) % p_.stride_h];
    const int64_t h = (i + row) / p_.stride_h + taps.first_dy;
    int64_t top, bottom;
    clip(h, taps.shift, p_.out_h, taps.count, &top, &bottom);
    met_.clear(row);
    for (int64_t k = 0; k < p_.multiplier; ++k) {
      for (int64_t a = top; a < bottom; ++a) {
        const int64_t tap = k * p_.taps() + (taps.last - a * taps.step) * p_.kernel_w;
        met_.add(row, {dy_.row((h + a * taps.shift) * p_.multiplier + k), weight.at(tap, 0)});
      }
    }
  }
}

template <typename S>
void NhwcBackward<S>::run_strip(TapMajor<const T> weight, const S* grad_y, const S* x, S* grad_x, int64_t i,
                                int64_t rows, TapMajor<T> total, Maps maps) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t x_pitch = p_.in_w * p_.channels, y_step = p_.out_channels(), y_pitch = p_.out_w * y_step;
  const int64_t reach = (p_.kernel_h - 1) * p_.dilation_h;
  // The last row of dy that a row of x, and all rows before it, may meet.
  const auto last_met = [&](int64_t row) { return least(p_.out_h - 1, (row + p_.pad_h) / p_.stride_h); };
  const auto add = p_.dilation_w > 1 || p_.stride_w > 2 ? add_row_products<T, 0>
                   : p_.stride_w == 1                   ? add_row_products<T, 1>
                                                        : add_row_products<T, 2>;
  // The lines of some channels only are nowhere together.
  const bool fetched = maps != Maps::kCached && end_ - begin_ == p_.channels;
  Next<S> next_x{x + (i + rows) * x_pitch, fetched ? kLane : 0};
  Next<S> next_dx{need_input_ ? grad_x + (i + rows) * x_pitch : nullptr,
                  need_input_ && fetched && maps == Maps::kMemory ? kLane : 0};
  Next<S> next_dy{grad_y + (last_met(i + rows - 1) + 1) * y_pitch,
                  fetched ? ceil_div(p_.multiplier * kLane, p_.per_group) : 0};
  const bool depthwise = p_.multiplier == 1 && p_.per_group == 1;
  find_met(weight, i, rows);
  for (int64_t c = begin_; c < end_; c += kLane) {
    const int64_t count = least(kLane, end_ - c), lane = c - begin_;
    const MetChannels<T> met_channels(c, count, p_.per_group, p_.multiplier);
    for (int64_t row = i, taken = 0; row < i + rows; ++row) {
      taken = most(taken, ceil_div(row + p_.pad_h - reach, p_.stride_h));
      for (; taken <= last_met(row); ++taken) {
        const S* from = grad_y + taken * y_pitch;
        depthwise ? dy_.take(taken, from + c, y_step, count)
                  : dy_.take_met(taken, from, y_step, met_channels, pixel_.data());
      }
      const TapRow<T>* met = met_.at(row - i);
      const int64_t met_count = met_.count(row - i);
      if (need_weight_ && met_count > 0) {  // the sums lie as the weights do
        x_.take(0, x + row * x_pitch + c, p_.channels, count);
        for (int64_t k = 0; k < met_count; ++k) {
          add_row(p_, add, x_.row(0), met[k].pixels + left_ * kLane, total.data + (met[k].weight - weight.data) + lane,
                  total.step);
        }
      }
      for (int64_t f = 0; need_input_ && f < p_.stride_w; ++f) {
        const LatticeTaps& columns = lattices_.columns[f];
        const Tiles<T> tiles(ceil_div(p_.in_w - f, p_.stride_w), 1, columns.shift);
        const bool clips = meets_only_zeros(tiles.pixels, 1, -columns.first_dy);
        output_.write(tiles, grad_x + row * x_pitch + f * p_.channels + c, p_.stride_w * p_.channels, count,
                      maps == Maps::kAround, [&](int64_t v, T* to, int64_t to_step, bool around) {
                        int64_t left = 0, right = columns.count;
                        if (clips) {
                          clip_tile(tiles.pixels, 1, v + columns.first_dy, columns.shift, p_.out_w, &left, &right);
                        }
                        const TileTaps<T> seen{met,
                                               met_count,
                                               right - left,
                                               1,
                                               columns.shift,
                                               (columns.last - left * columns.step) * weight.step + lane,
                                               -columns.step * weight.step};
                        tiles.correlate(seen, (v + columns.first_dy + left * columns.shift + left_) * kLane, Vec<T>{},
                                        to, to_step, around);
                        next_x.fetch(tiles.pixels), next_dx.fetch(tiles.pixels);
                      });
      }
      if (row % p_.stride_h == 0) next_dy.fetch(p_.out_w);
      if (!need_input_) next_x.fetch(p_.in_w);
    }
  }
}

// As many rows of x from row i on as are met together, at most `most_rows`; how many, possibly none.
template <typename S>
int64_t NhwcBackward<S>::run_3x3(TapMajor<const T> weight, const S* grad_y, const S* x, S* grad_x, int64_t i,
                                 int64_t most_rows, TapMajor<T> total, Maps maps) {
  if constexpr (sizeof(S) == sizeof(T)) {
    const bool two = tiled_ && most_rows >= 2 && i >= 1;
    if (two && p_.stride_h == 1 && i + 3 <= p_.in_h) {
      backward_rows_of_tiles(p_, weight, grad_y, x, grad_x, i, total, maps);
      return 2;
    }
    if (two && p_.stride_h == 2 && i % 2 == 1 && i / 2 + 2 <= p_.out_h) {
      backward_rows_of_tiles_by_2(p_, weight, grad_y, x, grad_x, i, total, maps);
      return 2;
    }
  }
  // The rows of dy that the rows of taps 2, 2 - stride, ... lead to, without those outside.
  int64_t tap_row = 2 - (i + p_.pad_h) % p_.stride_h, rows = tap_row / p_.stride_h + 1;
  int64_t h = (i + p_.pad_h - tap_row) / p_.stride_h;
  for (; h < 0; ++h) tap_row -= p_.stride_h, rows -= 1;
  rows = least(rows, p_.out_h - h);
  const auto run = [&](auto stride) {
    backward_row_3x3<S, decltype(stride)::value>(p_, weight, grad_y, x, grad_x, i, h, rows, tap_row, total, maps);
    return 1;
  };
  if (p_.stride_h == 1 && (rows == 3 || rows == 2)) return run(std::integral_constant<int, 1>{});
  if (p_.stride_h == 2 && (rows == 2 || rows == 1)) return run(std::integral_constant<int, 2>{});
  return 0;
}

template <typename S>
void NhwcBackward<S>::run(TapMajor<const T> weight, const S* grad_y, const S* x, S* grad_x, int64_t i, int64_t rows,
                          TapMajor<T> total, Maps maps) {
  const bool is_3x3 = has_nhwc_3x3(p_) && need_input_;
  for (const int64_t end = i + rows; i < end;) {
    int64_t done = is_3x3 ? run_3x3(weight, grad_y, x, grad_x, i, end - i, total, maps) : 0;
    if (done == 0) {
      done = is_3x3 ? 1 : strip_rows(end - i, strip_);
      run_strip(weight, grad_y, x, grad_x, i, done, total, maps);
    }
    i += done;
  }
}

template class NhwcBackward<float>;
template class NhwcBackward<double>;

namespace {

// Chunks [begin, end) of the channels [first, last) of x.
template <typename S>
void backward_block(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                    int64_t chunks, int64_t first, int64_t last, bool need_weight, bool need_bias, int64_t begin,
                    int64_t end) {
  using T = Compute<S>;
  const int64_t size_of_lane = p.multiplier * p.taps(), channels = last - first;
  // As large a part of the channels of dy.
  const int64_t first_out = first * p.out_channels() / p.channels, last_out = last * p.out_channels() / p.channels;
  const OwnTaps<S> taps(p.multiplier, p.taps(), channels, [&](int64_t lane, int64_t k) {
    const int64_t c = first + lane, out = c / p.per_group * p.multiplier + k;
    return weight + (out * p.per_group + c % p.per_group) * p.taps();
  });
  OwnTaps<S> total(size_of_lane, channels);
  NhwcBackward<S> backward(p, first, last, grad_x != nullptr, need_weight);
  const int64_t rows = p.batch * p.in_h, out_rows = p.batch * p.out_h, strip = most(1, kStripTerms / p.in_w);
  const int64_t size = p.group_taps() * p.groups() + p.out_channels();
  const Maps maps = grad_x != nullptr ? maps_of(p, grad_x, p.batch * p.in_size()) : Maps::kMemory;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double *sums = totals + chunk * size, *bias_sums = sums + p.group_taps() * p.groups();
    sums += first;
    for (int64_t t = 0; t < size_of_lane; ++t) {
      for (int64_t c = 0; c < channels; ++c) sums[t * p.channels + c] = 0;
    }
    for (int64_t c = first_out; c < last_out; ++c) bias_sums[c] = 0;
    if (need_bias) {
      add_rows(p, grad_y, bias_sums, first_out, last_out, out_rows * chunk / chunks, out_rows * (chunk + 1) / chunks);
    }
    if (grad_x == nullptr && !need_weight) continue;
    const int64_t last_row = rows * (chunk + 1) / chunks;
    for (int64_t row = rows * chunk / chunks; row < last_row;) {
      const int64_t n = row / p.in_h, i = row % p.in_h, image = n * p.in_size() * p.channels;
      const int64_t some = least(least(strip, last_row - row), p.in_h - i);
      backward.run(taps.view(), grad_y + n * p.out_size() * p.out_channels(), x + image,
                   grad_x != nullptr ? grad_x + image : nullptr, i, some, total.view(), maps);
      row += some;
      if (!need_weight) continue;
      for (int64_t t = 0; t < size_of_lane; ++t) {
        const T* from = total.view().at(t, 0);
        for (int64_t c = 0; c < channels; ++c) sums[t * p.channels + c] += static_cast<double>(from[c]);
      }
      total.clear();
    }
  }
  if (maps == Maps::kAround) end_streams();
}

}  // namespace

template <typename S>
void nhwc_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                   int64_t chunks, int64_t block, bool need_weight, bool need_bias, int64_t begin, int64_t end) {
  for (int64_t last; begin < end; begin = last) {
    const int64_t first = begin / chunks * block;
    last = least(end, (begin / chunks + 1) * chunks);
    backward_block(p, grad_y, x, weight, grad_x, totals, chunks, first, least(first + block, p.channels), need_weight,
                   need_bias, begin % chunks, begin % chunks + last - begin);
  }
}

REFCONV_INSTANTIATE_NHWC_BACKWARD(float)
REFCONV_INSTANTIATE_NHWC_BACKWARD(double)
REFCONV_INSTANTIATE_NHWC_BACKWARD(BFloat16)
REFCONV_INSTANTIATE_NHWC_BACKWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
