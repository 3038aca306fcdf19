// Where the 3x3 kernels for NCHW planes find the vectors of each row: some columns of one plane, side by side, or two
// narrow planes in one vector.
#pragma once

#include "elements.h"
#include "lanes.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Two vectors that hold a piece of a row of x, for stride 2.
template <typename T>
struct Two {
  Vec<T> first, second;
};

// Columns of a plane, N vectors wide: whether the first and the last one of a row are among them, and how wide the last
// vector is.
template <int N, bool FIRST, bool LAST>
struct Columns {
  static constexpr int kVectors = N;
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
  // Vector j of a row, zero outside the plane.
  template <typename S>
  Vec<Compute<S>> load_row(const S* row, int j) const {
    row += j * kLanes<Compute<S>>;
    return ends(j) ? load_edge(row, count) : load(row);
  }
  // The pixels one further left and one further right; `v` are the vector's own.
  template <typename S>
  Vec<Compute<S>> load_left(const S* row, int j, Vec<Compute<S>> v) const {
    if (FIRST && j == 0) return lane_up<Compute<S>>(v, Vec<Compute<S>>{});
    row += j * kLanes<Compute<S>> - 1;
    return ends(j) ? load_edge(row, count) : load(row);
  }
  template <typename S>
  Vec<Compute<S>> load_right(const S* row, int j, Vec<Compute<S>> v) const {
    if (ends(j)) return lane_down<Compute<S>>(v, Vec<Compute<S>>{});
    return load(row + j * kLanes<Compute<S>> + 1);
  }
  template <typename S>
  void store_row(S* row, int j, Vec<Compute<S>> v, bool around) const {
    row += j * kLanes<Compute<S>>;
    if constexpr (sizeof(S) == sizeof(Compute<S>)) {
      if (__builtin_expect(around, false)) return store_around_cache(row, v);
    }
    ends(j) ? store_edge(row, v, count) : store(row, v);
  }

  // The pixels of a row of x that belong to vector j of a row of y; `width` pixels follow, those beyond are zero.
  template <typename S>
  Two<Compute<S>> load_two(const S* row, int j, int64_t width) const {
    constexpr int64_t kLane = kLanes<Compute<S>>;
    row += 2 * j * kLane;
    if (!ends(j)) return {load(row), load(row + kLane)};
    width -= 2 * j * kLane;
    return {load_edge(row, least(width, kLane)), load_edge(row + kLane, most(width - kLane, 0))};
  }
  template <typename S>
  void store_two(S* row, int j, const Two<Compute<S>>& v, int64_t width, bool around) const {
    constexpr int64_t kLane = kLanes<Compute<S>>;
    row += 2 * j * kLane, width -= 2 * j * kLane;
    const int64_t first = ends(j) ? least(width, kLane) : kLane, second = ends(j) ? most(width - kLane, 0) : kLane;
    Columns<1, false, LAST>{first}.store_row(row, 0, v.first, around && first == kLane);
    // Nothing is not stored: even so the line would be taken into the cache.
    if (second > 0) Columns<1, false, LAST>{second}.store_row(row + kLane, 0, v.second, around && second == kLane);
  }
#ifdef __AVX512VL__
  // The same pixels in one vector, two to a lane.
  VecBits load_paired_two(const BFloat16* row, int j, int64_t width) const {
    return load_paired(row + j * kPaired, paired_of(j, width));
  }
  void store_paired_two(BFloat16* row, int j, VecBits v, int64_t width) const {
    store_paired(row + j * kPaired, v, paired_of(j, width));
  }
#endif
  // Asks for vector j of a row of y, and for the two of x that belong to it, to be in the first cache soon.
  template <typename S>
  REFCONV_INLINE void fetch_row(const S* row, int j) const {
    __builtin_prefetch(row + j * kLanes<Compute<S>>);
  }
  template <typename S>
  REFCONV_INLINE void fetch_two(const S* row, int j) const {
    fetch_row(row, 2 * j), fetch_row(row, 2 * j + 1);
  }
  // v, one lane further right, behind that of vector j - 1.
  template <typename T>
  Vec<T> behind(Vec<T> v, Vec<T> before) const {
    return lane_up<T>(v, before);
  }

 private:
  static constexpr int64_t kPaired = 2 * kLanes<float>;
  static constexpr bool ends(int j) { return LAST && j == N - 1; }
  static int64_t paired_of(int j, int64_t width) { return ends(j) ? least(width - j * kPaired, kPaired) : kPaired; }
};

