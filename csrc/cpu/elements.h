// Loading and storing elements of the types that feature maps have: bfloat16 and float16 are converted on the way.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// --- elements stored in 16 bits ---

typedef uint16_t Vec16 __attribute__((vector_size(REFCONV_VECTOR_BYTES / 2)));
using VecBits = Vec<uint32_t>;

// (GCC converts a vector in two halves.)
inline Vec<float> widen(Vec16 v, const BFloat16*) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
  return (Vec<float>)(__builtin_convertvector(v, VecBits) << 16);
#endif
}

// In the upper half of each lane, rounded to nearest, ties to even. A NaN stays one: it came from a 16-bit element or
// is the processor's own, so that its lower half is zero and nothing is carried into the upper one.
inline VecBits rounded(Vec<float> v) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  const __m512i bits = (__m512i)v;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return (VecBits)_mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
#else
  const VecBits bits = (VecBits)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
#endif
}
inline Vec16 narrow(Vec<float> v, const BFloat16*) {
#if defined(__AVX512BW__) && REFCONV_VECTOR_BYTES == 64
  const __m512i upper = (__m512i)(VecBits{0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d});
  return (Vec16)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, (__m512i)rounded(v)));
#else
  return __builtin_convertvector(rounded(v) >> 16, Vec16);
#endif
}

#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
inline Vec<float> widen(Vec16 v, const Half*) { return (Vec<float>)_mm512_cvtph_ps((__m256i)v); }
inline Vec16 narrow(Vec<float> v, const Half*) {
  return (Vec16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
inline Vec<float> widen(Vec16 v, const Half*) { return (Vec<float>)_mm256_cvtph_ps((__m128i)v); }
inline Vec16 narrow(Vec<float> v, const Half*) { return (Vec16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Vec<float> widen(Vec16 v, const Half*) {
  const VecBits half = __builtin_convertvector(v, VecBits), magnitude = half & 0x7fff;
  // As the bits of a float, the magnitude is 2^112 too small, for subnormal numbers too.
  const VecBits finite = (VecBits)((Vec<float>)(magnitude << 13) * 0x1p112f);
  const VecBits other = (magnitude << 13) | 0x7f800000;
  return (Vec<float>)((magnitude < 0x7c00 ? finite : other) | (half & 0x8000) << 16);
}
inline Vec16 narrow(Vec<float> v, const Half*) {
  const VecBits bits = (VecBits)v, magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  const VecBits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const VecBits subnormal = (VecBits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;  // the addition rounds
  const VecBits finite = magnitude < 0x38800000 ? subnormal : normal;
  const VecBits beyond = v == v ? VecBits{} + 0x7c00 : VecBits{} + 0x7e00;
  return __builtin_convertvector((magnitude < 0x47800000 ? finite : beyond) | sign, Vec16);
}
#endif

inline Vec16 load_partial_16(const void* from, int64_t count) {
#if defined(__AVX512VL__) && REFCONV_VECTOR_BYTES == 64
  return (Vec16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(count)), from);
#elif defined(__AVX512VL__)
  return (Vec16)_mm_maskz_loadu_epi16(static_cast<__mmask8>(first_lanes(count)), from);
#elif defined(__AVX2__)
  const auto* at = static_cast<const uint16_t*>(from);
  __m128i v = _mm_setzero_si128();  // the last element first, then two, then four, pushed up by what is before them
  if (count & 1) v = _mm_cvtsi32_si128(at[count - 1]);
  if (count & 2) {
    int32_t two;
    __builtin_memcpy(&two, at + (count & 4), sizeof(two));
    v = _mm_or_si128(_mm_slli_si128(v, 4), _mm_cvtsi32_si128(two));
  }
  if (count & 4) v = _mm_or_si128(_mm_slli_si128(v, 8), _mm_loadl_epi64(static_cast<const __m128i*>(from)));
  return (Vec16)v;
#else
  Vec16 v = {};
  for (int64_t i = 0; i < kLanes<float> - 1; ++i) {
    if (i < count) v[i] = static_cast<const uint16_t*>(from)[i];
  }
  return v;
#endif
}

inline void store_partial_16(void* to, Vec16 v, int64_t count) {
#if defined(__AVX512VL__) && REFCONV_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(first_lanes(count)), (__m256i)v);
#elif defined(__AVX512VL__)
  _mm_mask_storeu_epi16(to, static_cast<__mmask8>(first_lanes(count)), (__m128i)v);
#elif defined(__AVX2__)
  auto* at = static_cast<uint16_t*>(to);
  __m128i left = (__m128i)v;
  if (count & 4) {
    _mm_storel_epi64(static_cast<__m128i*>(to), left);
    left = _mm_srli_si128(left, 8), at += 4;
  }
  if (count & 2) {
    const int32_t two = _mm_cvtsi128_si32(left);
    __builtin_memcpy(at, &two, sizeof(two));
    left = _mm_srli_si128(left, 4), at += 2;
  }
  if (count & 1) *at = static_cast<uint16_t>(_mm_cvtsi128_si32(left));
#else
  for (int64_t i = 0; i < kLanes<float> - 1; ++i) {
    if (i < count) static_cast<uint16_t*>(to)[i] = v[i];
  }
#endif
}

#define REFCONV_16_BIT_ACCESS(S)                                                                                     \
  inline Vec<float> load(const S* from) {                                                                            \
    Vec16 v;                                                                                                         \
    __builtin_memcpy(&v, from, sizeof(v));                                                                           \
    return widen(v, from);                                                                                           \
  }                                                                                                                  \
  inline Vec<float> load_partial(const S* from, int64_t count) { return widen(load_partial_16(from, count), from); } \
  inline void store(S* to, Vec<float> v) {                                                                           \
    const Vec16 narrowed = narrow(v, to);                                                                            \
    __builtin_memcpy(to, &narrowed, sizeof(narrowed));                                                               \
  }                                                                                                                  \
  inline void store_partial(S* to, Vec<float> v, int64_t count) { store_partial_16(to, narrow(v, to), count); }
REFCONV_16_BIT_ACCESS(BFloat16)
REFCONV_16_BIT_ACCESS(Half)
#undef REFCONV_16_BIT_ACCESS

#ifdef __AVX512VL__
// The first `count` pixels of a vector that holds two in a lane, 0 < count; zero in the others.
inline VecBits load_paired(const BFloat16* from, int64_t count) {
#if REFCONV_VECTOR_BYTES == 64
  return (VecBits)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), from);
#else
  return (VecBits)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(count)), from);
#endif
}
inline void store_paired(BFloat16* to, VecBits v, int64_t count) {
#if REFCONV_VECTOR_BYTES == 64
  _mm512_mask_storeu_epi16(to, static_cast<__mmask32>((uint64_t{1} << count) - 1), (__m512i)v);
#else
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(first_lanes(count)), (__m256i)v);
#endif
}
#endif

