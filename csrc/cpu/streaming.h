// Large outputs, written around the cache.
#pragma once

#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kStreamedBytes = 16 << 20;

// Whether an output of that size is written around the cache. One that does not fit the last cache anyway would
// otherwise be read from memory before it is overwritten.
inline bool streams(int64_t bytes) { return bytes >= kStreamedBytes; }

// Copies `count` elements around the cache.
template <typename S>
void stream(S* to, const S* from, int64_t count) {
#ifdef __AVX2__
  constexpr int64_t kStep = 32 / static_cast<int64_t>(sizeof(S));
  const int64_t head = least(count, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 32 / sizeof(S)));
  __builtin_memcpy(to, from, static_cast<size_t>(head) * sizeof(S));
  int64_t i = head;
  for (; i + kStep <= count; i += kStep) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(count - i) * sizeof(S));
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
