// One (image, channel) plane of a depthwise convolution in zero-padded scratch that stays in cache.
//
// The columns of each row are sorted by their remainder modulo stride_w. Every tap of every output row is then
// one contiguous, unaligned vector load, for any stride, dilation and padding.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// The zero-padded plane. Row r, column q of the padded input lies at
// data[(r * stride_w + q % stride_w) * pitch + q / stride_w].
struct Plane {
  int64_t rows, columns, stride_h, stride_w, pitch;

  template <typename T>
  static Plane of(const DepthwiseProblem& p) {
    Plane plane;
    plane.rows = (p.out_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
    plane.columns = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    plane.stride_h = p.stride_h;
    plane.stride_w = p.stride_w;
    // A whole vector may be loaded at the last output column; the slack stays zero.
    const int64_t last = ((p.kernel_w - 1) * p.dilation_w) / p.stride_w + p.out_w;
    plane.pitch = round_up(last, kLanes<T>) + kLanes<T>;
    return plane;
  }

  int64_t size() const { return rows * stride_w * pitch; }
  int64_t row_pitch() const { return stride_w * pitch; }
  // From one output row to the next.
  int64_t row_step() const { return stride_h * row_pitch(); }
  // Where output pixel (0, 0) finds each of its taps; output column j adds j.
  void tap_offsets(const DepthwiseProblem& p, int64_t* offsets) const {
    for (int64_t a = 0; a < p.kernel_h; ++a) {
      for (int64_t b = 0; b < p.kernel_w; ++b) {
        const int64_t q = b * p.dilation_w;
        offsets[a * p.kernel_w + b] = (a * p.dilation_h * stride_w + q % stride_w) * pitch + q / stride_w;
      }
    }
  }
};

// The columns [begin, end) of padded phase `phase` that lie inside the input, as indices within the phase.
struct PhaseRange {
  int64_t begin, end, first_source;
};

inline PhaseRange phase_range(const Plane& plane, int64_t in_w, int64_t pad_w, int64_t phase) {
  const int64_t s = plane.stride_w;
  int64_t begin = pad_w > phase ? (pad_w - phase + s - 1) / s : 0;
  const int64_t padded_end = plane.columns < in_w + pad_w ? plane.columns : in_w + pad_w;  // exclusive
  int64_t end = padded_end > phase ? (padded_end - phase + s - 1) / s : 0;
  if (end < begin) end = begin;
  return {begin, end, phase + begin * s - pad_w};
}

// Padding may be negative: the plane then starts inside the source.
template <typename T>
void copy_in(const Plane& plane, const T* source, int64_t in_h, int64_t in_w, int64_t pad_h, int64_t pad_w,
             T* scratch) {
  const T* end = source + in_h * in_w;
  const int64_t first = pad_h > 0 ? pad_h : 0;  // rows before it, and from `last` on, stay zero
  const int64_t last = plane.rows < in_h + pad_h ? plane.rows : in_h + pad_h;
  for (int64_t phase = 0; phase < plane.stride_w; ++phase) {
    const PhaseRange range = phase_range(plane, in_w, pad_w, phase);
    const int64_t count = range.end - range.begin;
    if (count == 0) continue;
    for (int64_t r = first; r < last; ++r) {
      const T* from = source + (r - pad_h) * in_w + range.first_source;
      T* to = scratch + (r * plane.stride_w + phase) * plane.pitch + range.begin;
      if (plane.stride_w > 1) {
        int64_t c = 0;
        for (; plane.stride_w == 2 && c + kLanes<T> <= count && from + 2 * (c + kLanes<T>) <= end; c += kLanes<T>) {
          store(to + c, evens<T>(load(from + 2 * c), load(from + 2 * c + kLanes<T>)));
        }
        for (; c < count; ++c) to[c] = from[c * plane.stride_w];
        continue;
      }
      int64_t c = 0;
      for (; c + kLanes<T> <= count; c += kLanes<T>) store(to + c, load(from + c));
      if (c < count) store(to + c, load_tail(from + c, count - c, end));  // zeros into the slack, which is zero
    }
  }
}

// The reverse, after scattering gradients into the scratch. Pixels that no window touches become zero.
template <typename T>
void copy_out(const Plane& plane, const T* scratch, int64_t in_h, int64_t in_w, int64_t pad_h, int64_t pad_w,
              T* target) {
  const int64_t s = plane.stride_w;
  const int64_t known = plane.columns - pad_w < in_w ? plane.columns - pad_w : in_w;  // columns inside the scratch
  for (int64_t row = 0; row < in_h; ++row) {
    T* to = target + row * in_w;
    const int64_t r = row + pad_h;
    int64_t w = 0;
    if (r < plane.rows) {
      const T* from = scratch + r * plane.row_pitch();
      const auto at = [&](int64_t column) { return from[(column + pad_w) % s * plane.pitch + (column + pad_w) / s]; };
      if (s == 2) {
        const int64_t first = pad_w % 2, half = (pad_w + 1) / 2;  // column `first` is the first of phase 0
        if (first == 1 && known > 0) to[w++] = at(0);
        for (int64_t c = half; w + 2 * kLanes<T> <= known; c += kLanes<T>, w += 2 * kLanes<T>) {
          Vec<T> low, high;
          interleave<T>(load(from + c), load(from + plane.pitch + c), &low, &high);
          store(to + w, low);
          store(to + w + kLanes<T>, high);
        }
      }
      for (; w < known; ++w) to[w] = at(w);
    }
    for (; w < in_w; ++w) to[w] = T(0);
  }
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
