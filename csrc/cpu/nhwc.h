// What both directions of the convolution on channels_last maps share: depthwise, or few channels per group.
//
// Equations: csrc/problem.h. Lanes are groups (channels, if depthwise). Strips of rows that fit the second cache are
// gone through for one vector of them after the other, by way of a few rows of it in the first cache (lane_rows.h); the
// next strip is fetched meanwhile, in the order of memory. 3x3 kernels have loops of their own (nhwc_3x3.h,
// nhwc_3x3_tiles.h).
#pragma once

#include "elements.h"
#include "kernels.h"
#include "lane_tiles.h"
#include "lattice.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"
#include "turn.h"

namespace refconv::cpu::REFCONV_ISA {

// Numbers of every lane, tap by tap: weights, or sums of their gradients. Forward, lanes are output channels, and tap t
// with input channel m of the group is tap m * taps + t. Backward they are input channels, and with output channel k of
// the group it is tap k * taps + t.
template <typename T>
struct TapMajor {
  T* data;
  int64_t step;  // from tap to tap: the lanes at least, in whole vectors
  T* at(int64_t tap, int64_t lane) const { return data + tap * step + lane; }
};

// Where the maps are: in the caches already; in memory; or there, with an output that is to be written around the
// cache.
enum class Maps { kCached, kMemory, kAround };

// Rows of y, with the memory that takes. Weights are those of all channels.
template <typename S>
class NhwcForward {
  using T = Compute<S>;

 public:
  explicit NhwcForward(const GroupedProblem& p);
  // Rows of y from row i on, `rows` of them; x and y are one image. The bias may be null.
  void run(TapMajor<const T> weight, const S* x, const S* bias, S* y, int64_t i, int64_t rows, Maps maps);

 private:
  int64_t run_3x3(TapMajor<const T> weight, const S* x, const S* bias, S* y, int64_t i, int64_t most_rows, Maps maps);
  void run_strip(TapMajor<const T> weight, const S* x, const S* bias, S* y, int64_t i, int64_t rows, Maps maps);
  void find_met(TapMajor<const T> weight, int64_t i, int64_t rows);

  const GroupedProblem p_;
  const bool tiled_;  // 3x3
  const int64_t strip_;
  const Tiles<T> tiles_;
  LaneRows<T> x_;
  TileOutput<S> output_;
  MetRows<T> met_;
  Scratch<T> pixel_;
};

// Rows of dx, with the memory that takes, and what they add to dW.
template <typename S>
class NhwcBackward {
  using T = Compute<S>;

 public:
  // For the channels [begin, end) of x: all of them if kernels are 3x3. Without `need_input`, dx is left alone, without
  // `need_weight` dW.
  NhwcBackward(const GroupedProblem& p, int64_t begin, int64_t end, bool need_input, bool need_weight);
  // Rows of x from row i on, `rows` of them; all maps are one image. dW is added to `total`, in the compute type. Both
  // weights and totals are those of the channels from the first one on.
  void run(TapMajor<const T> weight, const S* grad_y, const S* x, S* grad_x, int64_t i, int64_t rows, TapMajor<T> total,
           Maps maps);

 private:
  int64_t run_3x3(TapMajor<const T> weight, const S* grad_y, const S* x, S* grad_x, int64_t i, int64_t most_rows,
                  TapMajor<T> total, Maps maps);
  void run_strip(TapMajor<const T> weight, const S* grad_y, const S* x, S* grad_x, int64_t i, int64_t rows,
                 TapMajor<T> total, Maps maps);
  void find_met(TapMajor<const T> weight, int64_t i, int64_t rows);

