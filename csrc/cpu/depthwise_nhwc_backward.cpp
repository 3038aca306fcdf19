// Depthwise convolution on channels_last feature maps, fused backward, one output channel per input channel.
//
// Ownership: rows of x, with sums of dW and dbias private to chunks of them. Their number does not depend on the
// threads, and they are added up in order: the result is the same for any number of threads.
// Bytes: reads x and dy once, writes dx once.
// Accumulation: dx in the compute type; dW and dbias in it over a strip of rows, then in double.
#include "depthwise_nhwc.h"
#include "depthwise_nhwc_3x3.h"
#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kStripTerms = 1024;  // added up in one lane before they move on to a double

// The taps that pixels of one row of x see: those of `rows` and `columns` in the ranges of `window`.
struct Seen {
  const LatticeTaps &rows, &columns;
  Window window;
};

// What PIXELS pixels of one row of x meet, for one vector of channels: dx is set, `total` [taps][channels] added to.
// `dy` belongs to the first pixel and tap.
template <typename S, int PIXELS, bool FULL>
inline void meet(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const Seen& seen, int64_t c, const S* dy,
                 const S* x, S* dx, TapMajor<Compute<S>> total, Maps maps) {
  using T = Compute<S>;
  const int64_t x_step = p.stride_w * p.channels, count = p.channels - c;
  Vec<T> pixel[PIXELS], sum[PIXELS];
#pragma GCC unroll 8
  for (int n = 0; n < PIXELS; ++n) {
    pixel[n] = load_channels<FULL>(x + n * x_step + c, count);
    sum[n] = Vec<T>{};
  }
  for (int64_t a = seen.window.top; a < seen.window.bottom; ++a) {
    for (int64_t b = seen.window.left; b < seen.window.right; ++b) {
      const int64_t tap =
          (seen.rows.last - a * seen.rows.step) * p.kernel_w + seen.columns.last - b * seen.columns.step;
      const S* from = dy + (a * seen.rows.shift * p.out_w + b * seen.columns.shift) * p.channels + c;
      const Vec<T> w = in_register(load(weight.at(tap, c)));
      T* tap_total = total.at(tap, c);
      Vec<T> even = load(tap_total), odd = {};
#pragma GCC unroll 8
      for (int n = 0; n < PIXELS; ++n) {
        const Vec<T> g = in_register(load_channels<FULL>(from + n * p.channels, count));
        sum[n] += w * g;
        (n % 2 == 0 ? even : odd) += pixel[n] * g;
      }
      store(tap_total, even + odd);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < PIXELS; ++n) store_channels<FULL>(dx + n * x_step + c, sum[n], count, maps);
}

template <typename S, int PIXELS>
void backward_pixels(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const Seen& seen, const S* dy,
                     const S* x, S* dx, TapMajor<Compute<S>> total, Maps maps) {
  int64_t c = 0;
  for (; c + kLanes<Compute<S>> <= p.channels; c += kLanes<Compute<S>>) {
    meet<S, PIXELS, true>(p, weight, seen, c, dy, x, dx, total, maps);
  }
  if (c < p.channels) meet<S, PIXELS, false>(p, weight, seen, c, dy, x, dx, total, maps);
}

template <typename S>
void backward_row_by_taps(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const Lattices& lattices,
                          const S* grad_y, const S* x, S* grad_x, int64_t i, TapMajor<Compute<S>> total, Maps maps) {
  const LatticeTaps& rows = lattices.rows[i % p.stride_h];
  const int64_t h = i / p.stride_h + rows.first_dy;
  for (int64_t f = 0; f < p.stride_w; ++f) {
    Seen seen{rows, lattices.columns[f], {}};
    clip(h, rows.shift, p.out_h, rows.count, &seen.window.top, &seen.window.bottom);
    const LatticeTaps& columns = seen.columns;
    const int64_t size = (p.in_w - f + p.stride_w - 1) / p.stride_w;
    const int64_t inside = p.out_w - (columns.count - 1) * columns.shift;
    for (int64_t v = 0; v < size;) {
      const int64_t w = v + columns.first_dy, pixel = (i * p.in_w + f + v * p.stride_w) * p.channels;
      const S *dy = grad_y + (h * p.out_w + w) * p.channels, *from = x + pixel;
      const int64_t fitting = w < 0 ? 0 : least(size - v, inside - w);
      if (f == 0 && maps != Maps::kCached) {  // what the next row of x needs and this one does not
        const int64_t pixels = fitting >= kPixels ? kPixels : 1;
        prefetch(from + p.in_w * p.channels, pixels * p.stride_w * p.channels);
        prefetch(dy + ((rows.count - 1) * rows.shift + 1) * p.out_w * p.channels, pixels * p.channels);
      }
      clip(w, columns.shift, p.out_w, columns.count, &seen.window.left, &seen.window.right);
      if (fitting >= kPixels) {
        backward_pixels<S, kPixels>(p, weight, seen, dy, from, grad_x + pixel, total, maps);
        v += kPixels;
      } else if (fitting >= kPixels / 2) {
        backward_pixels<S, kPixels / 2>(p, weight, seen, dy, from, grad_x + pixel, total, maps);
        v += kPixels / 2;
      } else {
        backward_pixels<S, 1>(p, weight, seen, dy, from, grad_x + pixel, total, maps);
        v += 1;
      }
    }
  }
}

// Adds the pixels of rows of dy to totals [channels].
template <typename S>
void add_rows(const GroupedProblem& p, const S* grad_y, double* totals, int64_t begin, int64_t end) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  for (int64_t row = begin; row < end; ++row) {
    const S* dy = grad_y + row * p.out_w * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLane) {
      const int64_t count = least(kLane, p.channels - c);
      Vec<Compute<S>> sum = {};
      for (int64_t j = 0; j < p.out_w; ++j) sum += load_lanes(dy + j * p.channels + c, count);
      for (int64_t lane = 0; lane < count; ++lane) totals[c + lane] += static_cast<double>(sum[lane]);
    }
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

template <typename S>
void backward_row(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const Lattices& lattices, const S* grad_y,
                  const S* x, S* grad_x, int64_t i, TapMajor<Compute<S>> total, Maps maps) {
  if (has_nhwc_3x3(p)) {
    // The rows of dy that the rows of taps 2, 2 - stride, ... lead to, without those outside.
    int64_t tap_row = 2 - (i + p.pad_h) % p.stride_h, rows = tap_row / p.stride_h + 1;
    int64_t h = (i + p.pad_h - tap_row) / p.stride_h;
    for (; h < 0; ++h) tap_row -= p.stride_h, rows -= 1;
    rows = least(rows, p.out_h - h);
    if (p.stride_h == 1 && (rows == 3 || rows == 2)) {
      return backward_row_3x3<S, 1>(p, weight, grad_y, x, grad_x, i, h, rows, tap_row, total, maps);
    }
    if (p.stride_h == 2 && (rows == 2 || rows == 1)) {
      return backward_row_3x3<S, 2>(p, weight, grad_y, x, grad_x, i, h, rows, tap_row, total, maps);
    }
  }
  backward_row_by_taps(p, weight, lattices, grad_y, x, grad_x, i, total, maps);
}

}  // namespace

