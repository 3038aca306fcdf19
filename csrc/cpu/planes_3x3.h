// 3x3 depthwise convolutions of NCHW planes by plane_3x3.h and plane_3x3_by_2.h: which plane is written where, and what
// is fetched meanwhile.
#pragma once

#include "plane_3x3_by_2.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// How planes that are large enough are written around the cache: straight away where rows are whole aligned vectors
// that fill lines, otherwise by way of a plane in the cache.
template <typename S>
class PlaneOutput {
 public:
  // Planes of `size` pixels in rows of `width`, `all` of them. `first` is null where nobody wants them.
  PlaneOutput(const S* first, int64_t all, int64_t size, int64_t width)
      : size_(size),
        streamed_(first != nullptr && streams(all * size * static_cast<int64_t>(sizeof(S)))),
        straight_(streamed_ && kVectorBytes == 64 && width % kLanes<Compute<S>> == 0 &&
                  reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0),
        plane_(streamed_ && !straight_ ? size : 0) {}
  // Where a kernel writes a plane whose place is `to`.
  S* target(S* to) { return streamed_ && !straight_ ? plane_.data() : to; }
  bool around() const { return straight_; }
  // What a kernel fetches of the plane after `to`, in vectors per row of a column.
  typename NextPlane<S>::Map next(const S* to, int64_t vectors) const { return {to + size_, streamed_ ? 0 : vectors}; }
  void finish(S* to) {
    if (streamed_ && !straight_) stream(to, plane_.data(), size_);
  }
  void end() const {
    if (streamed_) end_streams();
  }

 private:
  static constexpr int64_t kVectorBytes = kLanes<Compute<S>> * static_cast<int64_t>(sizeof(S));
  const int64_t size_;
  const bool streamed_, straight_;
  Scratch<S> plane_;
};

template <typename S>
void forward_3x3(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                 int64_t end) {
  using T = Compute<S>;
  PlaneOutput<S> output(y, p.batch * p.channels, p.out_size(), p.out_w);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t channel = task % p.channels, in_size = p.in_size();
    T taps[9];
    for (int t = 0; t < 9; ++t) taps[t] = load_one(weight + channel * 9 + t);
    const T start = bias != nullptr ? load_one(bias + channel) : T(0);
    const S* plane = x + task * in_size;
    S *target = y + task * p.out_size(), *to = output.target(target);
    NextPlane<S> next{{{plane + in_size, p.stride_h * p.stride_w}, output.next(target, 1), {plane, 0}}};
    if (task + 1 == end) next = {};
    for_columns<T>(p.out_w, [&](auto column, int64_t j) {
      if (p.stride_h == 1) {
        correlate_column(p, taps, start, plane + j, to + j, column, output.around(), next);
      } else {
        correlate_column_by_2(p, taps, start, plane + 2 * j, p.in_w - 2 * j, to + j, column, output.around(), next);
      }
      next.advance(p.out_h);
    });
    output.finish(target);
  }
  output.end();
}

// The backward of one call, plane by plane; used as Backward (grouped_plane.h).
template <typename S>
class Backward3x3 {
  using T = Compute<S>;

 public:
  Backward3x3(const GroupedProblem& p, const S* grad_x)
      : p_(p), dx_(grad_x, p.batch * p.channels, p.in_size(), p.in_w) {}
  ~Backward3x3() { dx_.end(); }

  int64_t terms() const { return p_.out_h * ceil_div(p_.out_w, kLanes<T>); }

  void run(const S* x, S* grad_x, const S* grad_y, const S* weight, T* sums, bool want_bias, bool last) {
    T taps[9];
    for (int t = 0; t < 9; ++t) taps[t] = load_one(weight + t);
    S* dx = dx_.target(grad_x);
    const int64_t vectors = p_.stride_h * p_.stride_w;
    NextPlane<S> next{{{x + p_.in_size(), vectors}, {grad_y + p_.out_size(), 1}, dx_.next(grad_x, vectors)}};
    if (last) next = {};
    for_columns<T>(p_.out_w, [&](auto column, int64_t j) {
      if (p_.stride_h == 1) {
        meet_column(p_, taps, grad_y + j, x + j, dx + j, sums, column, dx_.around(), next);
      } else {
        meet_column_by_2(p_, taps, grad_y + j, x + 2 * j, p_.in_w - 2 * j, dx + 2 * j, sums, column, dx_.around(),
                         next);
      }
      next.advance(p_.out_h);
    });
    dx_.finish(grad_x);
    if (want_bias) add_plane(grad_y, sums + 9 * kLanes<T>);
  }

 private:
  void add_plane(const S* plane, T* total) const {
    Vec<T> sum = load(total);
    for (int64_t k = 0; k < p_.out_size(); k += kLanes<T>) sum += load_lanes(plane + k, p_.out_size() - k);
    store(total, sum);
  }

  const GroupedProblem& p_;
  PlaneOutput<S> dx_;
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
