// Forward of a convolution with few channels per group, or one (depthwise), on NCHW planes.
//
// Equations: csrc/problem.h. Ownership: one output plane per task. Bytes: reads x and writes y once.
// Accumulation: in the compute type, in the order of the taps.
//
// A plane (of a group: each of its input planes) is first copied into zero-padded scratch that stays in cache, the
// columns of each row sorted by their remainder modulo stride_w: every tap of every output row is then one contiguous
// vector load, for any stride, dilation and padding. Some rows and columns of output are computed at once, rows that
// share rows of input, so that a loaded vector and a loaded weight serve several outputs.
#include "elements.h"
#include "entry_points.h"
#include "lanes.h"
#include "planes_3x3.h"
#include "scratch.h"
#include "streaming.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

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

// Where rows of output share rows of input: the row of tap a + taps_apart of one output row is that of tap a of the
// output row `rows_apart` further. Taps with equal remainders modulo taps_apart are a phase.
struct Sharing {
  int64_t rows_apart, taps_apart, taps, more;  // so many taps in each phase, and one more in the first `more` phases
  int64_t tap_step, row_step, plane_size;  // in scratch: to the next tap, to the next row that is shared, of a plane
  Sharing(const GroupedProblem& p, const Plane& plane) {
    const int64_t common = gcd(p.stride_h, p.dilation_h);
    rows_apart = p.dilation_h / common, taps_apart = p.stride_h / common;
    taps = p.kernel_h / taps_apart, more = p.kernel_h % taps_apart;
    tap_step = p.dilation_h * plane.row_pitch(), row_step = taps_apart * tap_step, plane_size = plane.size();
  }
};

// Adds what the taps of one phase and one column add to ROWS rows of COLUMNS vectors: row n meets row n + a of x with
// tap a. Every vector of x is loaded once. TAPS 0: any number of taps from ROWS on.
template <int TAPS, typename T, int ROWS, int COLUMNS>
REFCONV_INLINE void meet_column(Vec<T> (&sum)[ROWS][COLUMNS], const T* x, int64_t x_step, const T* weight,
                                int64_t weight_step, int64_t taps) {
  Vec<T> w[ROWS] = {};                         // the last taps, the newest first
  const auto row = [&](int first, int last) {  // the rows of output that meet it, and the next row
    Vec<T> v[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) v[c] = in_register(load(x + c * kLanes<T>));
#pragma GCC unroll 8
    for (int n = first; n <= last; ++n) {
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sum[n][c] += w[n] * v[c];
    }
    x += x_step;
  };
  const auto next_tap = [&] {
#pragma GCC unroll 8
    for (int n = ROWS - 1; n > 0; --n) w[n] = w[n - 1];
    w[0] = in_register(broadcast(*weight));
    weight += weight_step;
  };
  const auto no_tap = [&] {
#pragma GCC unroll 8
    for (int n = ROWS - 1; n > 0; --n) w[n] = w[n - 1];
  };
  if constexpr (TAPS > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS + TAPS - 1; ++r) {
      r < TAPS ? next_tap() : no_tap();
      row(r < TAPS ? 0 : r - TAPS + 1, r < ROWS ? r : ROWS - 1);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS - 1; ++r) next_tap(), row(0, r);
#pragma GCC unroll 1
    for (int64_t a = ROWS - 1; a < taps; ++a) next_tap(), row(0, ROWS - 1);
#pragma GCC unroll 8
    for (int r = 1; r < ROWS; ++r) no_tap(), row(r, ROWS - 1);
  }
}

constexpr int kAnyHeight = 0, kFewTaps = -1;  // kFewTaps: less than 4 in a phase, which share too little

// Adds what all taps of a kernel add to ROWS rows of COLUMNS vectors. HEIGHT is that of the kernel in PHASES phases, or
// kAnyHeight in any number of them.
template <int HEIGHT, int PHASES, typename S, typename T, int ROWS, int COLUMNS>
REFCONV_INLINE void meet_columns(Vec<T> (&sum)[ROWS][COLUMNS], const Task<S>& t, const Sharing& sharing, const T* plane,
                                 const T* weight) {
  const int64_t phases = PHASES > 0 ? PHASES : sharing.taps_apart, width = t.p.kernel_w;
  const int64_t tap_step = sharing.tap_step, x_step = sharing.row_step, weight_step = phases * width;
#pragma GCC unroll 1
  for (int64_t b = 0; b < width; ++b) {
    const T *x = plane + t.offsets[b], *w = weight + b;
    if constexpr (PHASES > 0) meet_column<(HEIGHT + PHASES - 1) / PHASES>(sum, x, x_step, w, weight_step, 0);
    if constexpr (PHASES == 2) meet_column<HEIGHT / 2>(sum, x + tap_step, x_step, w + width, weight_step, 0);
    for (int64_t f = 0; HEIGHT == kAnyHeight && f < phases; ++f, x += tap_step, w += width) {
      meet_column<0>(sum, x, x_step, w, weight_step, sharing.taps + (f < sharing.more ? 1 : 0));
    }
  }
}