  const GroupedProblem p_;
  const int64_t begin_, end_;
  const bool need_input_, need_weight_, tiled_;
  const Lattices lattices_;
  const int64_t strip_, left_;  // rows; zeros that dx meets before a row of dy
  LaneRows<T> x_, dy_;
  TileOutput<S> output_;
  MetRows<T> met_;
  Scratch<T> pixel_;
};

namespace {

// Of the maps that are read, for one strip: it, the next one and their outputs share the second cache. A larger strip
// reads fewer rows twice, but pays only where there is room.
inline int64_t strip_bytes() { return second_cache_bytes() >= 2 << 20 ? 256 << 10 : 128 << 10; }
// `rows` rows in equal strips of at most `most`: how many the first one has.
inline int64_t strip_rows(int64_t rows, int64_t most) { return ceil_div(rows, ceil_div(rows, most)); }
constexpr int64_t kStripTerms = 1024;  // added up in one lane before they move on to a double

// FULL: all lanes are channels; otherwise the first `count`.
template <bool FULL, typename S>
inline Vec<Compute<S>> load_channels(const S* from, int64_t count) {
  return FULL ? load(from) : load_partial(from, count);
}

template <bool FULL, typename S>
inline void store_channels(S* to, Vec<Compute<S>> v, int64_t count, Maps maps) {
  if constexpr (FULL && sizeof(S) == sizeof(Compute<S>)) {
    if (maps == Maps::kAround) return store_around_cache(to, v);
  }
  FULL ? store(to, v) : store_partial(to, v, count);
}

// Around the cache go outputs that are large enough, and made of whole aligned vectors that fill lines.
template <typename S>
Maps maps_of(const GroupedProblem& p, const S* output, int64_t pixels) {
  const int64_t vector = kLanes<Compute<S>> * static_cast<int64_t>(sizeof(S));
  const bool around =
      vector == 64 && p.multiplier == 1 && streams(pixels * p.channels * static_cast<int64_t>(sizeof(S)), vector) &&
      p.channels % kLanes<Compute<S>> == 0 && reinterpret_cast<uintptr_t>(output) % static_cast<uintptr_t>(vector) == 0;
  return around ? Maps::kAround : Maps::kMemory;
}

// What is fetched while something else is computed, so much for each pixel, in the order of memory; outputs too, since
// what is written has to be in the cache as well.
template <typename S>
struct Next {
  const S* from;
  int64_t elements;  // per pixel
  REFCONV_INLINE void fetch(int64_t pixels) {
    prefetch(from, pixels * elements);
    from += pixels * elements;
  }
};

// [taps][lanes rounded up], zero in the surplus lanes. Rows of an odd number of vectors, lest 512 or 1024 channels put
// all taps into a few sets of the first cache.
template <typename S>
class OwnTaps {
  using T = Compute<S>;

 public:
  OwnTaps(int64_t taps, int64_t lanes) : step_((ceil_div(lanes, kLanes<T>) | 1) * kLanes<T>), data_(taps * step_) {}
  // In `runs` runs of `taps` taps each, which begin at run(lane, k) in memory.
  template <typename Run>
  OwnTaps(int64_t runs, int64_t taps, int64_t lanes, const Run& run) : OwnTaps(runs * taps, lanes) {
    for (int64_t k = 0; k < runs; ++k) {
      turn_rows<S>(lanes, taps, [&](int64_t lane) { return run(lane, k); }, data_.data() + k * taps * step_, step_);
    }
  }
  TapMajor<T> view() { return {data_.data(), step_}; }
  TapMajor<const T> view() const { return {data_.data(), step_}; }
  void clear() { data_.clear(); }

 private:
  int64_t step_;
  Scratch<T> data_;
};

// Of the pixels behind each other that some outputs and taps span, those that may be met lie so far apart.
inline int64_t seen_every(int64_t stride, int64_t dilation, int64_t taps) {
  return taps == 1 ? stride : gcd(stride, dilation);
}

// The taps t for which first + t * step lies in [0, size).
inline void clip(int64_t first, int64_t step, int64_t size, int64_t taps, int64_t* begin, int64_t* end) {
  *begin = first < 0 ? least(taps, ceil_div(-first, step)) : 0;
  *end = first >= size ? 0 : least(taps, (size - 1 - first) / step + 1);
  if (*end < *begin) *end = *begin;
}

// Whether, with so many zeros before a row, some taps meet nothing else at all pixels of the first tile.
inline bool meets_only_zeros(int64_t pixels, int64_t stride, int64_t zeros) { return (pixels - 1) * stride < zeros; }
// The taps *begin to *end - 1, of `*end`, that meet [0, size) at some pixel of a tile, the first of which begins at
// `first`.
inline void clip_tile(int64_t pixels, int64_t stride, int64_t first, int64_t step, int64_t size, int64_t* begin,
                      int64_t* end) {
  int64_t unused;
  const int64_t taps = *end;
  clip(first, step, size, taps, &unused, end);
  clip(first + (pixels - 1) * stride, step, size, taps, begin, &unused);
  *end = most(*begin, *end);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
