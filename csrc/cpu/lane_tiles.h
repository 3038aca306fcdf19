// Loops over rows of one vector of channels (lane_rows.h): tiles of outputs, and the sums of dW.
#pragma once

#include "lane_rows.h"

namespace refconv::cpu::REFCONV_ISA {

constexpr int kMostTile = 8;   // pixels computed together
constexpr int kLeastTile = 4;  // as many sums as keep the multiply-adds half busy
constexpr int kMostTaps = 7;   // of a row, in one pass over a tile
// Pixels that several taps meet wait in registers; where those are few they are operands from the first cache, and
// all registers are sums.
constexpr bool kKeepsPixels = kVectorRegisters == 32;

// A row of LaneRows, and the weights that meet it.
template <typename T>
struct TapRow {
  const T *pixels, *weight;
};

// What each row of a strip meets, the same for all vectors of channels: weights are those of the first one.
template <typename T>
class MetRows {
 public:
  // Up to `rows` rows, each of which meets up to `most` others.
  MetRows(int64_t rows, int64_t most) : most_(most), met_(rows * most), counts_(rows) {}
  void clear(int64_t row) { counts_[row] = 0; }
  void add(int64_t row, TapRow<T> met) { met_[row * most_ + counts_[row]++] = met; }
  const TapRow<T>* at(int64_t row) const { return met_.data() + row * most_; }
  int64_t count(int64_t row) const { return counts_[row]; }

