// Memory that a kernel owns for one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {

// Zero-initialised, vector-aligned, owned by one thread for one call.
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
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  void clear() { __builtin_memset(static_cast<void*>(data_), 0, bytes()); }

 private:
  size_t bytes() const { return static_cast<size_t>(size_ > 0 ? size_ : 1) * sizeof(T); }
  int64_t size_;
  T* data_;
};

}  // namespace refconv::cpu::REFCONV_ISA
