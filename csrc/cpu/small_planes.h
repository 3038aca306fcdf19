// Depthwise 3x3 convolution of small NCHW planes: a block of channels at a time, turned so that lanes are channels.
//
// A plane of 4 x 4 pixels is one vector: whatever is done per plane (copying, weights, sums over lanes) outweighs its
// 144 multiply-adds. Turned, sixteen planes share all of it, dW needs no sum over lanes, and a row has no tail.
#pragma once

#include "elements.h"
#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int kSmallTaps = 9;

// rows[i][j] becomes rows[j][i]: each step interleaves the first half of the rows with the second.
template <typename T>
inline void transpose(Vec<T>* rows) {
  constexpr int kLane = static_cast<int>(kLanes<T>);
  Vec<T> other[kLane];
#pragma GCC unroll 4
  for (int step = 1; step < kLane; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLane / 2; ++i) {
      other[2 * i] = permute<T, LowerInterleaved>(rows[i], rows[i + kLane / 2]);
      other[2 * i + 1] = permute<T, UpperInterleaved>(rows[i], rows[i + kLane / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) rows[i] = other[i];
  }
}

// Calls store(k, vector) for k < size with element k of `count` rows of `size` elements in the lanes, zero in the rest.
template <typename S, typename Store>
inline void turn_in(const S* from, int64_t size, int64_t count, const Store& store) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  for (int64_t k = 0; k < size; k += kLane) {
    Vec<T> rows[kLane];
    for (int64_t r = 0; r < kLane; ++r) rows[r] = r < count ? load_lanes(from + r * size + k, size - k) : Vec<T>{};
    transpose<T>(rows);
    for (int64_t i = 0; i < kLane && k + i < size; ++i) store(k + i, rows[i]);
  }
}

// The reverse: lane r of load(k) becomes element k of row r, for `count` rows.
template <typename S, typename Load>
inline void turn_out(S* to, int64_t size, int64_t count, const Load& load_vector) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const S* end = to + count * size;
  for (int64_t k = 0; k < size; k += kLane) {
    Vec<T> rows[kLane];
    for (int64_t i = 0; i < kLane; ++i) rows[i] = k + i < size ? load_vector(k + i) : Vec<T>{};
    transpose<T>(rows);
    // What a whole vector writes behind the last elements of a row is the start of the next row, written later: only
    // where rows are shorter than a vector does it lie in this step.
    for (int64_t r = 0; r < kLane && r < count; ++r) {
      if (size <= kLane) {
        store_ahead(to + r * size, rows[r], size, end);
      } else {
        store_lanes(to + r * size + k, rows[r], size - k);
      }
    }
  }
}

// Feature maps of one block of channels, a vector per pixel, x and what is like it with zeros around.
template <typename S>
class SmallPlanes {
  using T = Compute<S>;

 public:
  explicit SmallPlanes(const GroupedProblem& p)
      : p_(p),
        rows_(most((p.out_h - 1) * p.stride_h + 2 * p.dilation_h + 1, p.in_h + p.pad_h)),
        pitch_(most((p.out_w - 1) * p.stride_w + 2 * p.dilation_w + 1, p.in_w + p.pad_w)),
        x_(rows_ * pitch_),
        dx_(rows_ * pitch_),
        y_(p.out_size()),
        places_(p.in_size()) {
    for (int64_t t = 0; t < kSmallTaps; ++t) taps_[t] = (t / 3 * p.dilation_h) * pitch_ + t % 3 * p.dilation_w;
    for (int64_t k = 0; k < p.in_size(); ++k) places_[k] = (k / p.in_w + p.pad_h) * pitch_ + k % p.in_w + p.pad_w;
  }

  void take_weight(const S* weight, int64_t count) {
    turn_in(weight, kSmallTaps, count, [&](int64_t t, Vec<T> v) { weight_[t] = v; });
  }

  // y of `count` planes of x.
  void forward(const S* x, const S* bias, S* y, int64_t count) {
    take_x(x, count);
    const Vec<T> start = bias != nullptr ? load_lanes(bias, count) : Vec<T>{};
    Vec<T> weight[kSmallTaps];
    for (int t = 0; t < kSmallTaps; ++t) weight[t] = weight_[t];
    for (int64_t i = 0, k = 0; i < p_.out_h; ++i) {
      const Vec<T>* from = x_.data() + i * p_.stride_h * pitch_;
      for (int64_t j = 0; j < p_.out_w; ++j, ++k, from += p_.stride_w) {
        Vec<T> sum = start;
#pragma GCC unroll 16
        for (int t = 0; t < kSmallTaps; ++t) sum += weight[t] * from[taps_[t]];
        y_[k] = sum;
      }
    }
    turn_out(y, p_.out_size(), count, [&](int64_t k) { return y_[k]; });
  }

  // dx of `count` planes, and what they add to dW and dbias: totals [taps + 1]. Scatters dy: every pixel of it meets
  // nine of x.
  void backward(const S* grad_y, const S* x, S* grad_x, int64_t count, Vec<T>* totals) {
    take_x(x, count);
    turn_in(grad_y, p_.out_size(), count, [&](int64_t k, Vec<T> v) { y_[k] = v; });
    dx_.clear();
    Vec<T> weight[kSmallTaps], total[kSmallTaps], bias = {};
    for (int t = 0; t < kSmallTaps; ++t) weight[t] = weight_[t], total[t] = Vec<T>{};
    for (int64_t i = 0, k = 0; i < p_.out_h; ++i) {
      const int64_t row = i * p_.stride_h * pitch_;
      const Vec<T>* from = x_.data() + row;
      Vec<T>* to = dx_.data() + row;
      for (int64_t j = 0; j < p_.out_w; ++j, ++k, from += p_.stride_w, to += p_.stride_w) {
        const Vec<T> dy = y_[k];
        bias += dy;
#pragma GCC unroll 16
        for (int t = 0; t < kSmallTaps; ++t) {
          to[taps_[t]] += weight[t] * dy;
          total[t] += from[taps_[t]] * dy;
        }
      }
    }
    for (int t = 0; t < kSmallTaps; ++t) totals[t] += total[t];
    totals[kSmallTaps] += bias;
    if (grad_x != nullptr) turn_out(grad_x, p_.in_size(), count, [&](int64_t k) { return dx_[places_[k]]; });
  }

 private:
  void take_x(const S* x, int64_t count) {
    turn_in(x, p_.in_size(), count, [&](int64_t k, Vec<T> v) { x_[places_[k]] = v; });
  }

  const GroupedProblem& p_;
  const int64_t rows_, pitch_;  // of the padded input
  Scratch<Vec<T>> x_, dx_, y_;
  Scratch<int64_t> places_;  // of the pixels of x in it
  int64_t taps_[kSmallTaps];
  Vec<T> weight_[kSmallTaps];
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
