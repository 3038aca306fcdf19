// Depthwise convolution on dense NCHW planes, forward and fused backward.
//
// Equations: csrc/problem.h. Ownership: forward, one output plane per task; backward, one input channel per
// task, over the whole batch, so that dW and dbias are private to it and summed in a fixed order: the result
// is the same for any number of threads.
// Bytes: forward reads x and writes y once; backward reads x and dy once and writes dx once.
// Accumulation: y and dx in T; dW and dbias in T within a plane, in double across planes.
//
// A plane is first copied into zero-padded scratch that stays in cache, with the columns of each row
// sorted by their remainder modulo stride_w. Every tap of every output row is then one contiguous,
// unaligned vector load, for any stride, dilation and padding.
#include "entry_points.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// The zero-padded plane. Row r, column q of the padded input lies at
// data[(r * stride_w + q % stride_w) * pitch + q / stride_w].
struct Plane {
  int64_t rows, columns, stride_h, stride_w, pitch;

  template <typename T>
  static Plane of(const DepthwiseProblem& p) {
    Plane plane;
    plane.rows = (p.out_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
    plane.columns = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    plane.stride_h = p.stride_h;
    plane.stride_w = p.stride_w;
    // A whole vector may be loaded at the last output column; the slack stays zero.
    const int64_t last = ((p.kernel_w - 1) * p.dilation_w) / p.stride_w + p.out_w;
    plane.pitch = round_up(last, kLanes<T>) + kLanes<T>;
    return plane;
  }

  int64_t size() const { return rows * stride_w * pitch; }
  // From one output row to the next.
  int64_t row_step() const { return stride_h * stride_w * pitch; }
  // Where output pixel (0, 0) finds each of its taps; output column j adds j.
  void tap_offsets(const DepthwiseProblem& p, int64_t* offsets) const {
    for (int64_t a = 0; a < p.kernel_h; ++a) {
      for (int64_t b = 0; b < p.kernel_w; ++b) {
        const int64_t q = b * p.dilation_w;
        offsets[a * p.kernel_w + b] = (a * p.dilation_h * stride_w + q % stride_w) * pitch + q / stride_w;
      }
    }
  }
};

// The columns [begin, end) of padded phase `phase` that lie inside the input, as indices within the phase.
struct PhaseRange {
  int64_t begin, end, first_source;
};

inline PhaseRange phase_range(const Plane& plane, int64_t in_w, int64_t pad_w, int64_t phase) {
  const int64_t s = plane.stride_w;
  int64_t begin = pad_w > phase ? (pad_w - phase + s - 1) / s : 0;
  const int64_t padded_end = plane.columns < in_w + pad_w ? plane.columns : in_w + pad_w;  // exclusive
  int64_t end = padded_end > phase ? (padded_end - phase + s - 1) / s : 0;
  if (end < begin) end = begin;
  return {begin, end, phase + begin * s - pad_w};
}

// The `count` elements at `from`, zero in the lanes beyond; nothing at or after `end` is read.
template <typename T>
inline Vec<T> load_tail(const T* from, int64_t count, const T* end) {
  return end - from >= kLanes<T> ? keep<T>(load(from), count) : load_partial(from, count);
}

// Padding may be negative: the plane then starts inside the source.
template <typename T>
void copy_in(const Plane& plane, const T* source, int64_t in_h, int64_t in_w, int64_t pad_h, int64_t pad_w,
             T* scratch) {
  const T* end = source + in_h * in_w;
  const int64_t first = pad_h > 0 ? pad_h : 0;  // rows before it, and from `last` on, stay zero
  const int64_t last = plane.rows < in_h + pad_h ? plane.rows : in_h + pad_h;
  for (int64_t phase = 0; phase < plane.stride_w; ++phase) {
    const PhaseRange range = phase_range(plane, in_w, pad_w, phase);
    const int64_t count = range.end - range.begin;
    if (count == 0) continue;
    for (int64_t r = first; r < last; ++r) {
      const T* from = source + (r - pad_h) * in_w + range.first_source;
      T* to = scratch + (r * plane.stride_w + phase) * plane.pitch + range.begin;
      if (plane.stride_w > 1) {
        for (int64_t c = 0; c < count; ++c) to[c] = from[c * plane.stride_w];
        continue;
      }
      int64_t c = 0;
      for (; c + kLanes<T> <= count; c += kLanes<T>) store(to + c, load(from + c));
      if (c < count) store(to + c, load_tail(from + c, count - c, end));  // zeros into the slack, which is zero
    }
  }
}

// The reverse, after scattering gradients into the scratch.
template <typename T>
void copy_out(const Plane& plane, const T* scratch, int64_t in_h, int64_t in_w, int64_t pad_h, int64_t pad_w,
              T* target) {
  __builtin_memset(target, 0, static_cast<size_t>(in_h * in_w) * sizeof(T));  // pixels that no window touches
  for (int64_t phase = 0; phase < plane.stride_w; ++phase) {
    const PhaseRange range = phase_range(plane, in_w, pad_w, phase);
    for (int64_t r = 0; r < plane.rows; ++r) {
      const int64_t row = r - pad_h;
      if (row < 0 || row >= in_h) continue;
      const T* from = scratch + (r * plane.stride_w + phase) * plane.pitch + range.begin;
      T* to = target + row * in_w + range.first_source;
      for (int64_t c = 0; c < range.end - range.begin; ++c) to[c * plane.stride_w] = from[c];
    }
  }
}

// One output plane from the padded input plane. KH, KW fix the kernel size at compile time; 0 reads it from p.
template <typename T, int KH, int KW>
void correlate(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch, const T* weight,
               T start, bool accumulate, T* y) {
  const int64_t taps = KH > 0 ? KH * KW : p.taps();
  const T* end = y + p.out_h * p.out_w;
  for (int64_t i = 0; i < p.out_h; ++i) {
    T* row = y + i * p.out_w;
    for (int64_t j = 0; j < p.out_w; j += kLanes<T>) {
      const T* from = scratch + i * plane.row_step() + j;
      Vec<T> acc = broadcast<T>(start);
      for (int64_t tap = 0; tap < taps; ++tap) acc += weight[tap] * load(from + offsets[tap]);
      const int64_t left = p.out_w - j;
      if (left >= kLanes<T>) {
        store<T>(row + j, accumulate ? acc + load(row + j) : acc);
      } else if (accumulate) {
        store_partial<T>(row + j, acc + load_partial(row + j, left), left);
      } else if (end - (row + j) >= kLanes<T>) {
        store(row + j, acc);  // the surplus falls on the next row, which is written after this one
      } else {
        store_partial(row + j, acc, left);
      }
    }
  }
}

// dW of one plane, added lane by lane to `total` [taps, lanes], from the padded x and dy.
template <typename T, int KH, int KW>
void weight_gradient(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch,
                     const T* grad_y, double* total) {
  const int64_t taps = KH > 0 ? KH * KW : p.taps();
  // Taps held in registers during one pass over dy: all of a 3 x 3 kernel, else a row of a known one.
  constexpr int64_t kTaps = KH * KW == 9 ? 9 : KW > 0 ? KW : 8;
  const T* end = grad_y + p.out_h * p.out_w;
  for (int64_t tap = 0; tap < taps; tap += kTaps) {
    const int64_t count = KH > 0 || taps - tap >= kTaps ? kTaps : taps - tap;
    Vec<T> acc[kTaps] = {};
    for (int64_t i = 0; i < p.out_h; ++i) {
      const T* row = grad_y + i * p.out_w;
      const T* from = scratch + i * plane.row_step();
      int64_t j = 0;
      for (; j + kLanes<T> <= p.out_w; j += kLanes<T>) {
        const Vec<T> dy = load(row + j);
        for (int64_t n = 0; n < count; ++n) acc[n] += dy * load(from + offsets[tap + n] + j);
      }
      if (const int64_t left = p.out_w - j; left > 0) {
        // Lanes past the row hold pixels of other taps: 0 * infinity must not reach this one.
        const Vec<T> dy = load_tail(row + j, left, end);
        for (int64_t n = 0; n < count; ++n) acc[n] += dy * keep<T>(load(from + offsets[tap + n] + j), left);
      }
    }
    for (int64_t n = 0; n < count; ++n) add_lanes<T>(acc[n], total + (tap + n) * kLanes<T>);
  }
}

template <typename T>
void bias_gradient(const T* grad_y, int64_t size, double* total) {
  Vec<T> acc = {};
  int64_t k = 0;
  for (; k + kLanes<T> <= size; k += kLanes<T>) acc += load(grad_y + k);
  acc += load_partial(grad_y + k, size - k);
  add_lanes<T>(acc, total);
}

// dx for any stride: every dy scattered through its taps into a padded plane.
template <typename T>
void scatter_input_gradient(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* grad_y,
                            const T* weight, T* scratch) {
  const T* end = grad_y + p.out_h * p.out_w;
  for (int64_t i = 0; i < p.out_h; ++i) {
    const T* row = grad_y + i * p.out_w;
    T* to_row = scratch + i * plane.row_step();
    for (int64_t j = 0; j < p.out_w; j += kLanes<T>) {
      const int64_t left = p.out_w - j;
      const Vec<T> dy = left >= kLanes<T> ? load(row + j) : load_tail(row + j, left, end);
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        T* to = to_row + offsets[tap] + j;
        store<T>(to, load(to) + keep<T>(weight[tap] * dy, left));
      }
    }
  }
}