#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
// Planes in rows that fill at most half a vector of floats, two at a time: the second one in the upper half. They
// follow each other in memory, with the distances of x and y, and so do their weights. With stride 2 a row of x fills a
// vector.
struct Twins {
  static constexpr int kVectors = 1;
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
  Vec<Compute<S>> load_row(const S* row, int) const {
    return load_halves(row, row + out_step, count);
  }
  template <typename S>
  Vec<Compute<S>> load_left(const S*, int, Vec<Compute<S>> v) const {
    return one_up(v);
  }
  template <typename S>
  Vec<Compute<S>> load_right(const S*, int, Vec<Compute<S>> v) const {
    return one_down(v);
  }
  template <typename S>
  void store_row(S* to, int, Vec<Compute<S>> v, bool) const {
    store_halves(to, to + out_step, v, count);
  }
  template <typename S>
  Two<Compute<S>> load_two(const S* row, int, int64_t width) const {
    return {load_edge(row, width), load_edge(row + in_step, width)};
  }
  template <typename S>
  void store_two(S* to, int, const Two<Compute<S>>& v, int64_t width, bool) const {
    store_edge(to, v.first, width);
    store_edge(to + in_step, v.second, width);
  }
  VecBits load_paired_two(const BFloat16* row, int, int64_t width) const {
    const auto mask = static_cast<__mmask16>(first_lanes(width));
    const __m256i low = _mm256_maskz_loadu_epi16(mask, row), high = _mm256_maskz_loadu_epi16(mask, row + in_step);
    return (VecBits)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  void store_paired_two(BFloat16* row, int, VecBits v, int64_t width) const {
    const auto mask = static_cast<__mmask16>(first_lanes(width));
    _mm256_mask_storeu_epi16(row, mask, _mm512_castsi512_si256((__m512i)v));
    _mm256_mask_storeu_epi16(row + in_step, mask, _mm512_extracti64x4_epi64((__m512i)v, 1));
  }
  template <typename S>
  REFCONV_INLINE void fetch_row(const S* row, int) const {
    __builtin_prefetch(row), __builtin_prefetch(row + out_step);
  }
  template <typename S>
  REFCONV_INLINE void fetch_two(const S* row, int) const {
    __builtin_prefetch(row), __builtin_prefetch(row + in_step);
  }
  template <typename T>
  Vec<T> behind(Vec<T> v, Vec<T>) const {
    return one_up(v);
  }

 private:
  struct TwoHalves {
    static constexpr int of(int i, int lanes) { return i < lanes / 2 ? i : lanes + i; }
  };
  // The lanes of either half, one further; zero where nothing comes. Rotated: a permutation of two vectors, which has
  // three operands, gets in the way of multiply-adds (Zen 4).
  static Vec<float> one_up(Vec<float> v) {
    return (Vec<float>)_mm512_maskz_alignr_epi32(0xfefe, (__m512i)v, (__m512i)v, 15);
  }
  static Vec<float> one_down(Vec<float> v) {
    return (Vec<float>)_mm512_maskz_alignr_epi32(0x7f7f, (__m512i)v, (__m512i)v, 1);
  }
};
#endif

// Calls run(columns, offset) for the `width` columns from `offset` on, which fit N vectors.
template <typename T, int N, bool FIRST, typename Run>
inline void last_columns(int64_t width, int64_t offset, const Run& run) {
  if constexpr (N > 1) {
    if (width <= (N - 1) * kLanes<T>) return last_columns<T, N - 1, FIRST>(width, offset, run);
  }
  run(Columns<N, FIRST, true>{width - (N - 1) * kLanes<T>}, offset);
}

// Calls run(columns, offset) for a row's columns: all of them if they fit MOST vectors, otherwise some at a time, from
// left to right.
template <typename T, int MOST, typename Run>
inline void for_columns(int64_t width, const Run& run) {
  constexpr int kPart = MOST < 4 ? MOST : 4;
  if (width <= MOST * kLanes<T>) return last_columns<T, MOST, true>(width, 0, run);
  constexpr int64_t kStep = kPart * kLanes<T>;
  run(Columns<kPart, true, false>{kLanes<T>}, 0);
  int64_t j = kStep;
  for (; j + kStep < width; j += kStep) run(Columns<kPart, false, false>{kLanes<T>}, j);
  last_columns<T, kPart, false>(width - j, j, run);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
