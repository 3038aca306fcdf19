// Forward of a convolution with few channels per group, or one (depthwise), on NCHW planes.
//
// Equations: csrc/problem.h. Ownership: one output plane per task. Bytes: reads x and writes y once.
// Accumulation: in the compute type, in the order of the taps.
//
// A plane (of a group: each of its input planes) is first copied into zero-padded scratch that stays in cache, the
// columns of each row sorted by their remainder modulo stride_w: every tap of every output row is then one contiguous
// vector load, for any stride, dilation and padding. Square kernels of 3, 5 and 7 with vertical stride 1 or 2 and no
// vertical dilation compute a block of output rows and columns at once, so that a loaded vector and a loaded weight
// serve several outputs.
#include "elements.h"
#include "entry_points.h"
#include "planes_3x3.h"
#include "scratch.h"
#include "simd.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int kMostPerGroup = 16;  // input channels of a group whose weights are spread over vectors beforehand

// The padded plane. Row r, column q of the padded input lies at
// data[(r * stride_w + q % stride_w) * pitch + q / stride_w].
struct Plane {
  int64_t rows, columns, stride_h, stride_w, pitch;

  template <typename T>
  static Plane of(const GroupedProblem& p) {
    Plane plane{};
    plane.rows = (p.out_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
    plane.columns = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    plane.stride_h = p.stride_h;
    plane.stride_w = p.stride_w;
    // Whole vectors are loaded at the last output columns, and stored at the last input ones; the slack stays zero.
    const int64_t last = ((p.kernel_w - 1) * p.dilation_w) / p.stride_w + p.out_w;
    plane.pitch = round_up(last, kLanes<T>) + kLanes<T>;
    return plane;
  }

  int64_t size() const { return rows * stride_w * pitch; }
  int64_t row_pitch() const { return stride_w * pitch; }
  // From one output row to the next.
  int64_t row_step() const { return stride_h * row_pitch(); }
  // Where output pixel (0, 0) finds each of its taps; output column j adds j.
  void tap_offsets(const GroupedProblem& p, int64_t* offsets) const {
    for (int64_t a = 0; a < p.kernel_h; ++a) {
      for (int64_t b = 0; b < p.kernel_w; ++b) {
        const int64_t q = b * p.dilation_w;
        offsets[a * p.kernel_w + b] = (a * p.dilation_h * stride_w + q % stride_w) * pitch + q / stride_w;
      }
    }
  }
};

template <typename S>
void copy_in(const Plane& plane, const GroupedProblem& p, const S* source, Compute<S>* scratch) {
  using T = Compute<S>;
  const int64_t s = plane.stride_w, width = least(p.in_w, plane.columns - p.pad_w);  // columns that some window sees
  const int64_t last = least(plane.rows, p.in_h + p.pad_h);  // rows before pad_h and from here on stay zero
  const auto place = [&](int64_t column) { return (column + p.pad_w) % s * plane.pitch + (column + p.pad_w) / s; };
  for (int64_t r = p.pad_h; width > 0 && r < last; ++r) {
    const S* from = source + (r - p.pad_h) * p.in_w;
    T* to = scratch + r * plane.row_pitch();
    if (s == 1) {
      for (int64_t c = 0; c < width; c += kLanes<T>) store(to + p.pad_w + c, load_lanes(from + c, width - c));
    } else if (s == 2) {
      T *first = to + place(0), *second = to + place(1);
      for (int64_t c = 0; c < width; c += 2 * kLanes<T>) {
        const int64_t left = width - c;
        const Vec<T> a = load_lanes(from + c, left);
        const Vec<T> b = left > kLanes<T> ? load_lanes(from + c + kLanes<T>, left - kLanes<T>) : Vec<T>{};
        store(first + c / 2, permute<T, EvenLanes>(a, b));
        store(second + c / 2, permute<T, OddLanes>(a, b));
      }
    } else {
      for (int64_t f = 0; f < s; ++f) {
        T* part = to + place(f);
        for (int64_t c = f; c < width; c += s) *part++ = load_one(from + c);
      }
    }
  }
}

// What one plane needs: `scratch` holds the padded input, `offsets` its taps.
template <typename S>
struct Task {
  using T = Compute<S>;
  const GroupedProblem& p;
  const Plane& plane;
  const int64_t* offsets;
  const T* scratch;  // the padded planes of a group
  const T* weight;   // [per_group, taps]
  T bias;
  S* y;
  const S* end;   // of y
  const S* next;  // the input plane after this one, to be fetched meanwhile
};

// ROWS x COLUMNS vectors of output from row i, column j on, for a square kernel K, stride_h STRIDE, dilation_h 1.
// Every vector of input is loaded once per column for all the rows that it belongs to.
template <typename S, int K, int STRIDE, bool GROUPED, int ROWS, int COLUMNS>
inline void correlate_block(const Task<S>& t, const Vec<Compute<S>>* weight, int64_t i, int64_t j) {
  using T = Compute<S>;
  const T* from = t.scratch + i * t.plane.row_step() + j;
  const int64_t row_pitch = t.plane.row_pitch();
  Vec<T> sum[ROWS][COLUMNS];
  for (int n = 0; n < ROWS; ++n) {
    for (int c = 0; c < COLUMNS; ++c) sum[n][c] = broadcast(t.bias);
  }
  for (int64_t member = 0; member < (GROUPED ? t.p.per_group : 1); ++member) {
#pragma GCC unroll 1
    for (int b = 0; b < K; ++b) {
      const T* column = from + t.offsets[b];
#pragma GCC unroll 16
      for (int r = 0; r < (ROWS - 1) * STRIDE + K; ++r) {
        Vec<T> x[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) x[c] = in_register(load(column + r * row_pitch + c * kLanes<T>));
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; ++n) {
          const int a = r - n * STRIDE;
          if (a < 0 || a >= K) continue;
          for (int c = 0; c < COLUMNS; ++c) sum[n][c] += weight[a * K + b] * x[c];
        }
      }
    }
    if constexpr (GROUPED) from += t.plane.size(), weight += K * K;
  }
  for (int n = 0; n < ROWS; ++n) {
    S* to = t.y + (i + n) * t.p.out_w + j;
    for (int c = COLUMNS - 1; c >= 0; --c) {
      store_ahead(to + c * kLanes<T>, sum[n][c], t.p.out_w - j - c * kLanes<T>, t.end);
    }
  }
}

