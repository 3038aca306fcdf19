// Depthwise convolution on dense NCHW planes, forward and fused backward.
//
// Equations: csrc/problem.h. Ownership: forward, one output plane per task; backward, one input channel per
// task, over the whole batch, so that dW and dbias are private to it and summed in a fixed order: the result
// is the same for any number of threads.
// Bytes: forward reads x and writes y once; backward reads x and dy once and writes dx once.
// Accumulation: y and dx in T; dW and dbias in T within a plane, in double across planes.
//
// A plane is first copied into zero-padded scratch (plane.h). Square kernels of 3, 5 and 7 with vertical stride
// 1 or 2 and no vertical dilation compute four output rows at once, so that a loaded vector serves several.
#include "entry_points.h"
#include "plane.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kTotalsBytes = 32768;  // of running weight gradients per thread: the first cache

// --- one output plane from the padded input plane ---

// ROWS vectors of output, in a column, for a square kernel K, stride_h S and dilation_h 1. `from` is the first
// one's window. Every vector of input is loaded once for all the outputs that it belongs to.
template <typename T, int K, int S, int ROWS>
inline void correlate_block(const T* from, int64_t row_pitch, const int64_t* offsets, const T* weight, Vec<T>* acc) {
#pragma GCC unroll 16
  for (int r = 0; r < (ROWS - 1) * S + K; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < K; ++b) {
      const Vec<T> x = load(from + r * row_pitch + offsets[b]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const int a = r - i * S;
        if (a >= 0 && a < K) acc[i] += weight[a * K + b] * x;
      }
    }
  }
}

// Writes `acc` to columns [j, j + left) of a row. What a whole vector writes beyond them falls on the row
// below; rows are written top down and columns right to left, so that it is overwritten afterwards.
template <typename T>
inline void put(T* to, Vec<T> acc, int64_t left, bool accumulate, const T* end) {
  if (left >= kLanes<T>) {
    store<T>(to, accumulate ? acc + load(to) : acc);
  } else if (accumulate) {
    store_partial<T>(to, acc + load_partial(to, left), left);
  } else if (end - to >= kLanes<T>) {
    store(to, acc);
  } else {
    store_partial(to, acc, left);
  }
}

inline int64_t last_column(int64_t width, int64_t lanes) { return (width - 1) / lanes * lanes; }

template <typename T, int K, int S, int ROWS>
int64_t correlate_rows(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch,
                       const T* weight, T start, bool accumulate, T* y, int64_t i) {
  const T* end = y + p.out_h * p.out_w;
  for (; i + ROWS <= p.out_h; i += ROWS) {
    for (int64_t j = last_column(p.out_w, kLanes<T>); j >= 0; j -= kLanes<T>) {
      Vec<T> acc[ROWS];
      for (int n = 0; n < ROWS; ++n) acc[n] = broadcast<T>(start);
      const T* from = scratch + i * plane.row_step() + j;
      correlate_block<T, K, S, ROWS>(from, plane.row_pitch(), offsets, weight, acc);
      for (int n = 0; n < ROWS; ++n) put<T>(y + (i + n) * p.out_w + j, acc[n], p.out_w - j, accumulate, end);
    }
  }
  return i;
}

template <typename T, int K, int S>
void correlate(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch, const T* weight,
               T start, bool accumulate, T* y) {
  int64_t i = 0;
  i = correlate_rows<T, K, S, 4>(p, plane, offsets, scratch, weight, start, accumulate, y, i);
  i = correlate_rows<T, K, S, 2>(p, plane, offsets, scratch, weight, start, accumulate, y, i);
  correlate_rows<T, K, S, 1>(p, plane, offsets, scratch, weight, start, accumulate, y, i);
}

// Any kernel size, stride and dilation.
template <typename T>
void correlate_any(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch,
                   const T* weight, T start, bool accumulate, T* y) {
  const T* end = y + p.out_h * p.out_w;
  for (int64_t i = 0; i < p.out_h; ++i) {
    for (int64_t j = last_column(p.out_w, kLanes<T>); j >= 0; j -= kLanes<T>) {
      const T* from = scratch + i * plane.row_step() + j;
      Vec<T> acc = broadcast<T>(start);
      for (int64_t tap = 0; tap < p.taps(); ++tap) acc += weight[tap] * load(from + offsets[tap]);
      put<T>(y + i * p.out_w + j, acc, p.out_w - j, accumulate, end);
    }
  }
}

// --- dW of one plane, added lane by lane to `total` [taps, lanes], from the padded x and dy ---

