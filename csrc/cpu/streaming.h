// Large outputs, written around the cache.
#pragma once

#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kStreamedBytes = 16 << 20, kLineBytes = 64;

// Whether an output of that size is written around the cache. One that does not fit the last cache anyway would
// otherwise be read from memory before it is overwritten. Not in pieces, one behind the other, that are few lines and
// share some: those pass through the cache.
inline bool streams(int64_t bytes, int64_t piece_bytes) {
  constexpr int64_t kMany = 64;
  return bytes >= kStreamedBytes && (piece_bytes % kLineBytes == 0 || piece_bytes >= kMany * kLineBytes);
}

// Copies `count` elements, whole lines around the cache. A line that is written half through the cache and half around
// it costs as much as sixty others (docs/performance.md).
template <typename S>
void stream(S* to, const S* from, int64_t count) {
#ifdef __AVX2__
  constexpr int64_t kStep = 32 / static_cast<int64_t>(sizeof(S)), kLine = kLineBytes / static_cast<int64_t>(sizeof(S));
  const int64_t before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLineBytes / sizeof(S));
  const int64_t head = least(count, before), end = head + (count - head) / kLine * kLine;
  __builtin_memcpy(to, from, static_cast<size_t>(head) * sizeof(S));
  for (int64_t i = head; i < end; i += kStep) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
  __builtin_memcpy(to + end, from + end, static_cast<size_t>(count - end) * sizeof(S));
#else
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
#endif
}

// After the last stream() of a thread, before another one reads.
inline void end_streams() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
