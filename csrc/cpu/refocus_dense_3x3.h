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
#include "lanes.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kAheadBytes = 4096;  // where the next kernels are fetched
constexpr std::make_integer_sequence<int, 9> kTaps;
constexpr int kMiddle = 4;
constexpr std::make_integer_sequence<int, 5> kAllParts;  // of load_part

template <typename T>
constexpr int64_t kBlock = 9 * kLanes<T>;  // the entries of as many kernels as there are lanes

#ifdef __AVX512VL__  // 32 registers
constexpr bool kOverlapping = true;
#else
constexpr bool kOverlapping = false;
#endif

template <typename S>
void fetch_ahead(const S* basis, const S* factors, const S* result) {
  constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(S));
  for (const S* next : {basis, factors, result}) prefetch_next(next + kAhead, kBlock<Compute<S>>);
}

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

// The taps of as many kernels as there are lanes, in parts that the products of others can come between: after the
// last one, 4, `v` has one tap per vector. Parts that there are not do nothing.
template <typename S, int PART, int... TAP>
REFCONV_INLINE void load_part(const S* from, Vec<Compute<S>>* v, std::integer_sequence<int, TAP...> taps) {
  using T = Compute<S>;
  if constexpr (PART == 0) {
    ((v[TAP] = load(from + vector_of<T>(TAP) * kLanes<T>)), ...);
    turn_lanes<T, 1, false>(v);
  }
  if constexpr (PART == 1) turn_lanes<T, 2, false>(v);
  if constexpr (PART == 2 && kLanes<T> > 4) turn_lanes<T, 4, false>(v);
  if constexpr (PART == 3 && kLanes<T> > 8) turn_lanes<T, 8, false>(v);
  if constexpr (PART == 4) rotate_lanes<T, false>(v, taps);
}

template <typename S, int... PART>
REFCONV_INLINE void load_taps(const S* from, Vec<Compute<S>>* v, std::integer_sequence<int, PART...>) {
  (load_part<S, PART>(from, v, kTaps), ...);
}

template <typename S, int... TAP>
REFCONV_INLINE void store_taps(S* to, Vec<Compute<S>>* v, std::integer_sequence<int, TAP...> taps) {
  using T = Compute<S>;
  rotate_lanes<T, true>(v, taps);
  if constexpr (kLanes<T> > 8) turn_lanes<T, 8, true>(v);
  if constexpr (kLanes<T> > 4) turn_lanes<T, 4, true>(v);
  turn_lanes<T, 2, true>(v), turn_lanes<T, 1, true>(v);
  (store(to + vector_of<T>(TAP) * kLanes<T>, v[TAP]), ...);
}

// The sums begin with the kernel, or else with the products of the tap that all of them have.
template <typename T, bool START>
REFCONV_INLINE void begin_sums(Vec<T> f, const Vec<T>* k, Vec<T>* sum) {
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sum[t] = START ? k[t] : f * k[t];
}

// The products with tap `s`, where the sums do not begin with them.
template <typename T, bool START, int s>
REFCONV_INLINE void add_products(Vec<T> f, const Vec<T>* k, Vec<T>* sum) {
  if constexpr (!START && s == kMiddle) return;
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {  // sums in turn: one of them alone would wait for itself
    const int row = t / 3 + s / 3 - 1, column = t % 3 + s % 3 - 1;
    if (row >= 0 && row < 3 && column >= 0 && column < 3) sum[t] += f * k[row * 3 + column];
  }
}

template <typename T, bool START, int... TAP>
REFCONV_INLINE void add_all_products(const Vec<T>* f, const Vec<T>* k, Vec<T>* sum,
                                     std::integer_sequence<int, TAP...>) {
  (add_products<T, START, TAP>(f[TAP], k, sum), ...);
}

// As many kernels as there are lanes.
template <typename S, bool START>
REFCONV_INLINE void refocus_kernels(const S* basis, const S* factors, S* result) {
  using T = Compute<S>;
  Vec<T> k[9], f[9], sum[9];
  load_taps(basis, k, kAllParts);
  load_taps(factors, f, kAllParts);
  begin_sums<T, START>(f[kMiddle], k, sum);
  add_all_products<T, START>(f, k, sum, kTaps);
  store_taps(result, sum, kTaps);
}

// All products, and between them the parts of loading the next block: first those of the basis, then of the factors.
template <typename S, bool START, int... TAP>
REFCONV_INLINE void add_and_load(const Vec<Compute<S>>* f, const Vec<Compute<S>>* k, Vec<Compute<S>>* sum,
                                 const S* basis, Vec<Compute<S>>* next_k, const S* factors, Vec<Compute<S>>* next_f,
                                 std::integer_sequence<int, TAP...>) {
  constexpr int kLast = 4;
  ((load_part<S, TAP <= kLast ? TAP : -1>(basis, next_k, kTaps), add_products<Compute<S>, START, TAP>(f[TAP], k, sum),
    load_part<S, TAP - kLast>(factors, next_f, kTaps)),
   ...);
}

// `blocks` times that, with the next block's taps turned between the products of this one: products and turning want
// different units of the processor, and a block is longer than what it looks ahead.
template <typename S, bool START>
void refocus_overlapping(const S* basis, const S* factors, S* result, int64_t blocks, bool ahead) {
  using T = Compute<S>;
  Vec<T> next_k[9], next_f[9];
  load_taps(basis, next_k, kAllParts);
  load_taps(factors, next_f, kAllParts);
  for (int64_t left = blocks; left > 0; --left) {
    if (ahead) fetch_ahead(basis, factors, result);
    const int64_t step = left > 1 ? kBlock<T> : 0;  // the last block is turned twice, instead of one that is not there
    basis += step, factors += step;
    Vec<T> k[9], f[9], sum[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) k[t] = next_k[t], f[t] = next_f[t];
    begin_sums<T, START>(f[kMiddle], k, sum);
    add_and_load<S, START>(f, k, sum, basis, next_k, factors, next_f, kTaps);
    store_taps(result, sum, kTaps);
    result += kBlock<T>;
  }
}

// Any number of kernels. `ahead`: the next ones are fetched, which costs a twelfth where they lie in the caches anyway.
template <typename S, bool START>
void refocus_some_kernels(const S* basis, const S* factors, S* result, int64_t count, bool ahead) {
  constexpr int64_t kAtOnce = kLanes<Compute<S>>, kSize = kBlock<Compute<S>>;
  const int64_t blocks = count / kAtOnce, n = blocks * kAtOnce;
  if (kOverlapping && blocks > 1) {
    refocus_overlapping<S, START>(basis, factors, result, blocks, ahead);
  } else {
    for (int64_t at = 0; at < n * 9; at += kSize) {
      if (ahead) fetch_ahead(basis + at, factors + at, result + at);
      refocus_kernels<S, START>(basis + at, factors + at, result + at);
    }
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
