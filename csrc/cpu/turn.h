// NCHW planes of a block of channels, turned so that the channels are the lanes of vectors, and back.
#pragma once

#include "elements.h"
#include "lanes.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

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

// Element t of what row(lane) points to, `size` of them, becomes to[t * step + lane]; `lanes` of them are rounded up,
// with zeros.
template <typename S, typename Row>
REFCONV_APART void turn_rows(int64_t lanes, int64_t size, const Row& row, Compute<S>* to, int64_t step) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  for (int64_t c = 0; c < lanes; c += kLane) {
    for (int64_t t = 0; t < size; t += kLane) {
      Vec<T> rows[kLane];
      for (int64_t r = 0; r < kLane; ++r) rows[r] = c + r < lanes ? load_lanes(row(c + r) + t, size - t) : Vec<T>{};
      transpose<T>(rows);
      for (int64_t i = 0; i < least(kLane, size - t); ++i) store(to + (t + i) * step + c, rows[i]);
    }
  }
}

// The planes of a block of channels, one behind the other; `next` is the block that follows, `out` one to be written.
template <typename S>
struct Planes {
  const S* from;
  int64_t size, count;
  const S *next, *out;
  int64_t out_size;
};

// Calls put(k, vector) with element k of all planes in the lanes, zero in the rest; of some elements twice. Fetches
// what comes next meanwhile.
template <typename S, typename Put>
inline void turn_in(const Planes<S>& planes, const Put& put) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t size = planes.size;
  for (int64_t step = 0; step < size; step += kLane) {
    Vec<T> rows[kLane];
    const int64_t k = size < kLane ? 0 : least(step, size - kLane);  // the last step goes over some elements again
    if (planes.count == kLane && size >= kLane) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLane; ++r) rows[r] = load(planes.from + r * size + k);
    } else {
      for (int64_t r = 0; r < kLane; ++r) {
        rows[r] = r < planes.count ? load_lanes(planes.from + r * size + k, size - k) : Vec<T>{};
      }
    }
    if (planes.next != nullptr) {
      for (int64_t r = 0; r < kLane; ++r) __builtin_prefetch(planes.next + r * size + k, 0, 2);
    }
    if (planes.out != nullptr && k < planes.out_size) {
      for (int64_t r = 0; r < kLane; ++r) __builtin_prefetch(planes.out + r * planes.out_size + k, 0, 2);
    }
    transpose<T>(rows);
    if (size >= kLane) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLane; ++i) put(k + i, rows[i]);
    } else {
      for (int64_t i = 0; i < size; ++i) put(i, rows[i]);
    }
  }
}

// The reverse: lane r of get(k) becomes element k of plane r, for `count` planes.
template <typename S, typename Get>
inline void turn_out(const Get& get, int64_t size, int64_t count, S* to) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  Vec<T> rows[kLane];
  if (size < kLane) {
    for (int64_t i = 0; i < kLane; ++i) rows[i] = i < size ? get(i) : Vec<T>{};
    transpose<T>(rows);
    // What a whole vector writes behind a plane is the start of the next one, written later.
    for (int64_t r = 0; r < count; ++r) store_ahead(to + r * size, rows[r], size, to + count * size);
    return;
  }
  for (int64_t step = 0; step < size; step += kLane) {
    const int64_t k = least(step, size - kLane);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLane; ++i) rows[i] = get(k + i);
    transpose<T>(rows);
    if (count == kLane) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLane; ++r) store(to + r * size + k, rows[r]);
    } else {
      for (int64_t r = 0; r < count; ++r) store(to + r * size + k, rows[r]);
    }
  }
}

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
