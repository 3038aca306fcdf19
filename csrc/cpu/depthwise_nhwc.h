// What both directions of the depthwise convolution on channels_last maps share.
//
// Equations: csrc/problem.h. Lanes are channels, so no pixel is moved and any kernel size, stride and dilation is the
// same loop: some pixels of a row at once, tap by tap, each loaded weight serving all of them. The channels are the
// innermost loop, so that memory is gone through in order. 3x3 kernels have loops of their own (depthwise_nhwc_3x3.h).
#pragma once

#include "elements.h"
#include "kernels.h"
#include "lattice.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {

// Numbers of every channel, tap by tap: weights, or sums of their gradients.
template <typename T>
struct TapMajor {
  T* data;
  int64_t step;  // from tap to tap: the channels at least, in whole vectors
  T* at(int64_t tap, int64_t c) const { return data + tap * step + c; }
};

// Where the maps are: in the caches already; in memory; or there, with an output that is to be written around the
// cache.
enum class Maps { kCached, kMemory, kAround };

// One image whose maps are in the caches. Of the bias there is a vector at least, or none; dW is added to `total`.
template <typename T>
void nhwc_forward_image(const GroupedProblem& p, TapMajor<const T> weight, const T* bias, const T* x, T* y);
template <typename T>
void nhwc_backward_image(const GroupedProblem& p, TapMajor<const T> weight, const Lattices& lattices, const T* grad_y,
                         const T* x, T* grad_x, TapMajor<T> total);

namespace {

constexpr int kPixels = kVectorRegisters == 32 ? 8 : 4;  // at once; backward holds twice as many vectors

// FULL: all lanes are channels; otherwise the first `count`.
template <bool FULL, typename S>
inline Vec<Compute<S>> load_channels(const S* from, int64_t count) {
  return FULL ? load(from) : load_partial(from, count);
}

template <bool FULL, typename S>
inline void store_channels(S* to, Vec<Compute<S>> v, int64_t count, Maps maps) {
  if constexpr (FULL && sizeof(S) == sizeof(Compute<S>)) {
    if (maps == Maps::kAround) return store_around_cache(to, v);
  }
  FULL ? store(to, v) : store_partial(to, v, count);
}

// Around the cache go outputs that are large enough, and made of whole aligned vectors that fill lines.
template <typename S>
Maps maps_of(const GroupedProblem& p, const S* output, int64_t pixels) {
  const int64_t vector = kLanes<Compute<S>> * static_cast<int64_t>(sizeof(S));
  const bool around = vector == 64 && streams(pixels * p.channels * static_cast<int64_t>(sizeof(S))) &&
                      p.channels % kLanes<Compute<S>> == 0 &&
                      reinterpret_cast<uintptr_t>(output) % static_cast<uintptr_t>(vector) == 0;
  return around ? Maps::kAround : Maps::kMemory;
}

// [taps][channels rounded up], zero in the surplus channels. Rows of an odd number of vectors, lest 512 or 1024
// channels put all taps into a few sets of the first cache.
template <typename S>
class OwnTaps {
  using T = Compute<S>;

 public:
  explicit OwnTaps(const GroupedProblem& p)
      : step_((ceil_div(p.channels, kLanes<T>) | 1) * kLanes<T>), data_(p.taps() * step_) {}
  OwnTaps(const GroupedProblem& p, const S* weight) : OwnTaps(p) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t t = 0; t < p.taps(); ++t) data_[t * step_ + c] = load_one(weight + c * p.taps() + t);
    }
  }
  TapMajor<T> view() { return {data_.data(), step_}; }
  TapMajor<const T> view() const { return {data_.data(), step_}; }
  void clear() { data_.clear(); }

 private:
  int64_t step_;
  Scratch<T> data_;
};

// A range of taps in both directions.
struct Window {
  int64_t top, bottom, left, right;
};

// The taps t for which first + t * step lies in [0, size).
inline void clip(int64_t first, int64_t step, int64_t size, int64_t taps, int64_t* begin, int64_t* end) {
  *begin = first < 0 ? least(taps, ceil_div(-first, step)) : 0;
  *end = first >= size ? 0 : least(taps, (size - 1 - first) / step + 1);
  if (*end < *begin) *end = *begin;
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
