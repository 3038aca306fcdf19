// Vectors of the width of the instruction set being compiled for, and scratch memory.
//
// Written with the compiler's vector extension, which GCC and Clang lower to any target. Everything here
// has internal linkage or lives in the instruction set's own namespace: a template instantiated with
// AVX-512 flags must never be the copy that the linker keeps for a machine without it. For the same
// reason the kernels call no inline functions of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#ifndef REFCONV_ISA
#error "REFCONV_ISA (namespace) and REFCONV_VECTOR_BYTES are set by CMakeLists.txt"
#endif

namespace refconv::cpu::REFCONV_ISA {
namespace {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(REFCONV_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kLanes = REFCONV_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

// The first `count` lanes; zero in the others.
template <typename T>
inline Vec<T> load_partial(const T* from, int64_t count) {
  Vec<T> v = {};
  __builtin_memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <typename T>
inline void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <typename T>
inline void store_partial(T* to, Vec<T> v, int64_t count) {
  __builtin_memcpy(to, &v, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

// `v` with the lanes from `count` on set to zero.
template <typename T>
inline Vec<T> keep(Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return v;
  Vec<T> lane;
  for (int64_t i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<T>(i);
  return lane < broadcast(static_cast<T>(count)) ? v : Vec<T>{};
}

// Every second lane of the 2 * kLanes elements in a, b. The compiler makes permutations of it.
template <typename T>
inline Vec<T> evens(Vec<T> a, Vec<T> b) {
  constexpr int64_t n = kLanes<T>;
  Vec<T> v;
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) v[i] = 2 * i < n ? a[(2 * i) % n] : b[(2 * i) % n];
  return v;
}

// The two vectors that interleave a and b: a0 b0 a1 b1 ...
template <typename T>
inline void interleave(Vec<T> a, Vec<T> b, Vec<T>* low, Vec<T>* high) {
  constexpr int64_t n = kLanes<T>;
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i) {
    (*low)[i] = i % 2 == 0 ? a[i / 2] : b[i / 2];
    (*high)[i] = i % 2 == 0 ? a[n / 2 + i / 2] : b[n / 2 + i / 2];
  }
}

// The `count` elements at `from`, zero in the lanes beyond; nothing at or after `end` is read.
template <typename T>
inline Vec<T> load_tail(const T* from, int64_t count, const T* end) {
  return end - from >= kLanes<T> ? keep<T>(load(from), count) : load_partial(from, count);
}

// total[lane] += v[lane], in double: the caller adds many vectors and then their lanes.
template <typename T>
inline void add_lanes(Vec<T> v, double* total) {
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total[lane] += static_cast<double>(v[lane]);
}

template <typename T>
inline double sum_lanes(const double* total) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += total[lane];
  return sum;
}

template <typename T>
inline double sum(Vec<T> v) {
  double total = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += static_cast<double>(v[lane]);
  return total;
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Zero-initialised, vector-aligned memory owned by one thread for one call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : size_(size), data_(static_cast<T*>(::operator new(bytes(), std::align_val_t{64}))) {
    clear();
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  void clear() { __builtin_memset(data_, 0, bytes()); }

 private:
  size_t bytes() const { return static_cast<size_t>(size_ > 0 ? size_ : 1) * sizeof(T); }
  int64_t size_;
  T* data_;
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