template <typename S, int K, int STRIDE, bool GROUPED, int ROWS>
int64_t correlate_rows(const Task<S>& t, const Vec<Compute<S>>* weight, int64_t i) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  for (; i + ROWS <= t.p.out_h; i += ROWS) {
    prefetch(t.next + i * STRIDE * t.p.in_w, ROWS * STRIDE * t.p.in_w);
    // From right to left: what whole vectors write beyond a row falls on the start of the next one.
    int64_t vectors = ceil_div(t.p.out_w, kLane);
    for (; vectors >= 2; vectors -= 2) {
      correlate_block<S, K, STRIDE, GROUPED, ROWS, 2>(t, weight, i, (vectors - 2) * kLane);
    }
    if (vectors == 1) correlate_block<S, K, STRIDE, GROUPED, ROWS, 1>(t, weight, i, 0);
  }
  return i;
}

template <typename S, int K, int STRIDE, bool GROUPED>
void correlate(const Task<S>& t) {
  using T = Compute<S>;
  constexpr int kMembers = GROUPED ? kMostPerGroup : 1;
  Vec<T> weight[kMembers * K * K];
  for (int n = 0; n < (GROUPED ? t.p.per_group : 1) * K * K; ++n) weight[n] = broadcast(t.weight[n]);
  int64_t i = correlate_rows<S, K, STRIDE, GROUPED, 4>(t, weight, 0);
  i = correlate_rows<S, K, STRIDE, GROUPED, 2>(t, weight, i);
  correlate_rows<S, K, STRIDE, GROUPED, 1>(t, weight, i);
}

// ROWS x COLUMNS vectors of output from row i, column j on, for any kernel size, stride and dilation.
template <typename S, int ROWS, int COLUMNS>
inline void correlate_any_block(const Task<S>& t, int64_t i, int64_t j) {
  using T = Compute<S>;
  const int64_t row_step = t.plane.row_step();
  const T *from = t.scratch + i * row_step + j, *weight = t.weight;
  Vec<T> sum[ROWS][COLUMNS];
  for (int n = 0; n < ROWS; ++n) {
    for (int c = 0; c < COLUMNS; ++c) sum[n][c] = broadcast(t.bias);
  }
  for (int64_t m = 0; m < t.p.per_group; ++m, weight += t.p.taps(), from += t.plane.size()) {
    for (int64_t tap = 0; tap < t.p.taps(); ++tap) {
      const Vec<T> w = broadcast(weight[tap]);
      const T* x = from + t.offsets[tap];
      for (int n = 0; n < ROWS; ++n) {
        for (int c = 0; c < COLUMNS; ++c) sum[n][c] += w * load(x + n * row_step + c * kLanes<T>);
      }
    }
  }
  for (int n = 0; n < ROWS; ++n) {
    S* to = t.y + (i + n) * t.p.out_w + j;
    for (int c = COLUMNS - 1; c >= 0; --c) {
      store_ahead(to + c * kLanes<T>, sum[n][c], t.p.out_w - j - c * kLanes<T>, t.end);
    }
  }
}

