// 3x3 depthwise convolutions of NCHW planes by plane_3x3.h and plane_3x3_by_2.h: which plane is written where, and what
// is fetched meanwhile.
#pragma once

#include "plane_3x3_by_2.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// How many planes are gone through at once.
template <typename S>
int64_t planes_together(const GroupedProblem& p) {
  return has_twin_planes(p, sizeof(S), REFCONV_VECTOR_BYTES) ? 2 : 1;
}

// Steps from the one that is computed to the one that is fetched: planes may be so small that the next one is too near.
template <typename S>
int64_t fetch_distance(int64_t pixels) {
  constexpr int64_t kBytes = 2048;
  return ceil_div(kBytes, pixels * static_cast<int64_t>(sizeof(S)));
}

// How planes that are large enough are written around the cache: straight away where rows are whole aligned vectors
// that fill lines, otherwise by way of a plane in the cache.
template <typename S>
class PlaneOutput {
 public:
  // Planes of `size` pixels in rows of `width`, `all` of them, `together` at once. `first` is null where nobody wants
  // them.
  PlaneOutput(const S* first, int64_t all, int64_t size, int64_t width, int64_t together)
      : streamed_(first != nullptr && streams(all * size * static_cast<int64_t>(sizeof(S)))),
        straight_(streamed_ && kVectorBytes == 64 && width % kLanes<Compute<S>> == 0 &&
                  reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0),
        plane_(streamed_ && !straight_ ? together * size : 0) {}
  // Where a kernel writes planes whose place is `to`.
  S* target(S* to) { return streamed_ && !straight_ ? plane_.data() : to; }
  bool around() const { return straight_; }
  // Whether they are fetched before they are written.
  bool fetched() const { return !streamed_; }
  void finish(S* to, int64_t pixels) {
    if (streamed_ && !straight_) stream(to, plane_.data(), pixels);
  }
  void end() const {
    if (streamed_) end_streams();
  }

 private:
  static constexpr int64_t kVectorBytes = kLanes<Compute<S>> * static_cast<int64_t>(sizeof(S));
  const bool streamed_, straight_;
  Scratch<S> plane_;
};

// Calls run(column, offset) for the columns of a plane, from left to right.
template <typename T, typename Run>
inline void for_columns(int64_t width, const Run& run) {
  constexpr int64_t kLane = kLanes<T>;
  if (width <= kLane) return run(Column<true, true>{width}, 0);
  run(Column<true, false>{kLane}, 0);
  int64_t j = kLane;
  for (; j + kLane < width; j += kLane) run(Column<false, false>{kLane}, j);
  run(Column<false, true>{width - j}, j);
}

// The same for `count` planes at once, one or two.
template <typename S, typename Run>
inline void for_columns(const GroupedProblem& p, [[maybe_unused]] int64_t count, const Run& run) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(S) <= 4) {
    if (count == 2) return run(Twins{p.out_w, p.in_size(), p.out_size()}, 0);
  }
#endif
  for_columns<Compute<S>>(p.out_w, run);
}

// The taps of some planes, in the type that is computed with.
template <typename S>
class Taps {
  using T = Compute<S>;

 public:
  Taps(const S* weight, int64_t planes) {
    if constexpr (sizeof(S) == sizeof(T)) {
      taps_ = weight;
    } else {
      for (int64_t t = 0; t < 9 * planes; ++t) own_[t] = load_one(weight + t);
      taps_ = own_;
    }
  }
  const T* data() const { return taps_; }

 private:
  T own_[sizeof(S) == sizeof(T) ? 1 : 18];
  const T* taps_;
};

template <typename S, int STRIDE>
void forward_3x3(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                 int64_t end) {
  using T = Compute<S>;
  const int64_t in_size = p.in_size(), out_size = p.out_size(), together = planes_together<S>(p);
  const int64_t ahead = fetch_distance<S>(together * in_size) * together;
  PlaneOutput<S> output(y, p.batch * p.channels, out_size, p.out_w, together);
  int64_t channel = begin % p.channels;
  for (int64_t task = begin, count; task < end; task += count) {
    count = least(together, least(end - task, p.channels - channel));
    const Taps<S> taps(weight + channel * 9, count);
    T start[2] = {};
    for (int64_t n = 0; n < count && bias != nullptr; ++n) start[n] = load_one(bias + channel + n);
    const S* plane = x + task * in_size;
    S *target = y + task * out_size, *to = output.target(target);
    NextPlane<S, STRIDE * STRIDE> next;
    if (task + ahead < end) next.x = plane + ahead * in_size;
    if (task + ahead < end && output.fetched()) next.y = target + ahead * out_size;
    for_columns<S>(p, count, [&](auto column, int64_t j) {
      if constexpr (STRIDE == 1) {
        correlate_column(p, taps.data(), start, plane + j, to + j, column, output.around(), next);
      } else {
        correlate_column_by_2(p, taps.data(), start, plane + 2 * j, p.in_w - 2 * j, to + j, column, output.around(),
                              next);
      }
      next.advance(p.out_h);
    });
    output.finish(target, count * out_size);
    channel = channel + count < p.channels ? channel + count : 0;
  }
  output.end();
}

// The backward of one call, plane by plane; used as Backward (grouped_plane.h).
template <typename S, int STRIDE>
class Backward3x3 {
  using T = Compute<S>;

 public:
  Backward3x3(const GroupedProblem& p, const S* grad_x)
      : p_(p), together_(planes_together<S>(p)), dx_(grad_x, p.batch * p.channels, p.in_size(), p.in_w, together_) {}
  ~Backward3x3() { dx_.end(); }

  int64_t terms() const { return p_.out_h * ceil_div(p_.out_w, kLanes<T>); }
  int64_t together() const { return together_; }
  int64_t steps_ahead() const { return fetch_distance<S>(together_ * p_.in_size()); }

  void run(const S* x, S* grad_x, const S* grad_y, const S* weight, T* sums, bool want_bias, int64_t count,
           int64_t ahead) {
    const Taps<S> taps(weight, count);
    S* dx = dx_.target(grad_x);
    NextPlane<S, STRIDE * STRIDE> next;
    if (ahead != 0) next.x = x + ahead * p_.in_size(), next.y = grad_y + ahead * p_.out_size();
    if (ahead != 0 && dx_.fetched()) next.dx = grad_x + ahead * p_.in_size();
    for_columns<S>(p_, count, [&](auto column, int64_t j) {
      if constexpr (STRIDE == 1) {
        meet_column(p_, taps.data(), grad_y + j, x + j, dx + j, sums, column, dx_.around(), next);
      } else {
        meet_column_by_2(p_, taps.data(), grad_y + j, x + 2 * j, p_.in_w - 2 * j, dx + 2 * j, sums, column,
                         dx_.around(), next);
      }
      if (want_bias) add_column(grad_y + j, sums + 9 * kLanes<T>, column);
      next.advance(p_.out_h);
    });
    dx_.finish(grad_x, count * p_.in_size());
  }

 private:
  template <typename C>
  void add_column(const S* dy, T* total, const C& column) const {
    Vec<T> sum = load(total);
    for (int64_t h = 0; h < p_.out_h; ++h) sum += column.load_row(dy + h * p_.out_w);
    store(total, sum);
  }

  const GroupedProblem& p_;
  const int64_t together_;
  PlaneOutput<S> dx_;
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