template <typename T>
struct Routines {
  decltype(&correlate<T, 0, 0>) correlate_plane;
  decltype(&weight_gradient<T, 0, 0>) weight_gradient_plane;
};

template <typename T>
Routines<T> routines(const DepthwiseProblem& p) {
  if (p.kernel_h == 3 && p.kernel_w == 3) return {correlate<T, 3, 3>, weight_gradient<T, 3, 3>};
  if (p.kernel_h == 5 && p.kernel_w == 5) return {correlate<T, 5, 5>, weight_gradient<T, 5, 5>};
  if (p.kernel_h == 7 && p.kernel_w == 7) return {correlate<T, 7, 7>, weight_gradient<T, 7, 7>};
  return {correlate<T, 0, 0>, weight_gradient<T, 0, 0>};
}

// With stride 1, dx is itself a depthwise convolution: of dy, with the kernel turned by 180 degrees.
DepthwiseProblem transposed(const DepthwiseProblem& p) {
  DepthwiseProblem t = p;
  t.in_h = p.out_h, t.in_w = p.out_w, t.out_h = p.in_h, t.out_w = p.in_w;
  t.pad_h = (p.kernel_h - 1) * p.dilation_h - p.pad_h;
  t.pad_w = (p.kernel_w - 1) * p.dilation_w - p.pad_w;
  return t;
}

}  // namespace