 private:
  int64_t most_;
  Scratch<TapRow<T>> met_;
  Scratch<int64_t> counts_;
};

// What every pixel of a tile meets: `row_count` rows, `columns` taps in each. In LaneRows, pixels of the tile are
// `stride` apart, taps `dilation`; the weights of a row lie `weight_step` apart, from `first_weight` on.
template <typename T>
struct TileTaps {
  const TapRow<T>* rows;
  int64_t row_count, columns, stride, dilation, first_weight, weight_step;
};

// Adds what TAPS neighbouring taps of one row add to the sums of a tile.
template <typename T, int PIXELS, int STRIDE, int TAPS>
REFCONV_INLINE void meet_taps(Vec<T> (&sum)[PIXELS], const T* from, const T* weight, int64_t step) {
  constexpr int kSeen = (PIXELS - 1) * STRIDE + TAPS, kKept = kKeepsPixels ? kSeen : 0;
  Vec<T> pixel[kSeen];
#pragma GCC unroll 32
  for (int k = 0; k < kKept; ++k) pixel[k] = in_register(load(from + k * kLanes<T>));
#pragma GCC unroll 8
  for (int b = 0; b < TAPS; ++b) {
    const Vec<T> w = in_register(load(weight + b * step));
#pragma GCC unroll 8
    for (int n = 0; n < PIXELS; ++n) {
      const int k = n * STRIDE + b;
      sum[n] += w * (kKeepsPixels ? pixel[k] : load(from + k * kLanes<T>));
    }
  }
}

// PIXELS outputs, from `offset` in the rows on; STRIDE 0 is any stride and dilation. Each goes to `to`, `to_step`
// after the one before.
template <typename T, int PIXELS, int STRIDE>
void correlate_tile(const TileTaps<T>& taps, int64_t offset, Vec<T> start, T* to, int64_t to_step, bool around) {
  constexpr int64_t kLane = kLanes<T>;
  Vec<T> sum[PIXELS];
#pragma GCC unroll 8
  for (int n = 0; n < PIXELS; ++n) sum[n] = start;
  for (int64_t a = 0; a < taps.row_count; ++a) {
    const T *from = taps.rows[a].pixels + offset, *weight = taps.rows[a].weight + taps.first_weight;
    if constexpr (STRIDE == 0) {
      const int64_t tap_step = taps.dilation * kLane, pixel_step = taps.stride * kLane;
      for (int64_t b = 0; b < taps.columns; ++b, from += tap_step, weight += taps.weight_step) {
        const Vec<T> w = in_register(load(weight));
#pragma GCC unroll 8
        for (int n = 0; n < PIXELS; ++n) sum[n] += w * load(from + n * pixel_step);
      }
    } else {
      const int64_t step = taps.weight_step;
      int64_t left = taps.columns;
      for (; left > kMostTaps; left -= kMostTaps, from += kMostTaps * kLane, weight += kMostTaps * step) {
        meet_taps<T, PIXELS, STRIDE, kMostTaps>(sum, from, weight, step);
      }
      switch (left) {
          // clang-format off
        case 1: meet_taps<T, PIXELS, STRIDE, 1>(sum, from, weight, step); break;
        case 2: meet_taps<T, PIXELS, STRIDE, 2>(sum, from, weight, step); break;
        case 3: meet_taps<T, PIXELS, STRIDE, 3>(sum, from, weight, step); break;
        case 4: meet_taps<T, PIXELS, STRIDE, 4>(sum, from, weight, step); break;
        case 5: meet_taps<T, PIXELS, STRIDE, 5>(sum, from, weight, step); break;
        case 6: meet_taps<T, PIXELS, STRIDE, 6>(sum, from, weight, step); break;
        case 7: meet_taps<T, PIXELS, STRIDE, 7>(sum, from, weight, step); break;
        default: break;
          // clang-format on
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < PIXELS; ++n) {
    around ? store_around_cache(to + n * to_step, sum[n]) : store(to + n * to_step, sum[n]);
  }
}

// total[b] += the sum over j < width of dy[j] * x[j * stride + b * dilation], for TAPS neighbouring taps b, `step`
// apart in total. STRIDE 0 is any stride and dilation.
template <typename T, int STRIDE, int TAPS>
void add_products(const T* x, const T* dy, int64_t width, int64_t stride, int64_t dilation, T* total, int64_t step) {
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kTogether = STRIDE == 0 ? 1 : 4, kSeen = (kTogether - 1) * STRIDE + TAPS;
  // Of each tap: one sum waits for the last multiply-add.
  constexpr int kSums = STRIDE != 0 && (TAPS < 4 || !kKeepsPixels) ? 2 : 1;
  Vec<T> sum[kSums][TAPS] = {};
#pragma GCC unroll 8
  for (int b = 0; b < TAPS; ++b) sum[0][b] = load(total + b * step);
  const auto meet = [&](int64_t j, auto together) {
    constexpr int kPixels = decltype(together)::value;
    const T* from = x + j * stride * kLane;
    const int64_t tap_step = (STRIDE == 0 ? dilation : 1) * kLane;
    Vec<T> pixel[kSeen];
#pragma GCC unroll 16
    for (int k = 0; kKeepsPixels && k < (kPixels - 1) * STRIDE + TAPS; ++k) {
      pixel[k] = in_register(load(from + k * tap_step));
    }
#pragma GCC unroll 4
    for (int n = 0; n < kPixels; ++n) {
      const Vec<T> g = in_register(load(dy + (j + n) * kLane));
#pragma GCC unroll 8
      for (int b = 0; b < TAPS; ++b) {
        const int k = n * STRIDE + b;
        sum[n % kSums][b] += (kKeepsPixels ? pixel[k] : load(from + k * tap_step)) * g;
      }
    }
  };
  int64_t j = 0;
  for (; j + kTogether <= width; j += kTogether) meet(j, std::integral_constant<int, kTogether>{});
  for (; j < width; ++j) meet(j, std::integral_constant<int, 1>{});
#pragma GCC unroll 8
  for (int b = 0; b < TAPS; ++b) store(total + b * step, kSums == 2 ? sum[0][b] + sum[kSums - 1][b] : sum[0][b]);
}

// The same for `taps` neighbouring taps, at most kMostTaps.
template <typename T, int STRIDE>
void add_row_products(const T* x, const T* dy, int64_t width, int64_t stride, int64_t dilation, int64_t taps, T* total,
                      int64_t step) {
  switch (taps) {
      // clang-format off
    case 1: return add_products<T, STRIDE, 1>(x, dy, width, stride, dilation, total, step);
    case 2: return add_products<T, STRIDE, 2>(x, dy, width, stride, dilation, total, step);
    case 3: return add_products<T, STRIDE, 3>(x, dy, width, stride, dilation, total, step);
    case 4: return add_products<T, STRIDE, 4>(x, dy, width, stride, dilation, total, step);
    case 5: return add_products<T, STRIDE, 5>(x, dy, width, stride, dilation, total, step);
    case 6: return add_products<T, STRIDE, 6>(x, dy, width, stride, dilation, total, step);
    default: return add_products<T, STRIDE, 7>(x, dy, width, stride, dilation, total, step);
      // clang-format on
  }
}

// The tiles of a row of `width` outputs: as few as can be, of equal size, the last of which may overlap the one before
// (or end behind the row, if that is shorter than a tile can be).
template <typename T>
struct Tiles {
  int64_t width, pixels;
  void (*correlate)(const TileTaps<T>&, int64_t, Vec<T>, T*, int64_t, bool);

  // Pixels `stride` apart meet taps `dilation` apart.
  Tiles(int64_t row, int64_t stride, int64_t dilation)
      : width(row), pixels(most(kLeastTile, ceil_div(row, most(1, ceil_div(row, kMostTile))))) {
    const bool any = stride > 2 || dilation > 1;
    correlate = any ? of_stride<0>() : stride == 1 ? of_stride<1>() : of_stride<2>();
  }
  bool overrun() const { return width < pixels; }
  int64_t padded() const { return most(width, pixels); }

  // Calls at(j) for the first output of every tile.
  template <typename At>
  REFCONV_INLINE void for_each(const At& at) const {
    for (int64_t j = 0; width > 0; j = least(j + pixels, width - pixels)) {
      at(j);
      if (j + pixels >= width) break;
    }
  }

 private:
  template <int STRIDE>
  auto of_stride() const {
    auto chosen = correlate_tile<T, kLeastTile, STRIDE>;
    if (pixels == 5) chosen = correlate_tile<T, 5, STRIDE>;
    if (pixels == 6) chosen = correlate_tile<T, 6, STRIDE>;
    if (pixels == 7) chosen = correlate_tile<T, 7, STRIDE>;
    if (pixels == 8) chosen = correlate_tile<T, 8, STRIDE>;
    return chosen;
  }
};

// Rows of tiles on their way to a map: into it at once where its pixels are whole vectors of the compute type,
// otherwise by way of a row of vectors.
template <typename S>
class TileOutput {
  using T = Compute<S>;
  static constexpr int64_t kLane = kLanes<T>;

 public:
  explicit TileOutput(int64_t pixels) : row_(pixels * kLane) {}

  // A row of `tiles` to `to`, whose pixels are `step` apart, of `count` channels. tile(j, to, step, around) computes
  // the one that begins with output j.
  template <typename Tile>
  REFCONV_INLINE void write(const Tiles<T>& tiles, S* to, int64_t step, int64_t count, bool around, const Tile& tile) {
    if constexpr (sizeof(S) == sizeof(T)) {
      if (count >= kLane && !tiles.overrun()) {
        return tiles.for_each([&](int64_t j) { tile(j, to + j * step, step, around); });
      }
    }
    tiles.for_each([&](int64_t j) { tile(j, row_.data() + j * kLane, kLane, false); });
    for (int64_t j = 0; j < tiles.width; ++j) store_lanes(to + j * step, load(row_.data() + j * kLane), count);
  }

 private:
  Scratch<T> row_;
};

}  // namespace refconv::cpu::REFCONV_ISA
