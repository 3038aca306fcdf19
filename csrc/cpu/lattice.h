// The pixels of x that meet the same taps of a strided convolution.
#pragma once

#include "../problem.h"
#include "scratch.h"

namespace refconv::cpu::REFCONV_ISA {

// In one direction: the taps that the pixels s * v + f of the lattice f see, from the last to the first, and the
// pixel of dy that pixel v = 0 meets at the last of them. From tap to tap, dy moves by `shift` to larger indices.
struct LatticeTaps {
  int64_t count, last, step, first_dy, shift;
};

inline LatticeTaps lattice_taps(int64_t f, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t common = gcd(stride, dilation);
  LatticeTaps taps{0, 0, stride / common, 0, dilation / common};
  for (int64_t t = 0; t < kernel; ++t) {
    if ((f + pad - t * dilation) % stride != 0) continue;
    ++taps.count;
    taps.last = t;
    taps.first_dy = (f + pad - t * dilation) / stride;
  }
  return taps;
}

// Those of the rows and of the columns of x.
struct Lattices {
  explicit Lattices(const GroupedProblem& p) : rows(p.stride_h), columns(p.stride_w) {
    for (int64_t g = 0; g < p.stride_h; ++g) {
      rows[g] = lattice_taps(g, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
    }
    for (int64_t f = 0; f < p.stride_w; ++f) {
      columns[f] = lattice_taps(f, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
    }
  }
  Scratch<LatticeTaps> rows, columns;
};

}  // namespace refconv::cpu::REFCONV_ISA