#if defined(__AVX512VL__) && REFCONV_VECTOR_BYTES == 64
template <typename S>
inline Vec<float> load_halves(const S* lower, const S* upper, int64_t count) {
  const auto mask = static_cast<__mmask8>(first_lanes(count));
  const __m128i low = _mm_maskz_loadu_epi16(mask, lower), high = _mm_maskz_loadu_epi16(mask, upper);
  return widen((Vec16)_mm256_set_m128i(high, low), lower);
}
template <typename S>
inline void store_halves(S* lower, S* upper, Vec<float> v, int64_t count) {
  const auto mask = static_cast<__mmask8>(first_lanes(count));
  const __m256i narrowed = (__m256i)narrow(v, lower);
  _mm_mask_storeu_epi16(lower, mask, _mm256_castsi256_si128(narrowed));
  _mm_mask_storeu_epi16(upper, mask, _mm256_extracti128_si256(narrowed, 1));
}
#endif

// --- any number of lanes up to all ---

template <typename S>
inline Vec<Compute<S>> load_lanes(const S* from, int64_t count) {
  return count >= kLanes<Compute<S>> ? load(from) : load_partial(from, count);
}

template <typename S>
inline void store_lanes(S* to, Vec<Compute<S>> v, int64_t count) {
  if (count >= kLanes<Compute<S>>) {
    store(to, v);
  } else {
    store_partial(to, v, count);
  }
}

// The same where `count`, up to all or none, is that of many loads and stores: without asking, where masks are there.
template <typename S>
inline Vec<Compute<S>> load_edge(const S* from, int64_t count) {
#ifdef __AVX512VL__
  return load_partial(from, count);
#else
  return count == 0 ? Vec<Compute<S>>{} : load_lanes(from, count);
#endif
}

template <typename S>
inline void store_edge(S* to, Vec<Compute<S>> v, int64_t count) {
#ifdef __AVX512VL__
  store_partial(to, v, count);
#else
  if (count != 0) store_lanes(to, v, count);
#endif
}

// The first `count` lanes, and as much of the others as fits before `end`: for rows whose surplus is overwritten by
// what is stored later. Masked stores are slow on some processors.
template <typename S>
inline void store_ahead(S* to, Vec<Compute<S>> v, int64_t count, const S* end) {
  if (end - to >= kLanes<Compute<S>>) {
    store(to, v);
  } else {
    store_lanes(to, v, count);
  }
}

template <typename S>
inline Compute<S> load_one(const S* from) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return *from;
  } else {
    return load_partial(from, 1)[0];
  }
}

template <typename S>
inline void store_one(S* to, Compute<S> value) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    *to = value;
  } else {
    store_partial(to, broadcast(value), 1);
  }
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
