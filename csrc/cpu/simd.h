// Vectors of the width of the instruction set being compiled for.
//
// Written with the compiler's vector extension, which GCC and Clang lower to any target; intrinsics only where a
// masked access or a conversion would otherwise go lane by lane. Everything here has internal linkage or lives in
// the instruction set's own namespace: a template instantiated with AVX-512 flags must never be the copy that the
// linker keeps for a machine without it. For the same reason the kernels call no inline functions of the standard
// library (types of it are fine).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef REFCONV_ISA
#error "REFCONV_ISA (namespace) and REFCONV_VECTOR_BYTES are set by CMakeLists.txt"
#endif

// For loops that are called once per small plane, where arguments in memory would cost as much as its rows, and for
// what only fetches.
#define REFCONV_INLINE inline __attribute__((always_inline))
// For loops that need all registers: inlined into a function with many of them, they would share these.
#define REFCONV_APART __attribute__((noinline))

namespace refconv::cpu::REFCONV_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

template <typename T>
struct VectorOf {};  // only the types below: for others the overloads for 16-bit elements are meant
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(REFCONV_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(REFCONV_VECTOR_BYTES)));
};
template <>
struct VectorOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(REFCONV_VECTOR_BYTES)));
};
template <>
struct VectorOf<uint64_t> {
  typedef uint64_t type __attribute__((vector_size(REFCONV_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kLanes = REFCONV_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

// A vector at any address. Through it the compiler still knows the element type: a store to floats changes no integer.
template <typename T>
struct Unaligned {
  typedef Vec<T> type __attribute__((aligned(sizeof(T))));
};

template <typename T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Unaligned<T>::type*>(from);
}

template <typename T>
inline void store(T* to, Vec<T> v) {
  *reinterpret_cast<typename Unaligned<T>::type*>(to) = v;
}

template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // costs nothing; zero + value would be an addition, for the sake of -0
}

// `v`, kept in a register: without this the compiler loads again for every use.
template <typename V>
inline V in_register(V v) {
#ifdef __AVX512VL__
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// Asks for `count` elements to be in the second cache soon. Any address may be named. Whatever only fetches is inlined
// at once: GCC takes a function that does nothing else for one without effects, and drops calls of it.
template <typename S>
REFCONV_INLINE void prefetch(const S* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(from + i, 0, 2);
}
// The same for the first cache, where what is met once and next belongs (docs/performance.md).
template <typename S>
REFCONV_INLINE void prefetch_next(const S* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(from + i, 0, 3);
}

// Without reading the line that is overwritten, and without keeping it. `to` is aligned to the vector, and the rest of
// its line is stored next.
template <typename T>
inline void store_around_cache(T* to, Vec<T> v) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#else
  store(to, v);
#endif
}

// --- the first `count` lanes, 0 < count < lanes; what lies beyond them in memory is not touched ---

#ifdef __AVX512VL__
inline unsigned first_lanes(int64_t count) { return (1u << count) - 1; }
#endif

// Zero in the other lanes.
template <typename T>
inline Vec<T> load_partial(const T* from, int64_t count) {
#ifdef __AVX512VL__
  const unsigned mask = first_lanes(count);
  if constexpr (sizeof(T) == 4 && REFCONV_VECTOR_BYTES == 64) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  } else if constexpr (sizeof(T) == 8 && REFCONV_VECTOR_BYTES == 64) {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_maskz_loadu_ps(static_cast<__mmask8>(mask), from);
  } else {
    return (Vec<T>)_mm256_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  }
#else
  Vec<T> v = {};
  for (int64_t i = 0; i < kLanes<T> - 1; ++i) {
    if (i < count) v[i] = from[i];
  }
  return v;
#endif
}

template <typename T>
inline void store_partial(T* to, Vec<T> v, int64_t count) {
#ifdef __AVX512VL__
  const unsigned mask = first_lanes(count);
  if constexpr (sizeof(T) == 4 && REFCONV_VECTOR_BYTES == 64) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)v);
  } else if constexpr (sizeof(T) == 8 && REFCONV_VECTOR_BYTES == 64) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm256_mask_storeu_ps(to, static_cast<__mmask8>(mask), (__m256)v);
  } else {
    _mm256_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m256d)v);
  }
#else
  for (int64_t i = 0; i < kLanes<T> - 1; ++i) {
    if (i < count) to[i] = v[i];
  }
#endif
}

#if defined(__AVX2__) && !defined(__AVX512VL__)
inline __m256i first_lanes_32(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
template <>
inline Vec<float> load_partial<float>(const float* from, int64_t count) {
  return (Vec<float>)_mm256_maskload_ps(from, first_lanes_32(count));
}
template <>
inline Vec<double> load_partial<double>(const double* from, int64_t count) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return (Vec<double>)_mm256_maskload_pd(from, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lane));
}
// By halves of what is left: a masked store takes Zen 3 four times as long.
template <>
inline void store_partial<float>(float* to, Vec<float> v, int64_t count) {
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (count & 4) {
    _mm_storeu_ps(to, part);
    part = _mm256_extractf128_ps((__m256)v, 1), to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), part);
    part = _mm_movehl_ps(part, part), to += 2;
  }
  if (count & 1) _mm_store_ss(to, part);
}
template <>
inline void store_partial<double>(double* to, Vec<double> v, int64_t count) {
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (count & 2) {
    _mm_storeu_pd(to, part);
    part = _mm256_extractf128_pd((__m256d)v, 1), to += 2;
  }
  if (count & 1) _mm_store_sd(to, part);
}
#endif

#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
// The first `count` lanes of either half, 0 < count <= 8: by vectors of half the width, which meet the ends of lines
// half as often.
inline Vec<float> load_halves(const float* lower, const float* upper, int64_t count) {
  const auto mask = static_cast<__mmask8>(first_lanes(count));
  const __m256 low = _mm256_maskz_loadu_ps(mask, lower), high = _mm256_maskz_loadu_ps(mask, upper);
  return (Vec<float>)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
inline void store_halves(float* lower, float* upper, Vec<float> v, int64_t count) {
  const auto mask = static_cast<__mmask8>(first_lanes(count));
  _mm256_mask_storeu_ps(lower, mask, _mm512_castps512_ps256((__m512)v));
  _mm256_mask_storeu_ps(upper, mask, _mm512_extractf32x8_ps((__m512)v, 1));
}
#endif

// --- every lane by itself ---

template <typename T>
inline Vec<T> square_root(Vec<T> v) {
#if defined(__AVX2__) && REFCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)v);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) v[lane] = static_cast<T>(__builtin_sqrt(v[lane]));
  return v;
#endif
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