template <typename S>
void depthwise_nhwc_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x,
                             double* totals, int64_t chunks, bool need_weight, bool need_bias, int64_t begin,
                             int64_t end) {
  using T = Compute<S>;
  const OwnTaps<S> taps(p, weight);
  const Lattices lattices(p);
  OwnTaps<S> total(p);
  Scratch<S> unwanted(grad_x == nullptr ? p.in_size() * p.channels : 0);  // where dx goes when nobody wants it
  const int64_t rows = p.batch * p.in_h, out_rows = p.batch * p.out_h, strip = most(1, kStripTerms / p.in_w);
  const Maps maps = grad_x != nullptr ? maps_of(p, grad_x, p.batch * p.in_size()) : Maps::kMemory;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = totals + chunk * (p.taps() + 1) * p.channels;
    for (int64_t k = 0; k < (p.taps() + 1) * p.channels; ++k) sums[k] = 0;
    if (need_bias) {
      add_rows(p, grad_y, sums + p.taps() * p.channels, out_rows * chunk / chunks, out_rows * (chunk + 1) / chunks);
    }
    if (grad_x == nullptr && !need_weight) continue;
    const int64_t first = rows * chunk / chunks, last = rows * (chunk + 1) / chunks;
    for (int64_t row = first; row < last; ++row) {
      const int64_t n = row / p.in_h, image = n * p.in_size() * p.channels;
      S* dx = grad_x != nullptr ? grad_x + image : unwanted.data();
      const S* dy = grad_y + n * p.out_size() * p.channels;
      backward_row<S>(p, taps.view(), lattices, dy, x + image, dx, row % p.in_h, total.view(), maps);
      if ((row - first + 1) % strip != 0 && row + 1 < last) continue;
      for (int64_t t = 0; t < p.taps(); ++t) {
        const T* from = total.view().at(t, 0);
        for (int64_t c = 0; c < p.channels; ++c) sums[t * p.channels + c] += static_cast<double>(from[c]);
      }
      total.clear();
    }
  }
  if (maps == Maps::kAround) end_streams();
}

template <typename T>
void nhwc_backward_image(const GroupedProblem& p, TapMajor<const T> weight, const Lattices& lattices, const T* grad_y,
                         const T* x, T* grad_x, TapMajor<T> total) {
  for (int64_t i = 0; i < p.in_h; ++i) backward_row<T>(p, weight, lattices, grad_y, x, grad_x, i, total, Maps::kCached);
}

template void nhwc_backward_image<float>(const GroupedProblem&, TapMajor<const float>, const Lattices&, const float*,
                                         const float*, float*, TapMajor<float>);
template void nhwc_backward_image<double>(const GroupedProblem&, TapMajor<const double>, const Lattices&, const double*,
                                          const double*, double*, TapMajor<double>);

template <typename S>
void depthwise_nhwc_reduce(const GroupedProblem& p, double* totals, int64_t chunks, S* grad_weight, S* grad_bias,
                           int64_t begin, int64_t end) {
  const int64_t size = (p.taps() + 1) * p.channels;
  for (int64_t t = grad_weight != nullptr ? 0 : p.taps(); t < p.taps() + (grad_bias != nullptr ? 1 : 0); ++t) {
    double* sums = totals + t * p.channels;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const double* more = sums + chunk * size;
      for (int64_t c = begin; c < end; ++c) sums[c] += more[c];
    }
    S* to = t < p.taps() ? grad_weight + t : grad_bias;
    const int64_t step = t < p.taps() ? p.taps() : 1;
    for (int64_t c = begin; c < end; ++c) store_one(to + c * step, static_cast<Compute<S>>(sums[c]));
  }
}

REFCONV_INSTANTIATE_DEPTHWISE_NHWC_BACKWARD(float)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC_BACKWARD(double)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC_BACKWARD(BFloat16)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC_BACKWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
