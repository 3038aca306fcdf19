// Depthwise convolution on channels_last feature maps, forward and fused backward, one output channel per input
// channel.
//
// Equations: csrc/problem.h. Lanes are channels, so no pixel is moved and any kernel size, stride and dilation is the
// same loop: some pixels of a row at once, tap by tap, each loaded weight serving all of them. The channels are the
// innermost loop, so that memory is gone through in order.
// Ownership: forward, output rows; backward, rows of x, with sums of dW and dbias private to a fixed number of chunks
// that does not depend on the threads and added up in order: the result is the same for any number of them.
// Bytes: forward reads x and writes y once; backward reads x and dy once and writes dx once.
// Accumulation: y and dx in the compute type; dW and dbias in it over a strip of rows, then in double.
#include "elements.h"
#include "entry_points.h"
#include "lattice.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int kPixels = kVectorRegisters == 32 ? 8 : 4;  // at once; backward holds twice as many vectors
constexpr int64_t kStripTerms = 1024;                    // added up in one lane before they move on to a double

// FULL: all lanes are channels; otherwise the first `count`.
template <bool FULL, typename S>
inline Vec<Compute<S>> load_channels(const S* from, int64_t count) {
  return FULL ? load(from) : load_partial(from, count);
}

template <bool FULL, typename S>
inline void store_channels(S* to, Vec<Compute<S>> v, int64_t count, bool around_cache) {
  if constexpr (FULL && sizeof(S) == sizeof(Compute<S>)) {
    if (around_cache) return store_around_cache(to, v);
  }
  FULL ? store(to, v) : store_partial(to, v, count);
}

// Whether an output is large enough to be written around the cache, and made of whole aligned vectors that fill lines.
template <typename S>
bool around_cache(const GroupedProblem& p, const S* output, int64_t pixels) {
  const int64_t vector = kLanes<Compute<S>> * static_cast<int64_t>(sizeof(S));
  return vector == 64 && streams(pixels * p.channels * static_cast<int64_t>(sizeof(S))) &&
         p.channels % kLanes<Compute<S>> == 0 &&
         reinterpret_cast<uintptr_t>(output) % static_cast<uintptr_t>(vector) == 0;
}

// [taps][channels rounded up to vectors], zero in the surplus channels.
template <typename S>
class TapMajor {
  using T = Compute<S>;

 public:
  TapMajor(const GroupedProblem& p, const S* weight)
      : channels_(round_up(p.channels, kLanes<T>)), data_(p.taps() * channels_) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t t = 0; t < p.taps(); ++t) data_[t * channels_ + c] = load_one(weight + c * p.taps() + t);
    }
  }
  // The weights of one tap, from channel c on.
  const T* at(int64_t tap, int64_t c) const { return data_.data() + tap * channels_ + c; }
  int64_t channels() const { return channels_; }

 private:
  int64_t channels_;
  Scratch<T> data_;
};

// A range of taps in both directions.
struct Window {
  int64_t top, bottom, left, right;
};

// The taps t for which first + t * step lies in [0, size).
inline void clip(int64_t first, int64_t step, int64_t size, int64_t taps, int64_t* begin, int64_t* end) {
  *begin = first < 0 ? least(taps, ceil_div(-first, step)) : 0;
  *end = first >= size ? 0 : least(taps, (size - 1 - first) / step + 1);
  if (*end < *begin) *end = *begin;
}

// --- forward ---

// PIXELS outputs of one row and one vector of channels; `x` is what tap (0, 0) of the first one sees.
template <typename S, int PIXELS, bool FULL>
inline void correlate(const GroupedProblem& p, const TapMajor<S>& weight, const Window& window, int64_t c,
                      const S* bias, const S* x, S* y, bool around) {
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
  for (int n = 0; n < PIXELS; ++n) store_channels<FULL>(y + n * p.channels + c, sum[n], count, around);
}

template <typename S, int PIXELS>
void forward_pixels(const GroupedProblem& p, const TapMajor<S>& weight, const Window& window, const S* bias, const S* x,
                    S* y, bool around) {
  int64_t c = 0;
  for (; c + kLanes<Compute<S>> <= p.channels; c += kLanes<Compute<S>>) {
    correlate<S, PIXELS, true>(p, weight, window, c, bias, x, y, around);
  }
  if (c < p.channels) correlate<S, PIXELS, false>(p, weight, window, c, bias, x, y, around);
}

template <typename S>
void forward_row(const GroupedProblem& p, const TapMajor<S>& weight, const S* x, const S* bias, S* y, int64_t i,
                 bool around) {
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
    for (int64_t r = 0; r < p.stride_h; ++r) {  // of the rows that the next output row needs and this one does not
      prefetch(from + next + r * p.in_w * p.channels, (fitting >= kPixels ? kPixels : 1) * p.stride_w * p.channels);
    }
    clip(w, p.dilation_w, p.in_w, p.kernel_w, &window.left, &window.right);
    if (fitting >= kPixels) {
      forward_pixels<S, kPixels>(p, weight, window, bias, from, to, around);
      j += kPixels;
    } else if (fitting >= kPixels / 2) {
      forward_pixels<S, kPixels / 2>(p, weight, window, bias, from, to, around);
      j += kPixels / 2;
    } else {
      forward_pixels<S, 1>(p, weight, window, bias, from, to, around);
      j += 1;
    }
  }
}

// --- backward ---

// The taps that pixels of one row of x see: those of `rows` and `columns` in the ranges of `window`.
struct Seen {
  const LatticeTaps &rows, &columns;
  Window window;
};