template <typename T>
void depthwise_forward(const DepthwiseProblem& p, const T* x, const T* weight, const T* bias, T* y, int64_t begin,
                       int64_t end) {
  const Plane plane = Plane::of<T>(p);
  const Routines<T> run = routines<T>(p);
  Scratch<T> scratch(plane.size());
  Scratch<int64_t> offsets(p.taps());
  plane.tap_offsets(p, offsets.data());
  int64_t held = -1;  // input plane now in the scratch: output planes of one input plane follow each other
  for (int64_t task = begin; task < end; ++task) {
    const int64_t out_channel = task % p.out_channels();
    const int64_t source = task / p.out_channels() * p.channels + out_channel / p.multiplier;
    if (source != held) {
      copy_in(plane, x + source * p.in_h * p.in_w, p.in_h, p.in_w, p.pad_h, p.pad_w, scratch.data());
      held = source;
    }
    run.correlate_plane(p, plane, offsets.data(), scratch.data(), weight + out_channel * p.taps(),
                        bias != nullptr ? bias[out_channel] : T(0), false, y + task * p.out_h * p.out_w);
  }
}

template <typename T>
void depthwise_backward(const DepthwiseProblem& p, const T* grad_y, const T* x, const T* weight, T* grad_x,
                        T* grad_weight, T* grad_bias, int64_t begin, int64_t end) {
  const bool unit_stride = p.stride_h == 1 && p.stride_w == 1;
  const Plane plane = Plane::of<T>(p);
  const DepthwiseProblem back = transposed(p);
  const Plane back_plane = unit_stride ? Plane::of<T>(back) : plane;
  const Routines<T> run = routines<T>(p);
  const int64_t taps = p.taps(), in_size = p.in_h * p.in_w, out_size = p.out_h * p.out_w;

  Scratch<T> x_scratch(grad_weight != nullptr ? plane.size() : 0);
  Scratch<T> grad_scratch(grad_x != nullptr ? back_plane.size() : 0);
  Scratch<T> turned(p.multiplier * taps);
  Scratch<double> weight_total(p.multiplier * taps * kLanes<T>);  // lanes are added up at the very end
  Scratch<double> bias_total(p.multiplier * kLanes<T>);
  Scratch<int64_t> offsets(taps), back_offsets(taps);
  plane.tap_offsets(p, offsets.data());
  back_plane.tap_offsets(back, back_offsets.data());

  for (int64_t channel = begin; channel < end; ++channel) {
    const T* channel_weight = weight + channel * p.multiplier * taps;
    for (int64_t m = 0; m < p.multiplier; ++m) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        turned.data()[m * taps + tap] = channel_weight[m * taps + taps - 1 - tap];
      }
    }
    weight_total.clear();
    bias_total.clear();
    for (int64_t n = 0; n < p.batch; ++n) {
      const int64_t in_plane = n * p.channels + channel;
      if (grad_weight != nullptr) {
        copy_in(plane, x + in_plane * in_size, p.in_h, p.in_w, p.pad_h, p.pad_w, x_scratch.data());
      }
      if (grad_x != nullptr && !unit_stride) grad_scratch.clear();
      for (int64_t m = 0; m < p.multiplier; ++m) {
        const T* dy = grad_y + (n * p.out_channels() + channel * p.multiplier + m) * out_size;
        if (grad_weight != nullptr) {
          run.weight_gradient_plane(p, plane, offsets.data(), x_scratch.data(), dy,
                                    weight_total.data() + m * taps * kLanes<T>);
        }
        if (grad_bias != nullptr) bias_gradient(dy, out_size, bias_total.data() + m * kLanes<T>);
        if (grad_x != nullptr && unit_stride) {
          copy_in(back_plane, dy, p.out_h, p.out_w, back.pad_h, back.pad_w, grad_scratch.data());
          run.correlate_plane(back, back_plane, back_offsets.data(), grad_scratch.data(), turned.data() + m * taps,
                              T(0), m > 0, grad_x + in_plane * in_size);
        } else if (grad_x != nullptr) {
          scatter_input_gradient(p, plane, offsets.data(), dy, channel_weight + m * taps, grad_scratch.data());
        }
      }
      if (grad_x != nullptr && !unit_stride) {
        copy_out(plane, grad_scratch.data(), p.in_h, p.in_w, p.pad_h, p.pad_w, grad_x + in_plane * in_size);
      }
    }
    for (int64_t m = 0; m < p.multiplier; ++m) {
      const int64_t out_channel = channel * p.multiplier + m;
      if (grad_bias != nullptr) {
        grad_bias[out_channel] = static_cast<T>(sum_lanes<T>(bias_total.data() + m * kLanes<T>));
      }
      for (int64_t tap = 0; grad_weight != nullptr && tap < taps; ++tap) {
        const double total = sum_lanes<T>(weight_total.data() + (m * taps + tap) * kLanes<T>);
        grad_weight[out_channel * taps + tap] = static_cast<T>(total);
      }
    }
  }
}

REFCONV_INSTANTIATE_DEPTHWISE(float)
REFCONV_INSTANTIATE_DEPTHWISE(double)

}  // namespace refconv::cpu::REFCONV_ISA