template <typename S, int ROWS>
int64_t correlate_any_rows(const Task<S>& t, int64_t i) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  for (; i + ROWS <= t.p.out_h; i += ROWS) {
    int64_t vectors = ceil_div(t.p.out_w, kLane);  // from right to left, as in correlate_rows
    for (; vectors >= 2; vectors -= 2) correlate_any_block<S, ROWS, 2>(t, i, (vectors - 2) * kLane);
    if (vectors == 1) correlate_any_block<S, ROWS, 1>(t, i, 0);
  }
  return i;
}

template <typename S>
void correlate_any(const Task<S>& t) {
  const int64_t i = correlate_any_rows<S, 4>(t, 0);
  correlate_any_rows<S, 1>(t, i);
}

template <typename S, bool GROUPED, int K>
auto square(int64_t stride_h) {
  return stride_h == 1 ? correlate<S, K, 1, GROUPED> : stride_h == 2 ? correlate<S, K, 2, GROUPED> : correlate_any<S>;
}

template <typename S, bool GROUPED>
auto correlation(const GroupedProblem& p) {
  if (p.kernel_h == p.kernel_w && p.dilation_h == 1 && p.per_group <= kMostPerGroup) {
    if (p.kernel_h == 3) return square<S, GROUPED, 3>(p.stride_h);
    if constexpr (!GROUPED) {  // those of groups are rare, and every one is code for each instruction set
      if (p.kernel_h == 5) return square<S, GROUPED, 5>(p.stride_h);
      if (p.kernel_h == 7) return square<S, GROUPED, 7>(p.stride_h);
    }
  }
  return correlate_any<S>;
}

}  // namespace

template <typename S>
void grouped_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                     int64_t end) {
  using T = Compute<S>;
  if (has_turned_planes(p)) return turned_forward(p, x, weight, bias, y, begin, end);
  if (has_planes_3x3(p)) {
    return (p.stride_h == 1 ? forward_3x3<S, 1> : forward_3x3<S, 2>)(p, x, weight, bias, y, begin, end);
  }
  const Plane plane = Plane::of<T>(p);
  const auto run = p.per_group == 1 ? correlation<S, false>(p) : correlation<S, true>(p);
  const bool streamed = streams(p.batch * p.out_channels() * p.out_size() * static_cast<int64_t>(sizeof(S)));
  Scratch<T> scratch(p.per_group * plane.size()), kernel(p.per_group * p.taps());
  Scratch<S> out(streamed ? p.out_size() : 0);
  Scratch<int64_t> offsets(p.taps());
  plane.tap_offsets(p, offsets.data());
  int64_t held = -1;  // first of the input planes now in the scratch: output planes of one group follow each other
  for (int64_t task = begin; task < end; ++task) {
    const int64_t out_channel = task % p.out_channels();
    const int64_t source = task / p.out_channels() * p.channels + out_channel / p.multiplier * p.per_group;
    for (int64_t n = 0; n < p.per_group && source != held; ++n) {
      copy_in(plane, p, x + (source + n) * p.in_size(), scratch.data() + n * plane.size());
    }
    held = source;
    const int64_t weights = p.per_group * p.taps();
    for (int64_t t = 0; t < weights; ++t) kernel[t] = load_one(weight + out_channel * weights + t);
    S* target = y + task * p.out_size();
    S* to = streamed ? out.data() : target;
    run({p, plane, offsets.data(), scratch.data(), kernel.data(), bias != nullptr ? load_one(bias + out_channel) : T(0),
         to, to + p.out_size(), x + source * p.in_size() + (task + 1 < end ? p.in_size() : 0)});
    if (streamed) stream(target, to, p.out_size());
  }
  if (streamed) end_streams();
}

REFCONV_INSTANTIATE_GROUPED_FORWARD(float)
REFCONV_INSTANTIATE_GROUPED_FORWARD(double)
REFCONV_INSTANTIATE_GROUPED_FORWARD(BFloat16)
REFCONV_INSTANTIATE_GROUPED_FORWARD(Half)

}  // namespace refconv::cpu::REFCONV_ISA