// What PIXELS pixels of one row of x meet, for one vector of channels: dx is set, `total` [taps][channels] added to.
// `dy` belongs to the first pixel and tap.
template <typename S, int PIXELS, bool FULL>
inline void meet(const GroupedProblem& p, const TapMajor<S>& weight, const Seen& seen, int64_t c, const S* dy,
                 const S* x, S* dx, Compute<S>* total, bool around) {
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
      T* tap_total = total + tap * weight.channels() + c;
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
  for (int n = 0; n < PIXELS; ++n) store_channels<FULL>(dx + n * x_step + c, sum[n], count, around);
}

template <typename S, int PIXELS>
void backward_pixels(const GroupedProblem& p, const TapMajor<S>& weight, const Seen& seen, const S* dy, const S* x,
                     S* dx, Compute<S>* total, bool around) {
  int64_t c = 0;
  for (; c + kLanes<Compute<S>> <= p.channels; c += kLanes<Compute<S>>) {
    meet<S, PIXELS, true>(p, weight, seen, c, dy, x, dx, total, around);
  }
  if (c < p.channels) meet<S, PIXELS, false>(p, weight, seen, c, dy, x, dx, total, around);
}

// The lattices of the rows and columns of x.
struct Lattices {
  explicit Lattices(const GroupedProblem& p) : rows(p.stride_h), columns(p.stride_w) {
    for (int64_t g = 0; g < p.stride_h; ++g) {
      rows[g] = lattice_taps(g, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
    }
    for (int64_t f = 0; f < p.stride_w; ++f) {
      columns[f] = lattice_taps(f, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
    }
  }
  Scratch<LatticeTaps> rows, columns;
};

template <typename S>
void backward_row(const GroupedProblem& p, const TapMajor<S>& weight, const Lattices& lattices, const S* grad_y,
                  const S* x, S* grad_x, int64_t i, Compute<S>* total, bool around) {
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
      if (f == 0) {  // what the next row of x needs and this one does not
        const int64_t pixels = fitting >= kPixels ? kPixels : 1;
        prefetch(from + p.in_w * p.channels, pixels * p.stride_w * p.channels);
        prefetch(dy + ((rows.count - 1) * rows.shift + 1) * p.out_w * p.channels, pixels * p.channels);
      }
      clip(w, columns.shift, p.out_w, columns.count, &seen.window.left, &seen.window.right);
      if (fitting >= kPixels) {
        backward_pixels<S, kPixels>(p, weight, seen, dy, from, grad_x + pixel, total, around);
        v += kPixels;
      } else if (fitting >= kPixels / 2) {
        backward_pixels<S, kPixels / 2>(p, weight, seen, dy, from, grad_x + pixel, total, around);
        v += kPixels / 2;
      } else {
        backward_pixels<S, 1>(p, weight, seen, dy, from, grad_x + pixel, total, around);
        v += 1;
      }
    }
  }
}

}  // namespace

template <typename S>
void depthwise_nhwc_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                            int64_t end) {
  const TapMajor<S> taps(p, weight);
  const bool around = around_cache(p, y, p.batch * p.out_size());
  for (int64_t row = begin; row < end; ++row) {
    const S* image = x + row / p.out_h * p.in_size() * p.channels;
    forward_row(p, taps, image, bias, y + row / p.out_h * p.out_size() * p.channels, row % p.out_h, around);
  }
  if (around) end_streams();
}

template <typename S>
void depthwise_nhwc_backward(const GroupedProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x,
                             double* totals, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const TapMajor<S> taps(p, weight);
  const Lattices lattices(p);
  Scratch<T> total(p.taps() * taps.channels());
  Scratch<S> unwanted(grad_x == nullptr ? p.in_size() * p.channels : 0);  // where dx goes when nobody wants it
  const int64_t strip = most(1, kStripTerms / p.in_w);
  const bool around = grad_x != nullptr && around_cache(p, grad_x, p.batch * p.in_size());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.in_h, image = n * p.in_size() * p.channels;
    S* dx = grad_x != nullptr ? grad_x + image : unwanted.data();
    const S* dy = grad_y + n * p.out_size() * p.channels;
    backward_row(p, taps, lattices, dy, x + image, dx, row % p.in_h, total.data(), around);
    if ((row - begin + 1) % strip != 0 && row + 1 < end) continue;
    for (int64_t t = 0; t < p.taps(); ++t) {
      const T* from = total.data() + t * taps.channels();
      for (int64_t c = 0; c < p.channels; ++c) totals[t * p.channels + c] += static_cast<double>(from[c]);
    }
    total.clear();
  }
  if (around) end_streams();
}

template <typename S>
void depthwise_nhwc_bias(const GroupedProblem& p, const S* grad_y, double* totals, int64_t begin, int64_t end) {
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

template <typename S>
void depthwise_nhwc_reduce(const GroupedProblem& p, const double* totals, int64_t chunks, S* grad_weight,
                           S* grad_bias) {
  const int64_t size = (p.taps() + 1) * p.channels;
  const auto sum = [&](int64_t at) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += totals[chunk * size + at];
    return static_cast<Compute<S>>(total);
  };
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t t = 0; grad_weight != nullptr && t < p.taps(); ++t) {
      store_one(grad_weight + c * p.taps() + t, sum(t * p.channels + c));
    }
    if (grad_bias != nullptr) store_one(grad_bias + c, sum(p.taps() * p.channels + c));
  }
}

REFCONV_INSTANTIATE_DEPTHWISE_NHWC(float)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC(double)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC(BFloat16)
REFCONV_INSTANTIATE_DEPTHWISE_NHWC(Half)

}  // namespace refconv::cpu::REFCONV_ISA