// COLUMNS vectors from column j on of ROWS rows of output, i and those that share rows of input with it. HEIGHT may
// be kFewTaps, too.
template <typename S, int HEIGHT, int PHASES, int ROWS, int COLUMNS>
void correlate_block(const Task<S>& t, const Sharing& sharing, int64_t i, int64_t j) {
  using T = Compute<S>;
  const GroupedProblem& p = t.p;
  Vec<T> sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) sum[n][c] = broadcast(t.bias);
  }
  const T *plane = t.scratch + i * t.plane.row_step() + j, *weight = t.weight;
  for (int64_t m = 0; m < p.per_group; ++m, plane += sharing.plane_size, weight += p.taps()) {
    if constexpr (HEIGHT == kFewTaps) {
      const int64_t row_step = sharing.row_step;
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        const Vec<T> w = broadcast(weight[tap]);
        const T* x = plane + t.offsets[tap];
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; ++n) {
#pragma GCC unroll 4
          for (int c = 0; c < COLUMNS; ++c) sum[n][c] += w * load(x + n * row_step + c * kLanes<T>);
        }
      }
    } else {
      meet_columns<HEIGHT, PHASES>(sum, t, sharing, plane, weight);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n) {
    S* row = t.y + (i + n * sharing.rows_apart) * p.out_w;
    // What is written beyond a row falls on the start of the next one, which has to come later.
    const S* end = sharing.rows_apart == 1 ? t.end : row + p.out_w;
#pragma GCC unroll 4
    for (int c = COLUMNS - 1; c >= 0; --c) {
      store_ahead(row + j + c * kLanes<T>, sum[n][c], p.out_w - j - c * kLanes<T>, end);
    }
  }
}

// As many rows of output from row i on as make whole blocks; the first one that is left.
template <typename S, int HEIGHT, int PHASES, int ROWS>
int64_t correlate_rows(const Task<S>& t, const Sharing& sharing, int64_t i) {
  constexpr int64_t kLane = kLanes<Compute<S>>;
  const int64_t rows = ROWS == 1 ? 1 : ROWS * sharing.rows_apart;
  for (; i + rows <= t.p.out_h; i += rows) {
    prefetch(t.next + i * t.p.stride_h * t.p.in_w, rows * t.p.stride_h * t.p.in_w);
    for (int64_t row = i; row < i + rows / ROWS; ++row) {
      // From right to left, too, lest a vector falls on what was written.
      int64_t vectors = ceil_div(t.p.out_w, kLane);
      for (; vectors >= 2; vectors -= 2)
        correlate_block<S, HEIGHT, PHASES, ROWS, 2>(t, sharing, row, (vectors - 2) * kLane);
      if (vectors == 1) correlate_block<S, HEIGHT, PHASES, ROWS, 1>(t, sharing, row, 0);
    }
  }
  return i;
}

template <typename S, int HEIGHT, int PHASES>
void correlate(const Task<S>& t) {
  const Sharing sharing(t.p, t.plane);
  int64_t i = correlate_rows<S, HEIGHT, PHASES, 4>(t, sharing, 0);
  i = correlate_rows<S, HEIGHT, PHASES, 2>(t, sharing, i);
  correlate_rows<S, HEIGHT, PHASES, 1>(t, sharing, i);
}

template <typename S>
auto correlation(const GroupedProblem& p, const Plane& plane) {
  const Sharing sharing(p, plane);
  const auto of = [&](auto one, auto two) { return sharing.taps_apart == 1 ? one : two; };
  if (sharing.taps_apart <= 2) {
    if (p.kernel_h == 3) return of(correlate<S, 3, 1>, correlate<S, 3, 2>);
    if (p.kernel_h == 5) return of(correlate<S, 5, 1>, correlate<S, 5, 2>);
    if (p.kernel_h == 7) return of(correlate<S, 7, 1>, correlate<S, 7, 2>);
  }
  return sharing.taps < 4 ? correlate<S, kFewTaps, 0> : correlate<S, kAnyHeight, 0>;
}

}  // namespace

template <typename S>
void grouped_forward(const GroupedProblem& p, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                     int64_t end) {
  using T = Compute<S>;
  if (has_planes_3x3(p)) {
    return (p.stride_h == 1 ? forward_3x3<S, 1> : forward_3x3<S, 2>)(p, x, weight, bias, y, begin, end);
  }
  const Plane plane = Plane::of<T>(p);
  const auto run = correlation<S>(p, plane);
  const int64_t plane_bytes = p.out_size() * static_cast<int64_t>(sizeof(S));
  const bool streamed = streams(p.batch * p.out_channels() * plane_bytes, plane_bytes);
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
