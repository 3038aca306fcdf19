// 3x3 depthwise convolutions of NCHW planes by plane_3x3.h and plane_3x3_by_2.h, or with 16 vector registers by
// plane_3x3_rows.h and plane_3x3_rows_by_2.h: which plane is written where, and what is fetched meanwhile.
#pragma once

#include "plane_3x3_by_2.h"
#include "plane_3x3_rows_by_2.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

template <typename S>
bool goes_by_rows(const GroupedProblem& p) {
  return has_planes_by_rows(p, sizeof(S), REFCONV_VECTOR_BYTES, kVectorRegisters);
}

// How many planes are gone through at once.
template <typename S>
int64_t planes_together(const GroupedProblem& p) {
  return has_twin_planes(p, sizeof(S), REFCONV_VECTOR_BYTES) ? 2 : 1;
}

// How many bytes ahead maps are fetched into the first cache, in the order of memory, or where planes are small in
// whole planes of the same channels.
constexpr int64_t kForwardAhead = 8192, kBackwardAhead = 4096, kPlanesAhead = 1500;
constexpr int64_t kSmallBytes = 4096;

// Whether planes are so small, `together` of them, that all of some channels are gone through before others: weights
// and sums then stay in registers. Large ones are fetched better in the order of memory.
template <typename S>
bool has_small_planes(const GroupedProblem& p, int64_t together) {
  const int64_t bytes = together * p.in_size() * static_cast<int64_t>(sizeof(S));
  return bytes <= kSmallBytes;
}

// `count` images of small planes; the first one of what comes next is `next` planes further, 0: nothing comes.
template <typename S>
Images small_images(const GroupedProblem& p, int64_t together, int64_t count, int64_t next) {
  const auto planes = [&](int64_t n) { return Ahead{n * p.in_size(), n * p.out_size(), n * p.in_size()}; };
  const int64_t bytes = together * p.in_size() * static_cast<int64_t>(sizeof(S));
  const int64_t further = least(count, ceil_div(kPlanesAhead, bytes));
  const Ahead step = planes(p.channels), last = planes(next + (further - count) * p.channels);
  return {count, step.x, step.y, step.dx, planes(further * p.channels), next != 0 ? last : Ahead{}, count - further};
}

// How planes that are large enough are written around the cache: straight away where rows are whole aligned vectors
// that fill lines, otherwise by way of a plane in the cache.
template <typename S>
class PlaneOutput {
 public:
  // Planes of `size` pixels in rows of `width`, `all` of them, `together` at once. `first` is null where nobody wants
  // them.
  PlaneOutput(const S* first, int64_t all, int64_t size, int64_t width, int64_t together)
      : streamed_(first != nullptr && streams(all * size * static_cast<int64_t>(sizeof(S)),
                                              together * size * static_cast<int64_t>(sizeof(S)))),
        straight_(streamed_ && kVectorBytes == 64 && width % kLanes<Compute<S>> == 0 &&
                  reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0),
        plane_(streamed_ && !straight_ ? together * size : 0) {}
  // Where a kernel writes planes whose place is `to`.
  S* target(S* to) { return streamed_ && !straight_ ? plane_.data() : to; }
  bool around() const { return straight_; }
  bool streamed() const { return streamed_; }
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

// Calls run(columns, offset) for the columns of y of `count` planes at once, one or two: whole rows of up to MOST
// vectors.
template <typename S, int MOST, typename Run>
inline void for_columns(const GroupedProblem& p, [[maybe_unused]] int64_t count, const Run& run) {
#if defined(__AVX512F__) && REFCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(S) <= 4) {
    if (count == 2) return run(Twins{p.out_w, p.in_size(), p.out_size()}, 0);
  }
#endif
  // With 16 registers wider rows do not come here.
  for_columns<Compute<S>, kVectorRegisters == 32 ? MOST : 1>(p.out_w, run);
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

// The planes of `count` channels from `channel` on, one or two, in some images.
template <typename S, int STRIDE>
void correlate_planes(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t channel,
                      int64_t count, bool around, const Images& images) {
  const Taps<S> taps(weight + channel * 9, count);
  Compute<S> start[2] = {};
  for (int64_t n = 0; n < count && bias != nullptr; ++n) start[n] = load_one(bias + channel + n);
  if constexpr (kVectorRegisters == 16) {
    const auto by_rows = STRIDE == 1 ? correlate_planes_by_rows<S> : correlate_planes_by_rows_by_2<S>;
    if (goes_by_rows<S>(p)) return by_rows(p, taps.data(), *start, x, y, images);
  }
  for_columns<S, STRIDE == 1 ? 7 : 4>(p, count, [&](auto columns, int64_t j) {
    if constexpr (STRIDE == 1) {
      correlate_columns(p, taps.data(), start, x + j, y + j, columns, around, images);
    } else {
      correlate_columns_by_2(p, taps.data(), start, x + 2 * j, p.in_w - 2 * j, y + j, columns, around, images);
    }
  });
}

// The same tasks in another order, channel after channel, each in all images: what is computed is the same share of the
// planes, in steps of as many as are gone through at once.
template <typename S, int STRIDE>
void forward_small_3x3(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                       int64_t end, int64_t together) {
  const int64_t all = p.batch * p.channels, steps = p.batch * ceil_div(p.channels, together);
  const int64_t last = end * steps / all;
  for (int64_t step = begin * steps / all, images; step < last; step += images) {
    const int64_t channel = step / p.batch * together, image = step % p.batch;
    images = least(p.batch - image, last - step);
    const int64_t plane = image * p.channels + channel, count = least(together, p.channels - channel);
    const int64_t next = step + images < last ? channel + together - plane : 0;
    correlate_planes<S, STRIDE>(p, x + plane * p.in_size(), weight, bias, y + plane * p.out_size(), channel, count,
                                false, small_images<S>(p, together, images, next));
  }
}

template <typename S, int STRIDE>
void forward_3x3(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                 int64_t end) {
  constexpr int64_t kAhead = kForwardAhead / static_cast<int64_t>(sizeof(S));
  const int64_t in_size = p.in_size(), out_size = p.out_size(), together = planes_together<S>(p);
  PlaneOutput<S> output(y, p.batch * p.channels, out_size, p.out_w, together);
  if (!output.streamed() && has_small_planes<S>(p, together)) {
    return forward_small_3x3<S, STRIDE>(p, x, weight, bias, y, begin, end, together);
  }
  int64_t channel = begin % p.channels;
  for (int64_t task = begin, count; task < end; task += count) {
    count = least(together, least(end - task, p.channels - channel));
    S* target = y + task * out_size;
    correlate_planes<S, STRIDE>(p, x + task * in_size, weight, bias, output.target(target), channel, count,
                                output.around(), {1, 0, 0, 0, {kAhead, kAhead, 0}, {}, 1});
    output.finish(target, count * out_size);
    channel = channel + count < p.channels ? channel + count : 0;
  }
  output.end();
}

// The backward of one call, some planes at a time; used as Backward (grouped_plane.h).
template <typename S, int STRIDE>
class Backward3x3 {
  using T = Compute<S>;

