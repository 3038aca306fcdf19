// Backward of the depthwise convolution on NCHW planes: dx, dW and dbias in one pass.
//
// Equations: csrc/problem.h. Ownership: one input channel per task, over the whole batch, so that dW and dbias are
// private to it and summed in a fixed order: the result is the same for any number of threads.
// Bytes: reads x and dy once, writes dx once.
// Accumulation: dx in the compute type; dW and dbias in lanes of it, row by row and strip by strip within a plane, and
// in double over the planes of about a thousand terms.
//
// Every pixel of x meets, for each tap, one pixel of dy: dx gains weight * dy and dW[tap] gains x * dy. With dy in
// zero-padded scratch, one load of dy serves both. For a stride s, the pixels of x with equal remainders modulo s
// (a lattice) share their taps and shifts, and along the lattice dy advances pixel by pixel: stride 1 and any other
// stride and dilation are the same loops. A pass holds as many taps in registers as fit.
#include "depthwise_pass.h"
#include "elements.h"
#include "entry_points.h"
#include "lattice.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kTotalsBytes = 32768;  // of running weight gradients per thread: the first cache
constexpr int64_t kStripBytes = 24576;   // of x, dx and dy between two passes: the first cache
constexpr int64_t kTermsInLanes = 1024;  // added up in one lane before they move on to a double

// The backward of one call: scratch planes, where things lie in them, and the passes over a plane.
template <typename S>
class Backward {
  using T = Compute<S>;

