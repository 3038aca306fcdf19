// One plane at a time of the backward on NCHW planes: scratch, and the passes over it.
//
// Every pixel of x meets, for each tap, one pixel of dy: dx gains weight * dy and dW[tap] gains x * dy. With dy in
// zero-padded scratch, one load of dy serves both. For a stride s, the pixels of x with equal remainders modulo s
// (a lattice) share their taps and shifts, and along the lattice dy advances pixel by pixel: stride 1 and any other
// stride and dilation are the same loops. A pass holds as many taps in registers as fit.
#pragma once

#include "elements.h"
#include "grouped_pass.h"
#include "lanes.h"
#include "lattice.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kStripBytes = 24576;  // of x, dx and dy between two passes: the first cache

// The backward of one call: scratch planes, where things lie in them, and the passes over a plane.
template <typename S>
class Backward {
  using T = Compute<S>;

 public:
  explicit Backward(const GroupedProblem& p)
      : p_(p),
        in_place_(p.stride_w == 1 && p.stride_h == 1 && p.taps() <= kMaxTaps && p.kernel_h <= kMaxTapRows &&
                  sizeof(S) == sizeof(T)),
        streamed_(streams(p.batch * p.channels * p.in_size() * static_cast<int64_t>(sizeof(S)),
                          p.in_size() * static_cast<int64_t>(sizeof(S)))),
        top_((p.kernel_h - 1) * p.dilation_h / p.stride_h),
        left_((p.kernel_w - 1) * p.dilation_w / p.stride_w),
        rows_(ceil_div(p.in_h, p.stride_h)),
        columns_(ceil_div(p.in_w, p.stride_w)),
        dy_rows_(top_ + most(p.out_h, rows_ + (p.stride_h - 1 + p.pad_h) / p.stride_h)),
        dy_pitch_(most(left_ + p.out_w, columns_ + (p.stride_w - 1 + p.pad_w) / p.stride_w)),
        flat_(!in_place_ && dy_pitch_ <= round_up(columns_, kLanes<T>)),
        x_pitch_(in_place_ ? p.in_w
                 : flat_   ? dy_pitch_
                           : round_up(columns_, kLanes<T>)),
        strip_(strip_of(p)),
        held_(p.multiplier == 1 ? strip_ : rows_),
        lattice_size_(held_ * x_pitch_ + kSlack),
        x_(in_place_ ? 0 : p.stride_h * p.stride_w * lattice_size_),
        dx_(in_place_ ? 0 : p.stride_h * p.stride_w * lattice_size_),
        merged_(!in_place_ && streamed_ ? held_ * p.stride_h * p.in_w : 0),
        dy_((dy_rows_ + 1) * dy_pitch_ + left_ + kSlack),
        weight_(p.taps()),
        passes_(p.taps() + p.stride_h * p.stride_w) {
    for (int64_t g = 0; g < p.stride_h; ++g) {
      const LatticeTaps rows = lattice_taps(g, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
      for (int64_t f = 0; f < p.stride_w; ++f) {
        add_passes(g, f, rows, lattice_taps(f, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w));
      }
    }
  }

  // Terms that one call of run adds to a lane of dW at most.
  int64_t terms() const { return rows_ * ceil_div(x_pitch_, kLanes<T>); }

  int64_t together() const { return 1; }  // planes at a time
  int64_t images(int64_t) const { return 1; }

  // One plane of x and the `multiplier` planes of dy of its group: writes dx, and adds to `sums` what each of dy's
  // planes finds at its taps and, if wanted, behind them, for the bias: [multiplier, taps + 1, lanes]. The next one
  // lies `ahead` planes further, unless that is zero.
  void run(const S* x, S* grad_x, const S* grad_y, const S* weight, T* sums, bool want_bias, int64_t, int64_t,
           int64_t ahead) {
    const int64_t per_plane = (p_.taps() + 1) * kLanes<T>;
    for (int64_t u = 0; u < rows_; u += held_) {
      const int64_t rows = least(held_, rows_ - u);
      take_rows(x, grad_x, u, rows);
      for (int64_t m = 0; m < p_.multiplier; ++m) {
        T* total = sums + m * per_plane;
        // Where rows are held strip by strip, the one plane of dy stays in its scratch.
        if (u == 0) {
          take_dy(grad_y + m * p_.out_size(), want_bias ? total + p_.taps() * kLanes<T> : nullptr);
          const S* from = weight + m * p_.per_group * p_.taps();
          for (int64_t t = 0; t < p_.taps(); ++t) weight_[t] = load_one(from + t);
        }
        const bool more = ahead == 1 || m + 1 < p_.multiplier;
        for (int64_t v = 0; v < rows; v += strip_) {
          const int64_t count = least(strip_, rows - v);
          if (!in_place_) fetch_ahead(x, grad_y + m * p_.out_size(), u + v, count, more);
          run_strip(u, v, count, m == 0, total);
        }
      }
      if (!in_place_) give_rows(grad_x, u, rows);
    }
  }

 private:
  static constexpr int64_t kSlack = 2 * kLanes<T>;  // behind the last row, for whole vectors

  struct PlannedPass {
    Pass<T> pass;
    RunPass<T> run;  // null: no tap reaches this lattice
    int64_t x_offset, dy_offset, tap;
    bool accumulate;
  };

  // Rows of a lattice that stay in the first cache from one pass to the next.
  int64_t strip_of(const GroupedProblem& p) const {
    const int64_t row_bytes = (2 * p.stride_h * p.stride_w * x_pitch_ + dy_pitch_) * static_cast<int64_t>(sizeof(T));
    return least(rows_, most(4, kStripBytes / row_bytes));
  }

  // Where the scratch holds row i of those from lattice row u on; the lattices of its columns follow at distance
  // lattice_size_.
  int64_t row_offset(int64_t i, int64_t u) const {
    return i % p_.stride_h * p_.stride_w * lattice_size_ + (i / p_.stride_h - u) * x_pitch_;
  }

  // Rows u to u + rows of every lattice of x, to be met.
  void take_rows(const S* x, S* grad_x, int64_t u, int64_t rows) {
    if constexpr (sizeof(S) == sizeof(T)) {
      if (in_place_) {
        x_source_ = x + u * p_.in_w, dx_target_ = grad_x + u * p_.in_w;
        return;
      }
    }
    for (int64_t i = u * p_.stride_h; i < (u + rows) * p_.stride_h; ++i) {
      T* to = x_.data() + row_offset(i, u);
      if (i < p_.in_h) {
        sort_row(x + i * p_.in_w, to);
      } else {  // the lattice has no such row; the scratch may hold an earlier one
        for (int64_t f = 0; f < p_.stride_w; ++f) {
          for (int64_t j = 0; j < x_pitch_; ++j) to[f * lattice_size_ + j] = T(0);
        }
      }
    }
    x_source_ = x_.data(), dx_target_ = dx_.data();
  }

  // The passes over rows u to u + rows of the lattices fetch what comes after them: the same number of rows of x, and
  // as large a part of the next plane of dy. Scratch copies alone do not keep the memory busy.
  void fetch_ahead(const S* x, const S* grad_y, int64_t u, int64_t rows, bool more) {
    const int64_t end = (u + rows) * p_.stride_h;
    const bool inside = end + rows * p_.stride_h <= p_.in_h;
    next_x_ = x + (inside || more ? end * p_.in_w : 0);
    next_x_count_ = rows * p_.stride_h * p_.in_w / pass_count_;
    next_dy_ = grad_y + u * p_.out_size() / rows_ + (more ? p_.out_size() : 0);
    next_dy_count_ = rows * p_.out_size() / rows_ / pass_count_;
  }

  // The passes over `rows` rows of every lattice: those from v on of the ones taken, which began at u.
  void run_strip(int64_t u, int64_t v, int64_t rows, bool first, T* total) {
    for (int64_t n = 0; n < pass_count_; ++n) {
      const PlannedPass& planned = passes_[n];
      prefetch(next_x_ + n * next_x_count_, next_x_count_);
      prefetch(next_dy_ + n * next_dy_count_, next_dy_count_);
      Pass<T> pass = planned.pass;
      pass.rows = flat_ ? 1 : rows;
      pass.columns = flat_ ? rows * x_pitch_ : x_pitch_;
      pass.dy = dy_.data() + planned.dy_offset + (u + v) * dy_pitch_;
      pass.x = x_source_ + planned.x_offset + v * x_pitch_;
      pass.dx = dx_target_ + planned.x_offset + v * x_pitch_;
      pass.weight = weight_.data() + planned.tap;
      pass.total = total + planned.tap * kLanes<T>;
      pass.accumulate = planned.accumulate || !first;
      pass.around = in_place_ && streamed_ && p_.multiplier == 1 && columns_ % kLanes<T> == 0 &&
                    reinterpret_cast<uintptr_t>(pass.dx) % sizeof(Vec<T>) == 0;
      if (planned.run != nullptr) {
        planned.run(pass);
      } else if (first) {
        for (int64_t k = 0; k < pass.rows * pass.columns; ++k) pass.dx[k] = T(0);
      }
    }
  }

  // The rows of dx that were taken, finished.
  void give_rows(S* grad_x, int64_t u, int64_t rows) {
    const int64_t begin = u * p_.stride_h, end = least((u + rows) * p_.stride_h, p_.in_h);
    const int64_t count = (end - begin) * p_.in_w;
    S* to = streamed_ ? merged_.data() : grad_x + begin * p_.in_w;
    for (int64_t i = begin; i < end; ++i) {
      merge_row(dx_.data() + row_offset(i, u), to + (i - begin) * p_.in_w, to + count);
    }
    if (streamed_) stream(grad_x + begin * p_.in_w, to, count);
  }

  void add_passes(int64_t g, int64_t f, const LatticeTaps& rows, const LatticeTaps& columns) {
    PlannedPass planned{};
    planned.x_offset = (g * p_.stride_w + f) * lattice_size_;
    planned.pass.x_pitch = x_pitch_;
    planned.pass.dy_pitch = dy_pitch_;
    planned.pass.dy_row_step = rows.shift * dy_pitch_;
    planned.pass.dy_column_step = columns.shift;
    planned.pass.weight_row_step = -rows.step * p_.kernel_w;
    planned.pass.weight_column_step = -columns.step;
    if (rows.count * columns.count == 0) passes_[pass_count_++] = planned;
    for (int64_t a = 0; rows.count * columns.count > 0 && a < rows.count;) {
      const int64_t widest = least(columns.count, kMaxTapColumns);
      const int64_t tap_rows = least(rows.count - a, most(1, least(kMaxTapRows, kMaxTaps / widest)));
      for (int64_t b = 0; b < columns.count; b += kMaxTapColumns) {
        const int64_t tap_columns = least(columns.count - b, kMaxTapColumns);
        planned.run = pass_of<T>(tap_rows, tap_columns);
        planned.tap = (rows.last - a * rows.step) * p_.kernel_w + columns.last - b * columns.step;
        planned.dy_offset =
            (top_ + rows.first_dy + a * rows.shift) * dy_pitch_ + left_ + columns.first_dy + b * columns.shift;
        passes_[pass_count_++] = planned;
        planned.accumulate = true;
      }
      a += tap_rows;
    }
  }

  // dy into the padded scratch, whose borders stay zero.
  void take_dy(const S* grad_y, T* bias_total) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < p_.out_h; ++i) {
      Vec<T> row = {};
      const S* from = grad_y + i * p_.out_w;
      T* to = dy_.data() + (top_ + i) * dy_pitch_ + left_;
      for (int64_t j = 0; j < p_.out_w; j += kLanes<T>) {
        const Vec<T> v = load_lanes(from + j, p_.out_w - j);
        row += v;
        store(to + j, v);  // zeros beyond the row
      }
      sum += row;
    }
    if (bias_total != nullptr) store(bias_total, load(bias_total) + sum);
  }

  // A row of x, its columns sorted by their remainder modulo stride_w. Whole vectors put zeros behind each part.
  void sort_row(const S* from, T* to) const {
    if (p_.stride_w == 1) {
      for (int64_t j = 0; j < p_.in_w; j += kLanes<T>) store(to + j, load_lanes(from + j, p_.in_w - j));
    } else if (p_.stride_w == 2) {
      for (int64_t j = 0; j < p_.in_w; j += 2 * kLanes<T>) {
        const int64_t left = p_.in_w - j;
        const Vec<T> a = load_lanes(from + j, left);
        const Vec<T> b = left > kLanes<T> ? load_lanes(from + j + kLanes<T>, left - kLanes<T>) : Vec<T>{};
        store(to + j / 2, permute<T, EvenLanes>(a, b));
        store(to + lattice_size_ + j / 2, permute<T, OddLanes>(a, b));
      }
    } else {
      for (int64_t f = 0; f < p_.stride_w; ++f) {
        T* part = to + f * lattice_size_;
        for (int64_t j = f; j < p_.in_w; j += p_.stride_w) *part++ = load_one(from + j);
      }
    }
  }

  // The reverse.
  void merge_row(const T* from, S* to, const S* end) const {
    if (p_.stride_w == 1) {
      for (int64_t j = 0; j < p_.in_w; j += kLanes<T>) store_ahead(to + j, load(from + j), p_.in_w - j, end);
    } else if (p_.stride_w == 2) {
      for (int64_t j = 0; j < p_.in_w; j += 2 * kLanes<T>) {
        const Vec<T> even = load(from + j / 2), odd = load(from + lattice_size_ + j / 2);
        store_ahead(to + j, permute<T, LowerInterleaved>(even, odd), p_.in_w - j, end);
        if (j + kLanes<T> >= p_.in_w) break;
        store_ahead(to + j + kLanes<T>, permute<T, UpperInterleaved>(even, odd), p_.in_w - j - kLanes<T>, end);
      }
    } else {
      for (int64_t f = 0; f < p_.stride_w; ++f) {
        const T* part = from + f * lattice_size_;
        for (int64_t j = f; j < p_.in_w; j += p_.stride_w) store_one(to + j, *part++);
      }
    }
  }

  const GroupedProblem& p_;
  const bool in_place_;  // x and dx need no scratch: one pass does everything
  const bool streamed_;  // dx is written around the cache
  // Rows and columns of one lattice, of the zeros before dy, and of the padded dy. The zeros behind a row of dy are
  // those before the next one.
  const int64_t top_, left_, rows_, columns_, dy_rows_, dy_pitch_;
  // In scratch, x is zero behind each row and dx is not looked at there. Where x can have the pitch of dy without
  // more vectors, the rows of a lattice are one long row.
  const bool flat_;
  const int64_t x_pitch_;
  const int64_t strip_;  // rows of a lattice between two passes
  const int64_t held_;   // rows of a lattice in the scratch: a strip, or all where several planes of dy meet them
  const int64_t lattice_size_;
  Scratch<T> x_, dx_;
  Scratch<S> merged_;  // dx, before it is streamed
  Scratch<T> dy_, weight_;

  Scratch<PlannedPass> passes_;
  int64_t pass_count_ = 0;
  const T* x_source_ = nullptr;
  T* dx_target_ = nullptr;
  const S *next_x_ = nullptr, *next_dy_ = nullptr;  // to be fetched, so many elements a pass
  int64_t next_x_count_ = 0, next_dy_count_ = 0;
};

}  // namespace
}  // namespace refconv::cpu::REFCONV_ISA
