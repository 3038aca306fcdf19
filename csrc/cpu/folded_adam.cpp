// AdamW's direction on W_r, in the coordinates of the thin form, and the root of its second moment.
//
// Equations: csrc/problem.h. Ownership: rows n of E per task.
// Bytes: Q once per block of rows, packed so that it is read along the cache; everything else is small.
// Multiply-adds per entry of W_r: rank (rank + 1) / 2 for |U Q_j|^2, rank for its squares, rank for m . Q_j, rank for
// the sum of ratios; one square root and one division. At rank 9 that is 72, and the kernel is bound by them.
// Accumulation: in T, lane by lane along the entries; the lanes in double. The root is turned in double.
#include "entry_points.h"
#include "lanes.h"
#include "scratch.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kPackedBytes = 16384;  // of Q at a time: half the first cache
constexpr int64_t kRowBlock = 48;        // rows that use it before the next part

// Rows and vectors at once: two sums for each of their products, and what is multiplied, in registers.
constexpr int kRowsAtOnce = kVectorRegisters == 32 ? 3 : 2;
constexpr int kVectorsAtOnce = kVectorRegisters == 32 ? 4 : 2;

constexpr double kNothing = 1e-140;  // lengths below it are no rotation: their squares would not be numbers

// The root of keep S + (1 - keep) x x^T: one rotation per row of U against what is left of x.
template <typename T>
void update_root(const FoldedAdamProblem& p, const T* root, const T* x, double* work, double* rest, T* updated) {
  const double keep = __builtin_sqrt(p.keep), add = __builtin_sqrt(1 - p.keep);
  for (int64_t i = 0; i < p.root_size(); ++i) work[i] = keep * static_cast<double>(root[i]);
  for (int64_t i = 0; i < p.rank; ++i) rest[i] = add * static_cast<double>(x[i]);
  double* row = work;
  for (int64_t k = 0; k < p.rank; row += p.rank - k++) {
    const double length = __builtin_sqrt(row[0] * row[0] + rest[k] * rest[k]);
    if (length < kNothing) continue;  // a NaN is none
    const double cosine = row[0] / length, sine = rest[k] / length;
    for (int64_t i = 0; i < p.rank - k; ++i) {
      const double entry = row[i], other = rest[k + i];
      row[i] = cosine * entry + sine * other;
      rest[k + i] = cosine * other - sine * entry;
    }
  }
  for (int64_t i = 0; i < p.root_size(); ++i) updated[i] = static_cast<T>(work[i]);
}

// Columns [j, j + VECTORS * lanes) of Q^T [rank, columns]: row k at [k * VECTORS * lanes]; zero beyond the last one.
template <typename T, int VECTORS>
void pack(const FoldedAdamProblem& p, const T* rotation, int64_t j, T* packed) {
  constexpr int64_t kWidth = VECTORS * kLanes<T>;
  const int64_t count = least(kWidth, p.columns - j);
  for (int64_t k = 0; k < p.rank; ++k, packed += kWidth) {
    __builtin_memcpy(packed, rotation + k * p.columns + j, static_cast<size_t>(count) * sizeof(T));
    for (int64_t i = count; i < kWidth; ++i) packed[i] = T(0);
  }
}

// sums[r * rank + k] += sum over the packed columns of ratio_j Q_jk, lane by lane, for ROWS rows.
template <typename T, int ROWS, int VECTORS>
void accumulate(const FoldedAdamProblem& p, const T* first, const T* root, const T* packed, Vec<T>* sums) {
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kTile = ROWS * VECTORS;
  const int64_t rank = p.rank, size = p.root_size();
  const auto dot = [&](const T* factors, int64_t stride, int64_t begin, Vec<T>* products) {
    const T* from = packed + begin * VECTORS * kLane;
    for (int64_t k = begin; k < rank; ++k, from += VECTORS * kLane, ++factors) {
      Vec<T> q[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) q[v] = in_register(load(from + v * kLane));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> factor = in_register(broadcast(factors[r * stride]));
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) products[r * VECTORS + v] += factor * q[v];
      }
    }
  };
  Vec<T> second[kTile] = {};
  for (int64_t k = 0; k < rank; root += rank - k++) {
    Vec<T> seen[kTile] = {};
    dot(root, size, k, seen);
#pragma GCC unroll 16
    for (int n = 0; n < kTile; ++n) second[n] += seen[n] * seen[n];
  }
  Vec<T> ratio[kTile] = {};
  dot(first, rank, 0, ratio);
  const T scale_first = static_cast<T>(p.scale_first), scale_second = static_cast<T>(p.scale_second);
  const T eps = static_cast<T>(p.eps);
