// Two rows of a 3x3 depthwise convolution on channels_last maps, stride 1, in tiles of two by two pixels: the channels
// of a block one vector after the other, then the next tile, so in the order of memory. What the next tile meets first
// is fetched into the first cache. Sums are in the order of nhwc_3x3.h.
#pragma once

#include "nhwc.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// A tile WIDTH pixels wide and the columns it meets, one more on each side: those of 0 to WIDTH + 1 that are inside.
template <int WIDTH, bool LEFT_OUTSIDE, bool RIGHT_OUTSIDE>
struct TileShape {
  static constexpr int kWidth = WIDTH, kFirst = LEFT_OUTSIDE ? 1 : 0, kLast = WIDTH + (RIGHT_OUTSIDE ? 1 : 2);
};

// Calls run(shape, j) for the tiles of a row, the first pixel of each j, if `pads` with zeros beside the row.
template <typename Run>
REFCONV_INLINE void for_each_tile(int64_t width, bool pads, const Run& run) {
  int64_t j = 0;
  if (pads && width == 2) return run(TileShape<2, true, true>{}, j);
  if (pads) run(TileShape<2, true, false>{}, j), j += 2;
  for (const int64_t inside = pads ? width - 2 : width - 1; j < inside; j += 2) run(TileShape<2, false, false>{}, j);
  if (j + 2 == width) return run(TileShape<2, false, true>{}, j);
  if (j + 1 == width) pads ? run(TileShape<1, false, true>{}, j) : run(TileShape<1, false, false>{}, j);
}

// The same for tiles of one pixel with stride 2, which meet three columns of a row of `in_width`.
template <typename Run>
REFCONV_INLINE void for_each_tile_by_2(int64_t width, int64_t pad, int64_t in_width, const Run& run) {
  int64_t j = 0;
  if (pad == 1) run(TileShape<1, true, false>{}, j), j += 1;
  const bool outside = 2 * width - pad == in_width;  // the last column of the last tile
  for (const int64_t inside = outside ? width - 1 : width; j < inside; ++j) run(TileShape<1, false, false>{}, j);
  if (j < width) run(TileShape<1, false, true>{}, j);
}

// Calls run(first, last) for blocks of channels, equal in vectors, of which a pixel takes `most_bytes` at most.
template <typename T, typename Run>
REFCONV_INLINE void for_each_block(int64_t channels, int64_t most_bytes, const Run& run) {
  const int64_t vectors = ceil_div(channels, kLanes<T>), bytes = kLanes<T> * static_cast<int64_t>(sizeof(T));
  const int64_t block = ceil_div(vectors, ceil_div(vectors * bytes, most_bytes)) * kLanes<T>;
  for (int64_t c = 0; c < channels; c += block) run(c, least(c + block, channels));
}

// Whether the vector of channels from c on is the first one of its line.
template <typename S>
bool begins_line(int64_t c) {
  return c * static_cast<int64_t>(sizeof(S)) % 64 == 0;
}

// One map of a tile: the pixel of column 0 in its first row, and the steps from there.
template <typename S>
struct TileMap {
  S* first;
  int64_t pitch, step;
  S* at(int64_t row, int64_t column, int64_t c) const { return first + row * pitch + column * step + c; }
  // Of two rows from `row` on, the WIDTH pixels from `column` on. Pixels of a multiple of 2 KB share a few sets of the
  // first cache, which has no room left for those.
  template <int WIDTH>
  REFCONV_INLINE void fetch(int64_t row, int64_t column, int64_t c) const {
    const bool crowded = step * static_cast<int64_t>(sizeof(S)) % 2048 == 0;
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = 0; t < WIDTH; ++t) {
        const S* pixel = at(row + o, column + t, c);
        crowded ? prefetch(pixel, 1) : prefetch_next(pixel, 1);
      }
    }
  }
};

