// The Refocusing Transformation of groups of one 3x3 kernel with 3x3 taps (dense bases), as many kernels at once as a
// vector has lanes.
//
// W_t and dW_r are the same sum with the roles of their factors exchanged: with f = W_r or dW_t and k = W_b,
// result[t] = sum_s f[s] k[t + s - centre] over the s that stay inside, 49 products in all. What costs is to bring the
// taps of L kernels, nine vectors as they lie in memory, into nine vectors of one tap each, and back: L is a power of
// two, so vector v has tap (L v + l) % 9 in lane l. Renaming vectors and turning lane l by l % 9 vectors, in steps of
// 1, 2, 4 and 8, leaves every tap in its vector, with the kernels in an order that is one rotation of lanes away from
// that of the first.
#pragma once

#include "elements.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kAheadBytes = 8192;  // where the next kernels are fetched

// Lane i of the result is that of `b` where Lanes::of(i), otherwise that of `a`.
template <typename T, typename Lanes, int... I>
inline Vec<T> choose_lanes(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  constexpr unsigned kMask = ((Lanes::of(I) ? 1u << I : 0u) | ...);
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask_blend_ps(kMask, (__m512)a, (__m512)b);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_mask_blend_pd(kMask, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  constexpr int kMask = ((Lanes::of(I) ? 1 << I : 0) | ...);
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_blend_ps((__m256)a, (__m256)b, kMask);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_blend_pd((__m256d)a, (__m256d)b, kMask);
#else
  return __builtin_shufflevector(a, b, (Lanes::of(I) ? static_cast<int>(sizeof...(I)) + I : I)...);
#endif
}

template <int STEP>
struct TurnedLanes {
  static constexpr bool of(int lane) { return (lane % 9 & STEP) != 0; }
};

// Lane l of vector t becomes that of vector t - STEP, or with `BACK` the other way round, where l % 9 has that bit.
template <typename T, int STEP, bool BACK>
inline void turn_lanes(Vec<T>* v) {
  constexpr std::make_integer_sequence<int, static_cast<int>(kLanes<T>)> all;
  Vec<T> turned[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    turned[t] = choose_lanes<T, TurnedLanes<STEP>>(v[t], v[(t + (BACK ? STEP : 9 - STEP)) % 9], all);
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) v[t] = turned[t];
}

template <typename T, bool BACK, int... TAP>
inline void rotate_lanes(Vec<T>* v, std::integer_sequence<int, TAP...>) {
  constexpr int kLane = kLanes<T>;
  ((v[TAP] = align<T, (BACK ? 9 * kLane - TAP : TAP) % kLane>(v[TAP], v[TAP])), ...);
}

// Which vector of memory holds tap t in lane 0.
template <typename T>
constexpr int vector_of(int tap) {
  int v = 0;
  while (v * kLanes<T> % 9 != tap) ++v;
  return v;
}

template <typename S, int... TAP>
REFCONV_INLINE void load_taps(const S* from, Vec<Compute<S>>* v, std::integer_sequence<int, TAP...> taps) {
  using T = Compute<S>;
  ((v[TAP] = load(from + vector_of<T>(TAP) * kLanes<T>)), ...);
  turn_lanes<T, 1, false>(v), turn_lanes<T, 2, false>(v), turn_lanes<T, 4, false>(v);
  if constexpr (kLanes<T> > 8) turn_lanes<T, 8, false>(v);
  rotate_lanes<T, false>(v, taps);
}

template <typename S, int... TAP>
REFCONV_INLINE void store_taps(S* to, Vec<Compute<S>>* v, std::integer_sequence<int, TAP...> taps) {
  using T = Compute<S>;
  rotate_lanes<T, true>(v, taps);
  if constexpr (kLanes<T> > 8) turn_lanes<T, 8, true>(v);
  turn_lanes<T, 4, true>(v), turn_lanes<T, 2, true>(v), turn_lanes<T, 1, true>(v);
  (store(to + vector_of<T>(TAP) * kLanes<T>, v[TAP]), ...);
}

// As many kernels as there are lanes. `start`: the sums begin with `basis`.
template <typename S, bool START>
REFCONV_INLINE void refocus_kernels(const S* basis, const S* factors, S* result) {
  using T = Compute<S>;
  constexpr std::make_integer_sequence<int, 9> taps;
  Vec<T> k[9], f[9], sum[9];
  load_taps(basis, k, taps);
  load_taps(factors, f, taps);
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sum[t] = START ? k[t] : Vec<T>{};
#pragma GCC unroll 9
  for (int s = 0; s < 9; ++s) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {  // nine sums in turn: one of them alone would wait for itself
      const int row = t / 3 + s / 3 - 1, column = t % 3 + s % 3 - 1;
      if (row >= 0 && row < 3 && column >= 0 && column < 3) sum[t] += f[s] * k[row * 3 + column];
    }
  }
  store_taps(result, sum, taps);
}

// Any number of kernels. `ahead`: the next ones are fetched, which costs a twelfth where they lie in the caches anyway.
template <typename S, bool START>
void refocus_some_kernels(const S* basis, const S* factors, S* result, int64_t count, bool ahead) {
  constexpr int64_t kAtOnce = kLanes<Compute<S>>, kSize = 9 * kAtOnce;
  constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(S));
  int64_t n = 0;
  for (; n + kAtOnce <= count; n += kAtOnce) {
    if (ahead) {
      for (const S* next : {basis, factors, static_cast<const S*>(result)}) prefetch(next + n * 9 + kAhead, kSize);
    }
    refocus_kernels<S, START>(basis + n * 9, factors + n * 9, result + n * 9);
  }
  if (n == count) return;
  // The last ones in the same way: which they are depends on the threads, and nothing else may.
  S k[kSize] = {}, f[kSize] = {}, to[kSize];
  const size_t bytes = static_cast<size_t>((count - n) * 9) * sizeof(S);
  __builtin_memcpy(k, basis + n * 9, bytes);
  __builtin_memcpy(f, factors + n * 9, bytes);
  refocus_kernels<S, START>(k, f, to);
  __builtin_memcpy(result + n * 9, to, bytes);
}

// Kernels `begin` to `end` - 1. `large`: the tensors hardly stay in a cache. `around`: the result is written around it.
template <typename S, bool START>
void refocus_dense_3x3(const S* basis, const S* factors, S* result, int64_t begin, int64_t end, bool large,
                       bool around) {
  if (!around) {
    basis += begin * 9, factors += begin * 9, result += begin * 9;
    return refocus_some_kernels<S, START>(basis, factors, result, end - begin, large);
  }
  constexpr int64_t kHeld = 64;
  alignas(64) S held[kHeld * 9];
  for (int64_t n = begin; n < end; n += kHeld) {
    const int64_t count = least(kHeld, end - n);
    refocus_some_kernels<S, START>(basis + n * 9, factors + n * 9, held, count, true);
    stream(result + n * 9, held, count * 9);
  }
  end_streams();
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