#pragma GCC unroll 16
  for (int n = 0; n < kTile; ++n) {
    const Vec<T> below = square_root<T>(second[n]) * scale_second + eps;
    ratio[n] = below == T(0) ? Vec<T>{} : ratio[n] * scale_first / below;
  }
  for (int64_t k = 0; k < rank; ++k, packed += VECTORS * kLane) {
    Vec<T> q[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) q[v] = in_register(load(packed + v * kLane));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      Vec<T> total = sums[r * rank + k];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) total += ratio[r * VECTORS + v] * q[v];
      sums[r * rank + k] = total;
    }
  }
}

// At most kRowBlock rows of one refocus group, whose rotation, root and first moment these are.
template <typename T>
void direction_of(const FoldedAdamProblem& p, const T* first, const T* root, const T* rotation, int64_t rows, T* packed,
                  int64_t tiles_at_once, Vec<T>* sums, T* direction) {
  constexpr int64_t kWidth = kVectorsAtOnce * kLanes<T>;
  const int64_t tile_size = p.rank * kWidth, size = p.root_size();
  for (int64_t n = 0; n < rows * p.rank; ++n) sums[n] = Vec<T>{};
  for (int64_t j = 0; j < p.columns; j += tiles_at_once * kWidth) {
    const int64_t tiles = least(tiles_at_once, ceil_div(p.columns - j, kWidth));
    for (int64_t t = 0; t < tiles; ++t) {
      pack<T, kVectorsAtOnce>(p, rotation, j + t * kWidth, packed + t * tile_size);
    }
    const auto over_tiles = [&](auto run, int64_t r) {
      for (int64_t t = 0; t < tiles; ++t) {
        run(p, first + r * p.rank, root + r * size, packed + t * tile_size, sums + r * p.rank);
      }
    };
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) over_tiles(accumulate<T, kRowsAtOnce, kVectorsAtOnce>, r);
    for (; r < rows; ++r) over_tiles(accumulate<T, 1, kVectorsAtOnce>, r);
  }
  for (int64_t n = 0; n < rows * p.rank; ++n) direction[n] = static_cast<T>(sum<T>(sums[n]));
}

}  // namespace

template <typename T>
void folded_adam(const FoldedAdamProblem& p, const T* first, const T* root, const T* gradient, const T* rotation,
                 T* updated, T* direction, int64_t begin, int64_t end) {
  const int64_t size = p.root_size(), tile_size = p.rank * kVectorsAtOnce * kLanes<T>;
  const int64_t tiles = most(1, kPackedBytes / (tile_size * static_cast<int64_t>(sizeof(T))));
  Scratch<T> packed(tiles * tile_size);
  Scratch<Vec<T>> sums(kRowBlock * p.rank);
  Scratch<double> work(size + p.rank);
  while (begin < end) {
    const int64_t group = begin / p.per_group;
    const int64_t rows = least(kRowBlock, least(end, (group + 1) * p.per_group) - begin);
    for (int64_t n = begin; n < begin + rows; ++n) {
      update_root(p, root + n * size, gradient + n * p.rank, work.data(), work.data() + size, updated + n * size);
    }
    direction_of(p, first + begin * p.rank, updated + begin * size, rotation + group * p.rank * p.columns, rows,
                 packed.data(), tiles, sums.data(), direction + begin * p.rank);
    begin += rows;
  }
}

REFCONV_INSTANTIATE_FOLDED_ADAM(float)
REFCONV_INSTANTIATE_FOLDED_ADAM(double)

}  // namespace refconv::cpu::REFCONV_ISA
