// Which kernel a problem gets. No instruction set here: the kernels, their callers and their tests ask the same
// functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../problem.h"

namespace refconv::cpu {

// Whether a transformation has the kernel of refocus_dense_3x3.h, which may write dW_r where dW_t was.
[[maybe_unused]] static bool is_dense_3x3(const RefocusProblem& p) {
  return p.group_size == 1 && p.kernel_h == 3 && p.kernel_w == 3 && p.map_size == 3;
}

// Whether NCHW planes have the 3x3 kernels of planes_3x3.h.
[[maybe_unused]] static bool has_planes_3x3(const GroupedProblem& p) {
  constexpr int64_t kNarrow = 6;  // rows of y up to here leave too many lanes idle
  return p.per_group == 1 && p.multiplier == 1 && p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == p.stride_w &&
         p.stride_h <= 2 && p.pad_h == 1 && p.pad_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 && p.out_w > kNarrow;
}

// Whether these planes, of a type of so many bytes, are so narrow that two of their rows go into one of these vectors,
// of 16 floats. (Smaller ones are filled by a row of more than 6 pixels.)
[[maybe_unused]] static bool has_twin_planes(const GroupedProblem& p, int64_t element_bytes, int64_t vector_bytes) {
  return has_planes_3x3(p) && element_bytes <= 4 && vector_bytes == 64 && p.out_w <= 8 && p.in_w <= 16;
}

// Whether these planes, in rows of more than one of these vectors, are gone through some rows at once: with so few
// registers.
[[maybe_unused]] static bool has_planes_by_rows(const GroupedProblem& p, int64_t element_bytes, int64_t vector_bytes,
                                                int vector_registers) {
  return has_planes_3x3(p) && vector_registers == 16 && p.out_w * (element_bytes == 8 ? 8 : 4) > vector_bytes;
}

// Whether channels_last maps have the loops of nhwc_3x3.h.
[[maybe_unused]] static bool has_nhwc_3x3(const GroupedProblem& p) {
  return p.multiplier == 1 && p.per_group == 1 && p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == p.stride_w &&
         p.stride_w <= 2 && p.pad_h <= 1 && p.pad_w <= 1 && p.dilation_h == 1 && p.dilation_w == 1;
}

// Whether they go in tiles of two by two pixels (nhwc_3x3_tiles.h): maps, of a type of so many bytes, that the caches
// of a few cores do not hold, and backward channels in whole lines. Elsewhere whole rows of one vector are faster.
[[maybe_unused]] static bool has_nhwc_3x3_tiles(const GroupedProblem& p, int64_t element_bytes, bool backward) {
  constexpr int64_t kForwardBytes = 5 << 20, kBackwardBytes = 12 << 20;
  if (!has_nhwc_3x3(p) || element_bytes < 4 || p.out_w < 2) return false;
  const int64_t line = p.channels * element_bytes, pixels = p.in_size() * (backward ? 2 : 1) + p.out_size();
  if (!backward) return p.batch * pixels * line >= kForwardBytes;
  return p.batch * pixels * line >= kBackwardBytes && p.pad_h == 1 && p.pad_w == 1 && line % 64 == 0;
}

// How often a pixel of x is met by taps, on average, at most `times`.
[[maybe_unused]] static bool meets_at_most(const GroupedProblem& p, int64_t times) {
  return p.taps() <= times * p.stride_h * p.stride_w;
}

// Whether the forward of channels_last maps, of a type of so many bytes, reads pixels where they are (nhwc_direct.h):
// each is met so few times that copying rows before would be most of the work. To convert a pixel each time, or to
// leave many lanes idle, makes it worth less.
[[maybe_unused]] static bool has_nhwc_direct(const GroupedProblem& p, int64_t element_bytes) {
  constexpr int64_t kManyBytes = 96, kTimes = 4, kTimesIfCheap = 9;  // of a pixel; how often it is met
  const bool cheap = element_bytes >= 4 && p.channels * element_bytes >= kManyBytes;
  return p.multiplier == 1 && p.per_group == 1 && meets_at_most(p, cheap ? kTimesIfCheap : kTimes) && !has_nhwc_3x3(p);
}

// Whether planes, with as much padding as taps meet, are mostly that: more than grouped_*.cpp should keep in memory.
[[maybe_unused]] static bool is_mostly_padding(const GroupedProblem& p) {
  constexpr double kTimes = 8;
  const auto span = [](int64_t out, int64_t stride, int64_t taps, int64_t dilation) {
    return static_cast<double>((out - 1) * stride + (taps - 1) * dilation + 1);
  };
  const double padded =
      span(p.out_h, p.stride_h, p.kernel_h, p.dilation_h) * span(p.out_w, p.stride_w, p.kernel_w, p.dilation_w);
  return padded > kTimes * static_cast<double>(p.in_size() + p.out_size());
}

// Groups whose channels, of input and of output, fill whole vectors of so many lanes: those of one block of turned
// planes.
[[maybe_unused]] static int64_t groups_of_block(const GroupedProblem& p, int64_t lanes) {
  return lanes / std::gcd(lanes, std::gcd(p.per_group, p.multiplier));
}

// Whether planes, of a type of so many bytes, are so small that those of some groups are turned into the lanes of such
// vectors (turned_planes.cpp). Turning takes as long for one tap as for many; otherwise short rows leave lanes idle,
// more of them in wide vectors. All limits were measured, on Intel (docs/performance.md).
[[maybe_unused]] static bool has_turned_planes(const GroupedProblem& p, int64_t element_bytes, int64_t vector_bytes,
                                               int vector_registers, bool backward) {
  constexpr int64_t kMostPixels = 6400, kMostElements = 5 << 16;  // of x and y, of one channel and of a block
  constexpr int64_t kFewTaps = 9;
  if (has_planes_3x3(p)) return false;
  if (is_mostly_padding(p)) return true;
  const int64_t lanes = vector_bytes / std::max<int64_t>(element_bytes, 4);
  const int64_t block = groups_of_block(p, lanes);  // of the lanes of all blocks, so many have groups:
  const double filled = static_cast<double>(p.groups()) / static_cast<double>((p.groups() + block - 1) / block * block);
  if (block * (p.per_group * p.in_size() + p.multiplier * p.out_size()) > kMostElements) return false;

  // Pixels up to which it is faster: at least so many, and so many for each tap.
  const bool wide = lanes >= 16;
  int64_t least = wide ? 300 : 200, per_tap = wide ? 20 : 6;
  if (backward) {
    // The other kernels meet every plane of dy of a group with each plane of x.
    const int64_t met = std::min(p.per_group, p.multiplier) * p.multiplier;
    const bool many = vector_registers == 32;
    const int64_t of_few_registers = p.taps() >= 25 && p.stride_w == 1 ? 400 : 200;
    least = wide ? 288 * met : many ? std::max<int64_t>(200, 100 * met) : of_few_registers;
    per_tap = !many ? 8 : wide ? 52 : 26;
  }
  if (p.taps() < kFewTaps) least = wide ? least / 2 : 0;
  if (wide && p.stride_w == 2) per_tap = 26;
  if (element_bytes < 4 && !backward) per_tap *= 2;  // each is converted more than once otherwise
  int64_t limit = std::min(kMostPixels, std::max(least, per_tap * p.taps()));
  if (p.stride_w > 2) limit = kMostPixels;  // the others sort columns one number at a time
  return static_cast<double>(p.in_size() + p.out_size()) <= static_cast<double>(limit) * filled * filled * filled;
}

}  // namespace refconv::cpu