// y from four rows of x; the channels [first, last), whole vectors or, unless FULL, less than one.
template <typename S, typename Shape, bool FULL>
REFCONV_INLINE void correlate_tile_3x3(TapMajor<const Compute<S>> weight, const S* bias, TileMap<const S> x,
                                       TileMap<S> y, int64_t first, int64_t last, Maps maps) {
  using T = Compute<S>;
  constexpr int kWidth = Shape::kWidth;
  for (int64_t c = first; c < last; c += kLanes<T>) {
    const int64_t count = last - c;
    const Vec<T> start = bias != nullptr ? load_channels<FULL>(bias + c, count) : Vec<T>{};
    Vec<T> w[9], sum[2][kWidth];
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) w[k] = load(weight.at(k, c));
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = 0; t < kWidth; ++t) sum[o][t] = start;
    }
#pragma GCC unroll 4
    for (int q = Shape::kFirst; q < Shape::kLast; ++q) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vec<T> pixel = in_register(load_channels<FULL>(x.at(r, q, c), count));
#pragma GCC unroll 2
        for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
          for (int t = 0; t < kWidth; ++t) {
            if (r < o || r > o + 2 || q < t || q > t + 2) continue;
            sum[o][t] += w[(r - o) * 3 + q - t] * pixel;
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = 0; t < kWidth; ++t) store_channels<FULL>(y.at(o, t, c), sum[o][t], count, maps);
    }
    if (maps == Maps::kCached || !begins_line<S>(c)) continue;
    x.template fetch<kWidth>(2, kWidth + 2, c);
    if (maps == Maps::kMemory) y.template fetch<kWidth>(0, kWidth, c);
  }
}

// dx from four rows of dy, and what x, two rows, adds to the sums of dW.
template <typename S, typename Shape, bool FULL>
REFCONV_INLINE void meet_tile_3x3(TapMajor<const Compute<S>> weight, TileMap<const S> dy, TileMap<const S> x,
                                  TileMap<S> dx, TapMajor<Compute<S>> total, int64_t first, int64_t last, Maps maps) {
  using T = Compute<S>;
  constexpr int kWidth = Shape::kWidth;
  for (int64_t c = first; c < last; c += kLanes<T>) {
    const int64_t count = last - c;
    Vec<T> w[9], sum[9], pixel[2][kWidth], to[2][kWidth];
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) w[k] = load(weight.at(k, c)), sum[k] = load(total.at(k, c));
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = 0; t < kWidth; ++t) pixel[o][t] = load_channels<FULL>(x.at(o, t, c), count), to[o][t] = Vec<T>{};
    }
#pragma GCC unroll 4
    for (int q = Shape::kFirst; q < Shape::kLast; ++q) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vec<T> g = in_register(load_channels<FULL>(dy.at(r, q, c), count));
#pragma GCC unroll 2
        for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
          for (int t = 0; t < kWidth; ++t) {
            if (r < o || r > o + 2 || q < t || q > t + 2) continue;
            const int k = (2 - r + o) * 3 + 2 - q + t;
            to[o][t] += w[k] * g;
            sum[k] += pixel[o][t] * g;
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = 0; t < kWidth; ++t) store_channels<FULL>(dx.at(o, t, c), to[o][t], count, maps);
    }
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) store(total.at(k, c), sum[k]);
    if (maps == Maps::kCached || !begins_line<S>(c)) continue;
    dy.template fetch<kWidth>(2, kWidth + 2, c), x.template fetch<kWidth>(0, kWidth, c);
    if (maps == Maps::kMemory) dx.template fetch<kWidth>(0, kWidth, c);
  }
}