 public:
  explicit Backward(const DepthwiseProblem& p)
      : p_(p),
        in_place_(p.stride_w == 1 && p.stride_h == 1 && p.taps() <= kMaxTaps && p.kernel_h <= kMaxTapRows &&
                  sizeof(S) == sizeof(T)),
        streamed_(streams(p.batch * p.channels * p.in_size() * static_cast<int64_t>(sizeof(S)))),
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
        lattice_size_(rows_ * x_pitch_ + kSlack),
        x_(in_place_ ? 0 : p.stride_h * p.stride_w * lattice_size_),
        dx_(in_place_ ? 0 : p.stride_h * p.stride_w * lattice_size_),
        plane_(!in_place_ && streamed_ ? p.in_size() : 0),
        dy_((dy_rows_ + 1) * dy_pitch_ + left_ + kSlack),
        weight_(p.taps()),
        passes_(p.taps() + p.stride_h * p.stride_w) {
    for (int64_t g = 0; g < p.stride_h; ++g) {
      const LatticeTaps rows = lattice_taps(g, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
      for (int64_t f = 0; f < p.stride_w; ++f) {
        add_passes(g, f, rows, lattice_taps(f, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w));
      }
    }
    const int64_t row_bytes = (2 * p.stride_h * p.stride_w * x_pitch_ + dy_pitch_) * static_cast<int64_t>(sizeof(T));
    strip_ = least(rows_, most(4, kStripBytes / row_bytes));
  }

  // Terms that one call of run_plane adds to a lane of dW at most.
  int64_t terms() const { return rows_ * ceil_div(x_pitch_, kLanes<T>); }

  // Next plane of x. It must stay where it is until the last run_plane for it.
  void set_input(const S* x, S* grad_x) {
    if constexpr (sizeof(S) == sizeof(T)) {
      if (in_place_) {
        x_source_ = x, dx_target_ = grad_x;
        return;
      }
    }
    for (int64_t i = 0; i < p_.in_h; ++i) sort_row(x + i * p_.in_w, x_.data() + row_offset(i));
    x_source_ = x_.data(), dx_target_ = dx_.data();
  }

  // One plane of dy: adds to `total` [taps, lanes] and, if wanted, to `bias_total` [lanes]; dx is set at the first
  // of the planes that belong to one plane of x, added to at the others.
  void run_plane(const S* grad_y, const S* weight, bool first, T* total, T* bias_total) {
    copy_in(grad_y, bias_total);
    for (int64_t t = 0; t < p_.taps(); ++t) weight_[t] = load_one(weight + t);
    for (int64_t u = 0; u < rows_; u += strip_) {
      const int64_t rows = least(strip_, rows_ - u);
      for (int64_t n = 0; n < pass_count_; ++n) {
        const PlannedPass& planned = passes_[n];
        Pass<T> pass = planned.pass;
        pass.rows = flat_ ? 1 : rows;
        pass.columns = flat_ ? rows * x_pitch_ : x_pitch_;
        pass.dy = dy_.data() + planned.dy_offset + u * dy_pitch_;
        pass.x = x_source_ + planned.x_offset + u * x_pitch_;
        pass.dx = dx_target_ + planned.x_offset + u * x_pitch_;
        pass.weight = weight_.data() + planned.tap;
        pass.total = total + planned.tap * kLanes<T>;
        pass.accumulate = planned.accumulate || !first;
        pass.around = in_place_ && streamed_ && p_.multiplier == 1 && columns_ % kLanes<T> == 0 &&
                      reinterpret_cast<uintptr_t>(pass.dx) % sizeof(Vec<T>) == 0;
        if (planned.run != nullptr) {
          planned.run(pass);
        } else if (first) {
          for (int64_t v = 0; v < pass.rows * pass.columns; ++v) pass.dx[v] = T(0);
        }
      }
    }
  }

  // After the last run_plane for a plane of x.
  void finish(S* grad_x) {
    if (in_place_) return;
    S* to = streamed_ ? plane_.data() : grad_x;
    for (int64_t i = 0; i < p_.in_h; ++i) {
      merge_row(dx_.data() + row_offset(i), to + i * p_.in_w, to + p_.in_size());
    }
    if (streamed_) stream(grad_x, to, p_.in_size());
  }

 private:
  static constexpr int64_t kSlack = 2 * kLanes<T>;  // behind the last row, for whole vectors

  struct PlannedPass {
    Pass<T> pass;
    RunPass<T> run;  // null: no tap reaches this lattice
    int64_t x_offset, dy_offset, tap;
    bool accumulate;
  };

  // Where row i of x begins in the scratch; the lattices of its columns follow at distance lattice_size_.
  int64_t row_offset(int64_t i) const {
    return i % p_.stride_h * p_.stride_w * lattice_size_ + i / p_.stride_h * x_pitch_;
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
  void copy_in(const S* grad_y, T* bias_total) {
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
      for (int64_t j = 0; j < p_.in_w; ++j) to[j % p_.stride_w * lattice_size_ + j / p_.stride_w] = load_one(from + j);
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
      for (int64_t j = 0; j < p_.in_w; ++j) {
        store_one(to + j, from[j % p_.stride_w * lattice_size_ + j / p_.stride_w]);
      }
    }
  }

  const DepthwiseProblem& p_;
  const bool in_place_;  // x and dx need no scratch: one pass does everything
  const bool streamed_;  // dx is written around the cache
  // Rows and columns of one lattice, of the zeros before dy, and of the padded dy. The zeros behind a row of dy are
  // those before the next one.
  const int64_t top_, left_, rows_, columns_, dy_rows_, dy_pitch_;
  // In scratch, x is zero behind each row and dx is not looked at there. Where x can have the pitch of dy without
  // more vectors, the rows of a lattice are one long row.
  const bool flat_;
  const int64_t x_pitch_, lattice_size_;
  Scratch<T> x_, dx_;
  Scratch<S> plane_;  // of dx, before it is streamed
  Scratch<T> dy_, weight_;

  Scratch<PlannedPass> passes_;
  int64_t pass_count_ = 0, strip_ = 0;
  const T* x_source_ = nullptr;
  T* dx_target_ = nullptr;
};

// dW of one output channel by the definition. The fast passes multiply padding by zero instead of leaving it out, so
// an infinite x makes NaN of taps that never see it; such a channel is computed again.
template <typename S>
void exact_weight_gradient(const DepthwiseProblem& p, const S* grad_y, const S* x, int64_t out_channel, S* grad) {
  for (int64_t a = 0; a < p.kernel_h; ++a) {
    for (int64_t b = 0; b < p.kernel_w; ++b) {
      double total = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        const S* source = x + (n * p.channels + out_channel / p.multiplier) * p.in_size();
        const S* dy = grad_y + (n * p.out_channels() + out_channel) * p.out_size();
        for (int64_t i = 0; i < p.out_h; ++i) {
          const int64_t h = i * p.stride_h - p.pad_h + a * p.dilation_h;
          if (h < 0 || h >= p.in_h) continue;
          for (int64_t j = 0; j < p.out_w; ++j) {
            const int64_t w = j * p.stride_w - p.pad_w + b * p.dilation_w;
            if (w < 0 || w >= p.in_w) continue;
            total += static_cast<double>(load_one(dy + i * p.out_w + j)) * load_one(source + h * p.in_w + w);
          }
        }
      }
      store_one(grad + a * p.kernel_w + b, static_cast<Compute<S>>(total));
    }
  }
}