// The taps of TAP_ROWS rows of a square kernel K, from the tap row at `from` and `offsets` on, for ROWS vectors
// of dy in a column. Lanes from `left` on hold pixels of other taps: 0 * infinity must not reach this one.
template <typename T, int K, int S, int TAP_ROWS, int ROWS>
inline void weight_gradient_block(const T* from, int64_t row_pitch, const int64_t* offsets, const Vec<T>* dy,
                                  int64_t left, Vec<T>* acc) {
#pragma GCC unroll 16
  for (int r = 0; r < (ROWS - 1) * S + TAP_ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < K; ++b) {
      const Vec<T> x = keep<T>(load(from + r * row_pitch + offsets[b]), left);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const int a = r - i * S;
        if (a >= 0 && a < TAP_ROWS) acc[a * K + b] += dy[i] * x;
      }
    }
  }
}

template <typename T, int K, int S, int TAP_ROWS, int ROWS>
inline int64_t weight_gradient_rows(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets,
                                    const T* scratch, const T* grad_y, Vec<T>* acc, int64_t i) {
  const T* end = grad_y + p.out_h * p.out_w;
  for (; i + ROWS <= p.out_h; i += ROWS) {
    for (int64_t j = 0; j < p.out_w; j += kLanes<T>) {
      const int64_t left = p.out_w - j;
      const T* row = grad_y + i * p.out_w + j;
      const T* from = scratch + i * plane.row_step() + j;
      Vec<T> dy[ROWS];
      if (left >= kLanes<T>) {
        for (int n = 0; n < ROWS; ++n) dy[n] = load(row + n * p.out_w);
        weight_gradient_block<T, K, S, TAP_ROWS, ROWS>(from, plane.row_pitch(), offsets, dy, kLanes<T>, acc);
      } else {
        for (int n = 0; n < ROWS; ++n) dy[n] = load_tail(row + n * p.out_w, left, end);
        weight_gradient_block<T, K, S, TAP_ROWS, ROWS>(from, plane.row_pitch(), offsets, dy, left, acc);
      }
    }
  }
  return i;
}

template <typename T, int K, int S, int TAP_ROWS>
inline void weight_gradient_pass(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets,
                                 const T* scratch, const T* grad_y, double* total) {
  Vec<T> acc[TAP_ROWS * K] = {};
  int64_t i = 0;
  i = weight_gradient_rows<T, K, S, TAP_ROWS, 4>(p, plane, offsets, scratch, grad_y, acc, i);
  weight_gradient_rows<T, K, S, TAP_ROWS, 1>(p, plane, offsets, scratch, grad_y, acc, i);
  for (int tap = 0; tap < TAP_ROWS * K; ++tap) add_lanes<T>(acc[tap], total + tap * kLanes<T>);
}

template <typename T, int K, int S>
void weight_gradient(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch,
                     const T* grad_y, double* total) {
  // As many rows of taps in registers as fit beside four vectors of dy and one of x.
  constexpr int kRegisters = REFCONV_VECTOR_BYTES == 64 ? 32 : 16;
  constexpr int kFit = (kRegisters - 6) / K;
  constexpr int kTapRows = kFit < 1 ? 1 : kFit < K ? kFit : K;
  int a = 0;
  for (; a + kTapRows <= K; a += kTapRows) {
    weight_gradient_pass<T, K, S, kTapRows>(p, plane, offsets, scratch + a * plane.row_pitch(), grad_y,
                                            total + a * K * kLanes<T>);
  }
  constexpr int kRest = K % kTapRows;
  if constexpr (kRest > 0) {
    weight_gradient_pass<T, K, S, kRest>(p, plane, offsets, scratch + a * plane.row_pitch(), grad_y,
                                         total + a * K * kLanes<T>);
  }
}