// With stride 2: two pixels of y, one below the other, from five rows and three columns of x.
template <typename S, typename Shape, bool FULL>
REFCONV_INLINE void correlate_tile_3x3_by_2(TapMajor<const Compute<S>> weight, const S* bias, TileMap<const S> x,
                                            TileMap<S> y, int64_t first, int64_t last, Maps maps) {
  using T = Compute<S>;
  for (int64_t c = first; c < last; c += kLanes<T>) {
    const int64_t count = last - c;
    const Vec<T> start = bias != nullptr ? load_channels<FULL>(bias + c, count) : Vec<T>{};
    Vec<T> sum[2] = {start, start};
#pragma GCC unroll 3
    for (int q = Shape::kFirst; q < Shape::kLast; ++q) {
#pragma GCC unroll 5
      for (int r = 0; r < 5; ++r) {
        const Vec<T> pixel = in_register(load_channels<FULL>(x.at(r, q, c), count));
#pragma GCC unroll 2
        for (int o = 0; o < 2; ++o) {
          if (r >= 2 * o && r <= 2 * o + 2) sum[o] += load(weight.at((r - 2 * o) * 3 + q, c)) * pixel;
        }
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) store_channels<FULL>(y.at(o, 0, c), sum[o], count, maps);
    if (maps == Maps::kCached || !begins_line<S>(c)) continue;
    x.template fetch<2>(1, 3, c), x.template fetch<2>(3, 3, c);
    if (maps == Maps::kMemory) y.template fetch<1>(0, 1, c);
  }
}

// dx of two by two pixels, the first of odd row and column, from as many of dy, and what x adds to the sums of dW.
// LEFT_OUTSIDE, RIGHT_OUTSIDE: the first or second column of all of them is.
template <typename S, bool LEFT_OUTSIDE, bool RIGHT_OUTSIDE, bool FULL>
REFCONV_INLINE void meet_tile_3x3_by_2(TapMajor<const Compute<S>> weight, TileMap<const S> dy, TileMap<const S> x,
                                       TileMap<S> dx, TapMajor<Compute<S>> total, int64_t first, int64_t last,
                                       Maps maps) {
  using T = Compute<S>;
  constexpr int kFirst = LEFT_OUTSIDE ? 1 : 0, kLast = RIGHT_OUTSIDE ? 1 : 2;
  for (int64_t c = first; c < last; c += kLanes<T>) {
    const int64_t count = last - c;
    Vec<T> pixel[2][2], to[2][2];
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = kFirst; t < kLast; ++t) {
        pixel[o][t] = load_channels<FULL>(x.at(o, t, c), count), to[o][t] = Vec<T>{};
      }
    }
#pragma GCC unroll 2
    for (int q = kFirst; q < kLast; ++q) {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const Vec<T> g = in_register(load_channels<FULL>(dy.at(r, q, c), count));
#pragma GCC unroll 2
        for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
          for (int t = kFirst; t < kLast; ++t) {
            const int a = o + 2 - 2 * r, b = t + 2 - 2 * q;
            if (a > 2 || b > 2) continue;
            to[o][t] += load(weight.at(a * 3 + b, c)) * g;
            store(total.at(a * 3 + b, c), load(total.at(a * 3 + b, c)) + pixel[o][t] * g);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 2
      for (int t = kFirst; t < kLast; ++t) store_channels<FULL>(dx.at(o, t, c), to[o][t], count, maps);
    }
    if (maps == Maps::kCached || !begins_line<S>(c)) continue;
    dy.template fetch<1>(1, 2, c), x.template fetch<2>(0, 2, c);
    if (maps == Maps::kMemory) dx.template fetch<2>(0, 2, c);
  }
}

// The channels [first, last) by run(full, first, last): whole vectors, then what is left.
template <typename T, typename Run>
REFCONV_INLINE void whole_and_rest(int64_t first, int64_t last, const Run& run) {
  const int64_t whole = first + (last - first) / kLanes<T> * kLanes<T>;
  run(std::true_type{}, first, whole);
  if (whole < last) run(std::false_type{}, whole, last);
}

// So many bytes of a pixel, with its weights, sums and what is fetched, leave some of a first cache of 32 KB.
constexpr int64_t kForwardBlockBytes = 768, kBackwardBlockBytes = 576;