bool is_finite(double value) { return value - value == 0; }

}  // namespace

template <typename S>
void depthwise_backward(const DepthwiseProblem& p, const S* grad_y, const S* x, const S* weight, S* grad_x,
                        S* grad_weight, S* grad_bias, int64_t begin, int64_t end) {
  using T = Compute<S>;
  constexpr int64_t kLane = kLanes<T>;
  Backward<S> backward(p);
  // A block of channels at a time: the planes of neighbouring channels lie side by side in memory, those of one
  // channel do not. Per output channel: its taps, then its bias.
  const int64_t totals = (p.taps() + 1) * kLane, per_channel = p.multiplier * totals;
  const int64_t fitting = kTotalsBytes / (per_channel * static_cast<int64_t>(sizeof(T) + sizeof(double)));
  const int64_t block = most(1, least(fitting, end - begin));
  Scratch<T> lanes(block * per_channel);
  Scratch<double> total(block * per_channel);
  Scratch<S> unwanted(grad_x == nullptr ? p.in_size() : 0);  // where dx goes when nobody wants it

  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = least(block, end - first);
    total.clear();
    int64_t terms = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      for (int64_t c = 0; c < count; ++c) {
        const int64_t plane = n * p.channels + first + c;
        S* dx = grad_x != nullptr ? grad_x + plane * p.in_size() : unwanted.data();
        backward.set_input(x + plane * p.in_size(), dx);
        for (int64_t m = 0; m < p.multiplier; ++m) {
          T* sums = lanes.data() + c * per_channel + m * totals;
          backward.run_plane(grad_y + (plane * p.multiplier + m) * p.out_size(),
                             weight + ((first + c) * p.multiplier + m) * p.taps(), m == 0, sums,
                             grad_bias != nullptr ? sums + p.taps() * kLane : nullptr);
        }
        backward.finish(dx);
      }
      terms += backward.terms();
      if (terms < kTermsInLanes && n + 1 < p.batch) continue;
      terms = 0;
      for (int64_t k = 0; k < count * per_channel; ++k) total[k] += static_cast<double>(lanes[k]);
      lanes.clear();
    }
    for (int64_t k = 0; k < count * p.multiplier; ++k) {
      const int64_t out_channel = first * p.multiplier + k;
      const auto sum_of = [&](int64_t tap) {
        double sum = 0;
        for (int64_t lane = 0; lane < kLane; ++lane) sum += total[k * totals + tap * kLane + lane];
        return sum;
      };
      if (grad_bias != nullptr) store_one(grad_bias + out_channel, static_cast<T>(sum_of(p.taps())));
      if (grad_weight == nullptr) continue;
      bool finite = true;
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        const double sum = sum_of(tap);
        finite = finite && is_finite(sum);
        store_one(grad_weight + out_channel * p.taps() + tap, static_cast<T>(sum));
      }
      if (!finite) exact_weight_gradient(p, grad_y, x, out_channel, grad_weight + out_channel * p.taps());
    }
  }
  end_streams();
}

REFCONV_INSTANTIATE_DEPTHWISE_BACKWARD(float)
REFCONV_INSTANTIATE_DEPTHWISE_BACKWARD(double)
REFCONV_INSTANTIATE_DEPTHWISE_BACKWARD(BFloat16)
REFCONV_INSTANTIATE_DEPTHWISE_BACKWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
