// The maps of a block of channels in the lanes of vectors, and their convolution: row by row, or for tiny 3x3 problems
// pixel by pixel.
#pragma once

#include "nhwc.h"
#include "scratch.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// As a channels_last image of as many groups as fill vectors, of input and of output channels.
template <typename T>
class ImageMaps {
  static constexpr int64_t kLane = kLanes<T>;

 public:
  static int64_t groups_at_once(const GroupedProblem& p) { return groups_of_block(p, kLane); }

  ImageMaps(const GroupedProblem& p, bool backward)
      : p_(of_block(p)),
        forward_(p_),
        backward_(p_, 0, p_.channels, true, true),
        x_(p_.in_size() * p_.channels),
        y_(p_.out_size() * p_.out_channels()),
        dx_(backward ? p_.in_size() * p_.channels : 0) {}

  // Where pixel k is, from some channel on.
  T* x(int64_t k, int64_t channel) { return x_.data() + k * p_.channels + channel; }
  T* y(int64_t k, int64_t channel) { return y_.data() + k * p_.out_channels() + channel; }
  T* dx(int64_t k, int64_t channel) { return dx_.data() + k * p_.channels + channel; }

  void forward(TapMajor<const T> weight, const T* bias) {
    forward_.run(weight, x_.data(), bias, y_.data(), 0, p_.out_h, Maps::kCached);
  }
  // dx, where y is dy; adds to the sums of dW, and calls added(terms) meanwhile.
  template <typename Added>
  void backward(TapMajor<const T> weight, TapMajor<T> total, const Added& added) {
    const int64_t strip = most(1, kStripTerms / 2 / p_.in_w);  // (of channels_last maps, few have that many)
    for (int64_t i = 0; i < p_.in_h; i += strip) {
      const int64_t rows = least(strip, p_.in_h - i);
      backward_.run(weight, y_.data(), x_.data(), dx_.data(), i, rows, total, Maps::kCached);
      added(rows * p_.in_w);
    }
  }

 private:
  static GroupedProblem of_block(GroupedProblem p) {
    p.batch = 1;
    p.channels = groups_at_once(p) * p.per_group;
    return p;
  }

  const GroupedProblem p_;
  NhwcForward<T> forward_;
  NhwcBackward<T> backward_;
  Scratch<T> x_, y_, dx_;
};

// Of a vector of channels, depthwise, with zeros around x and dx. A row of 4 pixels is not worth a loop: each pixel
// meets its nine taps.
template <typename T>
class PaddedMaps {
 public:
  static int64_t groups_at_once(const GroupedProblem&) { return kLanes<T>; }

  PaddedMaps(const GroupedProblem& p, bool backward)
      : p_(p),
        rows_(most((p.out_h - 1) * p.stride_h + 2 * p.dilation_h + 1, p.in_h + p.pad_h)),
        pitch_(most((p.out_w - 1) * p.stride_w + 2 * p.dilation_w + 1, p.in_w + p.pad_w)),
        x_(rows_ * pitch_),
        dx_(backward ? rows_ * pitch_ : 0),
        y_(p.out_size()),
        places_(p.in_size()) {
    for (int64_t t = 0; t < 9; ++t) taps_[t] = (t / 3 * p.dilation_h) * pitch_ + t % 3 * p.dilation_w;
    for (int64_t k = 0; k < p.in_size(); ++k) places_[k] = (k / p.in_w + p.pad_h) * pitch_ + k % p.in_w + p.pad_w;
  }

  T* x(int64_t k, int64_t) { return reinterpret_cast<T*>(&x_[places_[k]]); }
  T* y(int64_t k, int64_t) { return reinterpret_cast<T*>(&y_[k]); }
  T* dx(int64_t k, int64_t) { return reinterpret_cast<T*>(&dx_[places_[k]]); }

  void forward(TapMajor<const T> weight, const T* bias) {
    Vec<T> w[9], start = load(bias);
    for (int t = 0; t < 9; ++t) w[t] = load(weight.at(t, 0));
    for (int64_t i = 0, k = 0; i < p_.out_h; ++i) {
      const Vec<T>* from = x_.data() + i * p_.stride_h * pitch_;
      for (int64_t j = 0; j < p_.out_w; ++j, ++k, from += p_.stride_w) {
        Vec<T> sum = start;
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) sum += w[t] * from[taps_[t]];
        y_[k] = sum;
      }
    }
  }

  // Scatters dy: every pixel of it meets nine of x.
  template <typename Added>
  void backward(TapMajor<const T> weight, TapMajor<T> total, const Added& added) {
    dx_.clear();
    Vec<T> w[9], sum[9];
    for (int t = 0; t < 9; ++t) w[t] = load(weight.at(t, 0)), sum[t] = load(total.at(t, 0));
    for (int64_t i = 0, k = 0; i < p_.out_h; ++i) {
      const int64_t row = i * p_.stride_h * pitch_;
      const Vec<T>* from = x_.data() + row;
      Vec<T>* to = dx_.data() + row;
      for (int64_t j = 0; j < p_.out_w; ++j, ++k, from += p_.stride_w, to += p_.stride_w) {
        const Vec<T> dy = y_[k];
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) {
          to[taps_[t]] += w[t] * dy;
          sum[t] += from[taps_[t]] * dy;
        }
      }
    }
    for (int t = 0; t < 9; ++t) store(total.at(t, 0), sum[t]);
    added(p_.out_size());
  }

 private:
  const GroupedProblem& p_;
  const int64_t rows_, pitch_;  // of the padded input
  Scratch<Vec<T>> x_, dx_, y_;
  Scratch<int64_t> places_;  // of the pixels of x in it
  int64_t taps_[9];
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