// Rows i and i + 1 of y, of one image, at least 2 pixels wide, which meet no row outside.
template <typename S>
void forward_rows_of_tiles(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* x, const S* bias, S* y,
                           int64_t i, Maps maps) {
  using T = Compute<S>;
  const int64_t step = p.channels, x_pitch = p.in_w * step, y_pitch = p.out_w * step, stride = p.stride_w;
  for_each_block<T>(p.channels, kForwardBlockBytes, [&](int64_t begin, int64_t end) {
    const auto run = [&](int64_t j, const auto& tile) {
      const TileMap<const S> from{x + (i * stride - p.pad_h) * x_pitch + (j * stride - p.pad_w) * step, x_pitch, step};
      const TileMap<S> to{y + i * y_pitch + j * step, y_pitch, step};
      whole_and_rest<T>(begin, end, [&](auto full, int64_t first, int64_t last) { tile(full, from, to, first, last); });
    };
    if (stride == 1) {
      for_each_tile(p.out_w, p.pad_w == 1, [&](auto shape, int64_t j) {
        run(j, [&](auto full, const auto& from, const auto& to, int64_t first, int64_t last) {
          correlate_tile_3x3<S, decltype(shape), decltype(full)::value>(weight, bias, from, to, first, last, maps);
        });
      });
    } else {
      for_each_tile_by_2(p.out_w, p.pad_w, p.in_w, [&](auto shape, int64_t j) {
        run(j, [&](auto full, const auto& from, const auto& to, int64_t first, int64_t last) {
          correlate_tile_3x3_by_2<S, decltype(shape), decltype(full)::value>(weight, bias, from, to, first, last, maps);
        });
      });
    }
  });
}

// Rows i and i + 1 of dx, of one image with a pixel of padding, at least 2 pixels wide, which meet no row outside.
template <typename S>
void backward_rows_of_tiles(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* grad_y, const S* x,
                            S* grad_x, int64_t i, TapMajor<Compute<S>> total, Maps maps) {
  using T = Compute<S>;
  const int64_t step = p.channels, pitch = p.in_w * step;
  for_each_block<T>(p.channels, kBackwardBlockBytes, [&](int64_t begin, int64_t end) {
    for_each_tile(p.in_w, true, [&](auto shape, int64_t j) {
      using Shape = decltype(shape);
      const int64_t at = i * pitch + j * step;
      const TileMap<const S> dy{grad_y + at - pitch - step, pitch, step}, from{x + at, pitch, step};
      const TileMap<S> dx{grad_x + at, pitch, step};
      whole_and_rest<T>(begin, end, [&](auto full, int64_t first, int64_t last) {
        meet_tile_3x3<S, Shape, decltype(full)::value>(weight, dy, from, dx, total, first, last, maps);
      });
    });
  });
}

// The same with stride 2, for an odd row i.
template <typename S>
void backward_rows_of_tiles_by_2(const GroupedProblem& p, TapMajor<const Compute<S>> weight, const S* grad_y,
                                 const S* x, S* grad_x, int64_t i, TapMajor<Compute<S>> total, Maps maps) {
  using T = Compute<S>;
  const int64_t step = p.channels, pitch = p.in_w * step, y_pitch = p.out_w * step;
  for_each_block<T>(p.channels, kBackwardBlockBytes, [&](int64_t begin, int64_t end) {
    const auto run = [&](auto left, auto right, int64_t n) {
      const int64_t at = i * pitch + (2 * n - 1) * step;
      const TileMap<const S> dy{grad_y + i / 2 * y_pitch + (n - 1) * step, y_pitch, step}, from{x + at, pitch, step};
      const TileMap<S> dx{grad_x + at, pitch, step};
      whole_and_rest<T>(begin, end, [&](auto full, int64_t first, int64_t last) {
        meet_tile_3x3_by_2<S, decltype(left)::value, decltype(right)::value, decltype(full)::value>(
            weight, dy, from, dx, total, first, last, maps);
      });
    };
    constexpr std::true_type outside;
    constexpr std::false_type inside;
    run(outside, inside, 0);
    for (int64_t n = 1; n < p.out_w; ++n) run(inside, inside, n);
    if (p.in_w % 2 == 0) run(inside, outside, p.out_w);
  });
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