 public:
  Backward3x3(const GroupedProblem& p, const S* grad_x)
      : p_(p),
        wanted_(grad_x != nullptr),
        together_(planes_together<S>(p)),
        small_(has_small_planes<S>(p, together_)),
        dx_(grad_x, p.batch * p.channels, p.in_size(), p.in_w, together_) {}
  ~Backward3x3() { dx_.end(); }

  // Of one image.
  int64_t terms() const { return p_.out_h * ceil_div(p_.out_w, kLanes<T>); }
  // At most so many are gone through at once.
  int64_t images(int64_t most_terms) const {
    return small_ && !dx_.streamed() ? most(1, least(p_.batch, most_terms / terms())) : 1;
  }
  int64_t together() const { return together_; }

  // `next`: how many planes further the next step's first one lies, zero if there is none.
  void run(const S* x, S* grad_x, const S* grad_y, const S* weight, T* sums, bool want_bias, int64_t count,
           int64_t images, int64_t next) {
    const Taps<S> taps(weight, count);
    S* dx = dx_.target(grad_x);
    constexpr int64_t kAhead = kBackwardAhead / static_cast<int64_t>(sizeof(S));
    Images all{1, 0, 0, 0, {kAhead, kAhead, kAhead}, {}, 1};
    if (small_) all = small_images<S>(p_, together_, images, next);
    if (!wanted_) all.dx_step = 0;
    run_planes(taps.data(), grad_y, x, dx, sums, want_bias, count, all);
    dx_.finish(grad_x, count * p_.in_size());
  }

 private:
  void run_planes(const T* taps, const S* dy, const S* x, S* dx, T* sums, bool want_bias, int64_t count,
                  const Images& images) const {
    T* bias_sums = sums + 9 * kLanes<T>;
    if constexpr (kVectorRegisters == 16) {
      const auto by_rows = STRIDE == 1 ? meet_planes_by_rows<S> : meet_planes_by_rows_by_2<S>;
      if (goes_by_rows<S>(p_)) {
        if (want_bias) add_planes(dy, bias_sums, images);
        return by_rows(p_, taps, dy, x, dx, sums, images);
      }
    }
    for_columns<S, 4>(p_, count, [&](auto columns, int64_t j) {
      if constexpr (STRIDE == 1) {
        meet_columns(p_, taps, dy + j, x + j, dx + j, sums, columns, dx_.around(), images);
      } else {
        meet_columns_by_2(p_, taps, dy + j, x + 2 * j, p_.in_w - 2 * j, dx + 2 * j, sums, columns, dx_.around(),
                          images);
      }
      if (want_bias) add_columns(dy + j, bias_sums, columns, images);
    });
  }

  // The sums of some rows, and then the sum of those: one after the other, hundreds of thousands of pixels would lose
  // digits that the last sum, in double, cannot bring back.
  template <typename C>
  void add_columns(const S* first_dy, T* total, const C& columns, const Images& images) const {
    constexpr int64_t kRows = 64;
    Vec<T> sum = load(total);
    for (int64_t image = 0; image < images.count; ++image) {
      const S* dy = first_dy + image * images.y_step;
      for (int64_t h = 0; h < p_.out_h; h += kRows) {
        Vec<T> part{};
        for (int64_t left = least(kRows, p_.out_h - h); left > 0; --left, dy += p_.out_w) {
#pragma GCC unroll 4
          for (int j = 0; j < C::kVectors; ++j) part += columns.load_row(dy, j);
        }
        sum += part;
      }
    }
    store(total, sum);
  }

  void add_planes(const S* first_dy, T* total, const Images& images) const {
    constexpr int64_t kPixels = 256 * kLanes<T>;
    Vec<T> sum = load(total);
    for (int64_t image = 0; image < images.count; ++image) {
      const S* dy = first_dy + image * images.y_step;
      for (int64_t i = 0; i < p_.out_size(); i += kPixels) {
        Vec<T> part{};
        const int64_t end = least(i + kPixels, p_.out_size());
        for (int64_t k = i; k < end; k += kLanes<T>) part += load_lanes(dy + k, end - k);
        sum += part;
      }
    }
    store(total, sum);
  }

  const GroupedProblem& p_;
  const bool wanted_;  // dx
  const int64_t together_;
  const bool small_;
  PlaneOutput<S> dx_;
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