// Any kernel size, stride and dilation.
template <typename T>
void weight_gradient_any(const DepthwiseProblem& p, const Plane& plane, const int64_t* offsets, const T* scratch,
                         const T* grad_y, double* total) {
  constexpr int64_t kTaps = 8;  // held in registers during one pass over dy
  const T* end = grad_y + p.out_h * p.out_w;
  for (int64_t tap = 0; tap < p.taps(); tap += kTaps) {
    const int64_t count = p.taps() - tap < kTaps ? p.taps() - tap : kTaps;
    Vec<T> acc[kTaps] = {};
    for (int64_t i = 0; i < p.out_h; ++i) {
      for (int64_t j = 0; j < p.out_w; j += kLanes<T>) {
        const int64_t left = p.out_w - j;
        const T* row = grad_y + i * p.out_w + j;
        const T* from = scratch + i * plane.row_step() + j;
        const Vec<T> dy = left >= kLanes<T> ? load(row) : load_tail(row, left, end);
        for (int64_t n = 0; n < count; ++n) acc[n] += dy * keep<T>(load(from + offsets[tap + n]), left);
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
  decltype(&correlate_any<T>) correlate_plane = correlate_any<T>;
  decltype(&weight_gradient_any<T>) weight_gradient_plane = weight_gradient_any<T>;
};

template <typename T, int K>
Routines<T> square(const DepthwiseProblem& p) {
  if (p.stride_h == 1) return {correlate<T, K, 1>, weight_gradient<T, K, 1>};
  if (p.stride_h == 2) return {correlate<T, K, 2>, weight_gradient<T, K, 2>};
  return {};
}

template <typename T>
Routines<T> routines(const DepthwiseProblem& p) {
  if (p.kernel_h != p.kernel_w || p.dilation_h != 1) return {};
  if (p.kernel_h == 3) return square<T, 3>(p);
  if (p.kernel_h == 5) return square<T, 5>(p);
  if (p.kernel_h == 7) return square<T, 7>(p);
  return {};
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
  const Routines<T> run = routines<T>(p), run_back = routines<T>(back);
  const int64_t taps = p.taps(), in_size = p.in_h * p.in_w, out_size = p.out_h * p.out_w;
  // Totals are kept lane by lane, in double, for a block of channels: the planes of neighbouring channels lie
  // side by side in memory, those of one channel do not.
  const int64_t totals = p.multiplier * taps * kLanes<T>, bias_totals = p.multiplier * kLanes<T>;
  const int64_t fitting = kTotalsBytes / (totals * static_cast<int64_t>(sizeof(double)));
  const int64_t block = fitting < 1 ? 1 : fitting < end - begin ? fitting : end - begin;

  Scratch<T> x_scratch(grad_weight != nullptr ? plane.size() : 0);
  Scratch<T> grad_scratch(grad_x != nullptr ? back_plane.size() : 0);
  Scratch<T> turned(p.multiplier * taps);
  Scratch<double> weight_total(block * totals), bias_total(block * bias_totals);
  Scratch<int64_t> offsets(taps), back_offsets(taps);
  plane.tap_offsets(p, offsets.data());
  back_plane.tap_offsets(back, back_offsets.data());

  const auto add_plane = [&](int64_t n, int64_t channel, double* channel_totals, double* channel_bias_totals) {
    const int64_t in_plane = n * p.channels + channel;
    if (grad_weight != nullptr) {
      copy_in(plane, x + in_plane * in_size, p.in_h, p.in_w, p.pad_h, p.pad_w, x_scratch.data());
    }
    if (grad_x != nullptr && !unit_stride) grad_scratch.clear();
    for (int64_t m = 0; m < p.multiplier; ++m) {
      const int64_t out_channel = channel * p.multiplier + m;
      const T* dy = grad_y + (n * p.out_channels() + out_channel) * out_size;
      const T* kernel = weight + out_channel * taps;
      if (grad_weight != nullptr) {
        run.weight_gradient_plane(p, plane, offsets.data(), x_scratch.data(), dy,
                                  channel_totals + m * taps * kLanes<T>);
      }
      if (grad_bias != nullptr) bias_gradient(dy, out_size, channel_bias_totals + m * kLanes<T>);
      if (grad_x != nullptr && unit_stride) {
        for (int64_t tap = 0; tap < taps; ++tap) turned.data()[tap] = kernel[taps - 1 - tap];
        copy_in(back_plane, dy, p.out_h, p.out_w, back.pad_h, back.pad_w, grad_scratch.data());
        run_back.correlate_plane(back, back_plane, back_offsets.data(), grad_scratch.data(), turned.data(), T(0), m > 0,
                                 grad_x + in_plane * in_size);
      } else if (grad_x != nullptr) {
        scatter_input_gradient(p, plane, offsets.data(), dy, kernel, grad_scratch.data());
      }
    }
    if (grad_x != nullptr && !unit_stride) {
      copy_out(plane, grad_scratch.data(), p.in_h, p.in_w, p.pad_h, p.pad_w, grad_x + in_plane * in_size);
    }
  };

  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = block < end - first ? block : end - first;
    weight_total.clear();
    bias_total.clear();
    for (int64_t n = 0; n < p.batch; ++n) {
      for (int64_t c = 0; c < count; ++c) {
        add_plane(n, first + c, weight_total.data() + c * totals, bias_total.data() + c * bias_totals);
      }
    }
    const int64_t out_first = first * p.multiplier, out_count = count * p.multiplier;
    for (int64_t k = 0; grad_weight != nullptr && k < out_count * taps; ++k) {
      grad_weight[out_first * taps + k] = static_cast<T>(sum_lanes<T>(weight_total.data() + k * kLanes<T>));
    }
    for (int64_t k = 0; grad_bias != nullptr && k < out_count; ++k) {
      grad_bias[out_first + k] = static_cast<T>(sum_lanes<T>(bias_total.data() + k * kLanes<T>));
    }
  }
}

REFCONV_INSTANTIATE_DEPTHWISE(float)
REFCONV_INSTANTIATE_DEPTHWISE(double)

}  // namespace refconv::cpu::REFCONV_ISA
