// Where the 3x3 kernels for NCHW planes find a vector of each row: a column of one plane, or two narrow planes side by
// side. And what they fetch for the planes that come next.
#pragma once

#include "elements.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Two vectors that hold a piece of a row of x, for stride 2.
template <typename T>
struct Two {
  Vec<T> first, second;
};

// A column of a plane: whether it is the first and the last one, and how wide that one is.
template <bool FIRST, bool LAST>
struct Column {
  static constexpr bool kFirst = FIRST;
  int64_t count;

  template <typename T>
  Vec<T> weight(const T* taps, int t) const {
    return broadcast(taps[t]);
  }
  template <typename T>
  Vec<T> bias(const T* value) const {
    return broadcast(*value);
  }
  // The row's pixels, zero outside the plane.
  template <typename S>
  Vec<Compute<S>> load_row(const S* row) const {
    return LAST ? load_lanes(row, count) : load(row);
  }
  // The pixels one further left and one further right; `v` are the row's own.
  template <typename S>
  Vec<Compute<S>> load_left(const S* row, Vec<Compute<S>> v) const {
    if constexpr (FIRST) return lane_up<Compute<S>>(v, Vec<Compute<S>>{});
    return LAST ? load_lanes(row - 1, count) : load(row - 1);
  }
  template <typename S>
  Vec<Compute<S>> load_right(const S* row, Vec<Compute<S>> v) const {
    if constexpr (LAST) return lane_down<Compute<S>>(v, Vec<Compute<S>>{});
    return load(row + 1);
  }
  template <typename S>
  void store_row(S* to, Vec<Compute<S>> v, bool around) const {
    if constexpr (sizeof(S) == sizeof(Compute<S>)) {
      if (around) return store_around_cache(to, v);
    }
    LAST ? store_lanes(to, v, count) : store(to, v);
  }
  // A piece of a row of which `width` pixels follow; those beyond are zero.
  template <typename S>
  Two<Compute<S>> load_two(const S* from, int64_t width) const {
    using T = Compute<S>;
    constexpr int64_t kLane = kLanes<T>;
    if constexpr (!LAST) return {load(from), load(from + kLane)};
    return {load_lanes(from, width), width > kLane ? load_lanes(from + kLane, width - kLane) : Vec<T>{}};
  }
  template <typename S>
  void store_two(S* to, const Two<Compute<S>>& v, int64_t width, bool around) const {
    constexpr int64_t kLane = kLanes<Compute<S>>;
    const Column<false, LAST> first{least(width, kLane)}, second{width - kLane};
    first.store_row(to, v.first, around && width >= kLane);
    if (!LAST || width > kLane) second.store_row(to + kLane, v.second, around && width >= 2 * kLane);
  }
};

#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
// Planes in rows that fill at most half a vector of floats, two at a time: the second one in the upper half. They
// follow each other in memory, with the distances of x and y, and so do their weights. With stride 2 a row of x fills a
// vector.
struct Twins {
  static constexpr bool kFirst = true;
  int64_t count, in_step, out_step;

  template <typename T>
  Vec<T> weight(const T* taps, int t) const {
    return permute<T, TwoHalves>(broadcast(taps[t]), broadcast(taps[9 + t]));
  }
  template <typename T>
  Vec<T> bias(const T* value) const {
    return permute<T, TwoHalves>(broadcast(value[0]), broadcast(value[1]));
  }
  template <typename S>
  Vec<Compute<S>> load_row(const S* row) const {
    return load_halves(row, row + out_step, count);
  }
  template <typename S>
  Vec<Compute<S>> load_left(const S*, Vec<Compute<S>> v) const {
    return permute<Compute<S>, OneUpInHalves>(v, Vec<Compute<S>>{});
  }
  template <typename S>
  Vec<Compute<S>> load_right(const S*, Vec<Compute<S>> v) const {
    return permute<Compute<S>, OneDownInHalves>(v, Vec<Compute<S>>{});
  }
  template <typename S>
  void store_row(S* to, Vec<Compute<S>> v, bool) const {
    store_halves(to, to + out_step, v, count);
  }
  template <typename S>
  Two<Compute<S>> load_two(const S* from, int64_t width) const {
    return {load_lanes(from, width), load_lanes(from + in_step, width)};
  }
  template <typename S>
  void store_two(S* to, const Two<Compute<S>>& v, int64_t width, bool) const {
    store_lanes(to, v.first, width);
    store_lanes(to + in_step, v.second, width);
  }

 private:
  struct TwoHalves {
    static constexpr int of(int i, int lanes) { return i < lanes / 2 ? i : lanes + i; }
  };
  struct OneUpInHalves {
    static constexpr int of(int i, int lanes) { return i % (lanes / 2) == 0 ? lanes : i - 1; }
  };
  struct OneDownInHalves {
    static constexpr int of(int i, int lanes) { return (i + 1) % (lanes / 2) == 0 ? lanes : i + 1; }
  };
};
#endif

// What is fetched during a row of y: so many vectors of x and of dx, one of y or dy; nothing of what is null.
template <typename S, int VECTORS>
struct NextPlane {
  const S *x = nullptr, *y = nullptr, *dx = nullptr;

  REFCONV_INLINE void fetch(int64_t row) const {
    constexpr int64_t kLane = kLanes<Compute<S>>;
    if (x != nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(x + (row * VECTORS + v) * kLane, 0, 2);
    }
    if (y != nullptr) __builtin_prefetch(y + row * kLane, 0, 2);
    if (dx != nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(dx + (row * VECTORS + v) * kLane, 0, 2);
    }
  }
  // After a column of so many rows of y.
  void advance(int64_t rows) {
    constexpr int64_t kLane = kLanes<Compute<S>>;
    if (x != nullptr) x += rows * VECTORS * kLane;
    if (y != nullptr) y += rows * kLane;
    if (dx != nullptr) dx += rows * VECTORS * kLane;
  }
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
