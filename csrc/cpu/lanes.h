// What moves between the lanes of a vector, and sums over them.
#pragma once

#include <type_traits>

#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// Lane i of the result is lane f(i) of the 2 * kLanes elements in a, b; `Lane::of` computes f.
template <typename T, typename Lane, int... I>
inline Vec<T> permute(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Lane::of(I, sizeof...(I))...);
}

template <typename T, typename Lane>
inline Vec<T> permute(Vec<T> a, Vec<T> b) {
  return permute<T, Lane>(a, b, std::make_integer_sequence<int, static_cast<int>(kLanes<T>)>{});
}

struct EvenLanes {
  static constexpr int of(int i, int) { return 2 * i; }
};
struct OddLanes {
  static constexpr int of(int i, int) { return 2 * i + 1; }
};
// The lower and the upper half of a0 b0 a1 b1 ...
struct LowerInterleaved {
  static constexpr int of(int i, int lanes) { return i / 2 + (i % 2) * lanes; }
};
struct UpperInterleaved {
  static constexpr int of(int i, int lanes) { return lanes / 2 + i / 2 + (i % 2) * lanes; }
};

// Lane i of the result is lane i + BY of `low` followed by `high`, 0 <= BY < lanes.
template <int BY>
struct AlignedLanes {
  static constexpr int of(int i, int) { return i + BY; }
};
template <typename T, int BY>
inline Vec<T> align(Vec<T> low, Vec<T> high) {
  if constexpr (BY == 0) return low;
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_alignr_epi32((__m512i)high, (__m512i)low, BY);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_alignr_epi64((__m512i)high, (__m512i)low, BY);
#elif defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_alignr_epi32((__m256i)high, (__m256i)low, BY);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_alignr_epi64((__m256i)high, (__m256i)low, BY);
#else
  return permute<T, AlignedLanes<BY> >(low, high);
#endif
}
// All lanes one further up or down; the lane that gets free takes the last of `below`, the first of `above`.
template <typename T>
inline Vec<T> lane_up(Vec<T> v, Vec<T> below) {
  return align<T, kLanes<T> - 1>(below, v);
}
template <typename T>
inline Vec<T> lane_down(Vec<T> v, Vec<T> above) {
  return align<T, 1>(v, above);
}

// As many integers as there are lanes.
template <typename T>
using Indices = Vec<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> >;

// Lane i of the result is lane index[i] of `v`, modulo the lanes.
template <typename T>
inline Vec<T> choose(Vec<T> v, Indices<T> index) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
  } else {
    const Indices<T> halves = index * 2 + ((index * 2 + 1) << 32);
    return (Vec<T>)_mm256_permutevar8x32_epi32((__m256i)v, (__m256i)halves);
  }
#else
  Vec<T> chosen = {};
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) chosen[lane] = v[index[lane] % kLanes<T>];
  return chosen;
#endif
}

// The sum of all lanes, half by half.
template <int BY>
inline double sum_halves(Vec<double> v) {
  if constexpr (BY == 0) {
    return v[0];
  } else {
    return sum_halves<BY / 2>(v + align<double, BY>(v, v));
  }
}
template <int FIRST, int... I>
inline Vec<double> widened(Vec<float> v, std::integer_sequence<int, I...>) {
  return __builtin_convertvector(__builtin_shufflevector(v, v, (FIRST + I)...), Vec<double>);
}
// The sum of all lanes, in double.
template <typename T>
inline double sum(Vec<T> v) {
  constexpr int kLane = kLanes<double>;
  if constexpr (sizeof(T) == sizeof(double)) {
    return sum_halves<kLane / 2>(v);
  } else {
    constexpr std::make_integer_sequence<int, kLane> lanes;
    return sum_halves<kLane / 2>(widened<0>(v, lanes) + widened<kLane>(v, lanes));
  }
}

// The sum of `count` numbers, so many that they fill vectors, lane by lane and then half by half.
inline double sum_of(const double* from, int64_t count) {
  Vec<double> total = load(from);
  for (int64_t i = kLanes<double>; i < count; i += kLanes<double>) total += load(from + i);
  return sum_halves<kLanes<double> / 2>(total);
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
