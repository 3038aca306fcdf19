// Convolutions against loops written from the equations in csrc/problem.h, in double.
#include "checks.h"

using refconv::GroupedProblem;

namespace {

// Calls visit(out index, in index, weight index) for every term of the convolution.
template <typename Visit>
void for_each_term(const GroupedProblem& p, const Visit& visit) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t co = 0; co < p.out_channels(); ++co)
      for (int64_t i = 0; i < p.out_h; ++i)
        for (int64_t j = 0; j < p.out_w; ++j)
          for (int64_t a = 0; a < p.kernel_h; ++a)
            for (int64_t b = 0; b < p.kernel_w; ++b) {
              const int64_t h = i * p.stride_h - p.pad_h + a * p.dilation_h;
              const int64_t w = j * p.stride_w - p.pad_w + b * p.dilation_w;
              if (h < 0 || h >= p.in_h || w < 0 || w >= p.in_w) continue;
              for (int64_t m = 0; m < p.per_group; ++m) {
                const int64_t ci = co / p.multiplier * p.per_group + m;
                visit(((n * p.out_channels() + co) * p.out_h + i) * p.out_w + j,
                      ((n * p.channels + ci) * p.in_h + h) * p.in_w + w,
                      ((co * p.per_group + m) * p.kernel_h + a) * p.kernel_w + b);
              }
            }
}

// Elements of which two combinations of outputs are enough: these problems are there for how large tensors are written.
constexpr int64_t kLarge = 1 << 20;

// All results of one problem, in NCHW.
struct Expected {
  std::vector<double> y, y_biased, dx, dw, db;

  template <typename T>
  Expected(const GroupedProblem& p, const T* x, const T* w, const T* bias, const T* grad)
      : y(p.batch * p.out_channels() * p.out_size()),
        dx(p.batch * p.channels * p.in_size()),
        dw(p.out_channels() * p.per_group * p.taps()),
        db(p.out_channels()) {
    // So many terms that a double would be no better than what is tested.
    std::vector<long double> sums(dw.size()), bias_sums(db.size());
    for_each_term(p, [&](int64_t o, int64_t i, int64_t t) {
      y[o] += value(w[t]) * value(x[i]);
      dx[i] += value(w[t]) * value(grad[o]);
      sums[t] += value(x[i]) * value(grad[o]);
    });
    dw.assign(sums.begin(), sums.end());
    y_biased = y;
    for (size_t o = 0; o < y.size(); ++o) {
      const int64_t channel = static_cast<int64_t>(o) / p.out_size() % p.out_channels();
      bias_sums[channel] += value(grad[o]);
      y_biased[o] += value(bias[channel]);
    }
    db.assign(bias_sums.begin(), bias_sums.end());
  }
};

template <typename T>
void test_grouped(const refconv::cpu::GroupedKernels<T>& kernels, const std::string& isa, const GroupedProblem& p) {
  const int64_t x_size = p.batch * p.channels * p.in_h * p.in_w, w_size = p.out_channels() * p.per_group * p.taps();
  const int64_t y_size = p.batch * p.out_channels() * p.out_h * p.out_w;
  const Buffer<T> x = random_buffer<T>(x_size), w = random_buffer<T>(w_size);
  const Buffer<T> bias = random_buffer<T>(p.out_channels()), dy = random_buffer<T>(y_size);
  const std::string name = isa + Element<T>::name + " K" + std::to_string(p.kernel_h) + "x" +
                           std::to_string(p.kernel_w) + " s" + std::to_string(p.stride_h) + std::to_string(p.stride_w) +
                           " p" + std::to_string(p.pad_h) + std::to_string(p.pad_w) + " d" +
                           std::to_string(p.dilation_h) + std::to_string(p.dilation_w) + " g" +
                           std::to_string(p.per_group) + " m" + std::to_string(p.multiplier) + " " +
                           std::to_string(p.in_h) + "x" + std::to_string(p.in_w);

  const Expected want(p, x.get(), w.get(), bias.get(), dy.get());
  const int64_t out_plane = p.out_size();

  // Split unevenly, as threads would.
  const int64_t planes = p.batch * p.out_channels(), channel_cut = p.channels / 3, plane_cut = planes / 3;
  Buffer<T> y = poisoned_buffer<T>(y_size);
  kernels.forward(p, x.get(), w.get(), bias.get(), y.get(), 0, plane_cut);
  kernels.forward(p, x.get(), w.get(), bias.get(), y.get(), plane_cut, planes);
  expect_close("forward " + name, y.get(), want.y_biased, p.per_group * p.taps());
  y = poisoned_buffer<T>(y_size);
  kernels.forward(p, x.get(), w.get(), nullptr, y.get(), 0, planes);
  expect_close("forward without bias " + name, y.get(), want.y, p.per_group * p.taps());

  for (int wanted = 1; wanted < 8; ++wanted) {  // every combination of outputs
    if (x_size + y_size > kLarge && wanted != 1 && wanted != 7) continue;
    Buffer<T> dx = poisoned_buffer<T>(x_size), dw = poisoned_buffer<T>(w_size);
    Buffer<T> db = poisoned_buffer<T>(p.out_channels());
    T *to_dx = wanted & 1 ? dx.get() : nullptr, *to_dw = wanted & 2 ? dw.get() : nullptr;
    T* to_db = wanted & 4 ? db.get() : nullptr;
    if (refconv::cpu::has_turned_planes(p)) {
      const int64_t chunks = wanted % 2 + 1, tasks = chunks * p.channels;
      Buffer<double> totals = poisoned_buffer<double>(tasks * (p.taps() + 1));
      for (const auto& [begin, end] : {std::pair{int64_t{0}, tasks / 3}, std::pair{tasks / 3, tasks}}) {
        kernels.turned_backward(p, dy.get(), x.get(), w.get(), to_dx, totals.get(), chunks, to_dw != nullptr,
                                to_db != nullptr, begin, end);
      }
      kernels.add_chunks(p, false, dy.get(), x.get(), totals.get(), chunks, to_dw, to_db, 0, p.channels);
    } else {
      kernels.backward(p, dy.get(), x.get(), w.get(), to_dx, to_dw, to_db, 0, channel_cut);
      kernels.backward(p, dy.get(), x.get(), w.get(), to_dx, to_dw, to_db, channel_cut, p.channels);
    }
    if (wanted & 1) expect_close("dx " + name, dx.get(), want.dx, p.taps() * p.multiplier);
    if (wanted & 2) expect_close("dW " + name, dw.get(), want.dw, p.batch * out_plane);
    if (wanted & 4) expect_close("dbias " + name, db.get(), want.db, p.batch * out_plane);
  }
}

// `from` [n, c, size] as [n, size, c].
template <typename Container>
void channels_last(const Container& from, int64_t batch, int64_t channels, int64_t size, Container* to) {
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < size; ++k) (*to)[(n * size + k) * channels + c] = from[(n * channels + c) * size + k];
}

template <typename T>
void test_nhwc(const refconv::cpu::GroupedKernels<T>& kernels, const std::string& isa, const GroupedProblem& p) {
  const int64_t x_size = p.batch * p.channels * p.in_size(), y_size = p.batch * p.out_channels() * p.out_size();
  const Buffer<T> x = random_buffer<T>(x_size), w = random_buffer<T>(p.groups() * p.group_taps());
  const Buffer<T> bias = random_buffer<T>(p.out_channels()), dy = random_buffer<T>(y_size);
  const Expected want(p, x.get(), w.get(), bias.get(), dy.get());
  std::vector<double> want_y(y_size), want_dx(x_size);
  Buffer<T> x_last = new_buffer<T>(x_size), dy_last = new_buffer<T>(y_size);
  channels_last(want.y_biased, p.batch, p.out_channels(), p.out_size(), &want_y);
  channels_last(want.dx, p.batch, p.channels, p.in_size(), &want_dx);
  channels_last(x, p.batch, p.channels, p.in_size(), &x_last);
  channels_last(dy, p.batch, p.out_channels(), p.out_size(), &dy_last);
  const std::string name = isa + Element<T>::name + " nhwc C" + std::to_string(p.channels) + " g" +
                           std::to_string(p.per_group) + " m" + std::to_string(p.multiplier) + " K" +
                           std::to_string(p.kernel_h) + "x" + std::to_string(p.kernel_w) + " s" +
                           std::to_string(p.stride_h) + std::to_string(p.stride_w) + " " + std::to_string(p.in_h) +
                           "x" + std::to_string(p.in_w);
  const int64_t out_rows = p.batch * p.out_h;
  Buffer<T> got = poisoned_buffer<T>(y_size);
  kernels.nhwc_forward(p, x_last.get(), w.get(), bias.get(), got.get(), 0, out_rows / 3);
  kernels.nhwc_forward(p, x_last.get(), w.get(), bias.get(), got.get(), out_rows / 3, out_rows);
  expect_close("forward " + name, got.get(), want_y, p.per_group * p.taps());

  const int64_t chunks = 3, totals_size = (p.per_group * p.taps() + 1) * p.out_channels();
  for (const bool wanted : {true, false}) {
    Buffer<double> totals = poisoned_buffer<double>(chunks * totals_size);
    got = poisoned_buffer<T>(x_size);
    for (int64_t k = 0; k < chunks; ++k) {
      kernels.nhwc_backward(p, dy_last.get(), x_last.get(), w.get(), wanted ? got.get() : nullptr, totals.get(), chunks,
                            true, wanted, k, k + 1);
    }
    Buffer<T> got_dw = poisoned_buffer<T>(p.groups() * p.group_taps());
    Buffer<T> got_db = poisoned_buffer<T>(p.out_channels());
    for (const auto& [begin, end] : {std::pair{int64_t{0}, p.groups() / 2}, std::pair{p.groups() / 2, p.groups()}}) {
      kernels.add_chunks(p, true, dy_last.get(), x_last.get(), totals.get(), chunks, got_dw.get(),
                         wanted ? got_db.get() : nullptr, begin, end);
    }
    if (wanted) expect_close("dx " + name, got.get(), want_dx, p.taps() * p.multiplier);
    expect_close("dW " + name, got_dw.get(), want.dw, p.batch * p.out_size());
    if (wanted) expect_close("dbias " + name, got_db.get(), want.db, p.batch * p.out_size());
  }
}

GroupedProblem depthwise(int64_t channels, int64_t multiplier, int64_t in_h, int64_t in_w, int64_t kernel_h,
                         int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                         int64_t dilation_h, int64_t dilation_w) {
  GroupedProblem p{2,        channels, multiplier, in_h,  in_w,  0,          0,         kernel_h,
                   kernel_w, stride_h, stride_w,   pad_h, pad_w, dilation_h, dilation_w};
  p.out_h = (in_h + 2 * pad_h - (kernel_h - 1) * dilation_h - 1) / stride_h + 1;
  p.out_w = (in_w + 2 * pad_w - (kernel_w - 1) * dilation_w - 1) / stride_w + 1;
  return p;
}

// The same with `per_group` input channels per group, `groups` groups.
GroupedProblem grouped(int64_t groups, int64_t per_group, GroupedProblem p) {
  p.channels = groups * per_group;
  p.per_group = per_group;
  return p;
}

template <typename T>
void test_grouped_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<T>();
  const std::string isa = set.name;
  // Widths straddle one and two vectors of every instruction set (2 to 16 lanes).
  for (const int64_t width : {1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33}) {
    const auto tall_for = [&](int64_t kernel) { return 6 + (kernel == 7 ? 3200 : 200) / width; };
    for (const int64_t kernel : {1, 2, 3, 5, 7}) {
      const int64_t pad = kernel / 2, tall = tall_for(kernel);  // too many pixels for turned_planes.cpp
      test_grouped(kernels, isa, depthwise(3, 1, 6, width, kernel, kernel, 1, 1, pad, pad, 1, 1));
      test_grouped(kernels, isa, depthwise(2, 1, tall, width, kernel, kernel, 1, 1, pad, pad, 1, 1));
    }
    for (const int64_t kernel : {3, 5, 7}) {
      const int64_t pad = kernel / 2, tall = tall_for(kernel);
      test_grouped(kernels, isa, depthwise(2, 1, 9, width, kernel, kernel, 2, 2, pad, pad, 1, 1));
      test_grouped(kernels, isa, depthwise(1, 1, 2 * tall, width, kernel, kernel, 2, 2, pad, pad, 1, 1));
    }
    test_grouped(kernels, isa, depthwise(2, 2, 5, width, 3, 3, 1, 1, 1, 1, 1, 1));
    for (const int64_t stride : {1, 2}) {  // 3x3, but not planes_3x3.h
      test_grouped(kernels, isa, depthwise(1, 1, 2 * tall_for(3), width, 3, 3, stride, stride, 2, 2, 2, 2));
    }
    test_grouped(kernels, isa, depthwise(2, 1, 7, width, 3, 5, 2, 1, 0, 4, 2, 2));
  }
  // As many vectors of a row as are held at once, of 4 to 16 lanes, and rows that are gone through in parts.
  for (const int64_t width : {47, 48, 49, 55, 56, 57, 63, 64, 65, 79, 80, 81, 96, 97, 111, 112, 113, 128, 129, 193}) {
    for (const int64_t height : {1, 2, 3, 6}) {
      test_grouped(kernels, isa, depthwise(2, 1, height, width, 3, 3, 1, 1, 1, 1, 1, 1));
      test_grouped(kernels, isa, depthwise(2, 1, height, 2 * width - height % 2, 3, 3, 2, 2, 1, 1, 1, 1));
    }
  }
  // Small planes, more images than are gone through at once, and a part of as many.
  for (const int64_t batch : {5, 80, 160}) {
    for (const int64_t width : {7, 14}) {
      for (const int64_t stride : {1, 2}) {
        GroupedProblem p = depthwise(3, 1, 14, stride * width, 3, 3, stride, stride, 1, 1, 1, 1);
        p.batch = batch;
        test_grouped(kernels, isa, p);
      }
    }
  }
  for (const int64_t channels : {1, 2, 7, 8, 9, 15, 16, 17, 35}) {  // straddle the blocks of turned_planes.cpp
    test_grouped(kernels, isa, depthwise(channels, 1, 7, 6, 3, 3, 1, 1, 1, 1, 1, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 9, 8, 3, 3, 2, 2, 1, 1, 1, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 5, 7, 5, 5, 1, 1, 2, 2, 1, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 20, 6, 3, 3, 1, 1, 1, 1, 1, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 40, 6, 3, 3, 2, 2, 1, 1, 1, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 2, 1, 3, 3, 1, 1, 1, 1, 1, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 5, 6, 3, 3, 3, 4, 3, 0, 2, 1));
    test_grouped(kernels, isa, depthwise(channels, 1, 6, 5, 3, 3, 1, 1, 5, 6, 3, 2));
    test_grouped(kernels, isa, depthwise(channels, 1, 4, 5, 3, 3, 6, 7, 0, 1, 1, 1));
  }
  for (const int64_t channels : {1, 2, 3, 38}) {  // planes go two to a vector
    for (const int64_t width : {7, 8, 9}) {
      test_grouped(kernels, isa, depthwise(channels, 1, 1, width, 3, 3, 1, 1, 1, 1, 1, 1));
      test_grouped(kernels, isa, depthwise(channels, 1, 8, width, 3, 3, 1, 1, 1, 1, 1, 1));
      test_grouped(kernels, isa, depthwise(channels, 1, 1, 2 * width - 1, 3, 3, 2, 2, 1, 1, 1, 1));
      test_grouped(kernels, isa, depthwise(channels, 1, 7, 2 * width, 3, 3, 2, 2, 1, 1, 1, 1));
    }
  }
  // Rows of output that share rows of input, with as many taps as there are such rows, and less and more.
  for (const int64_t kernel : {2, 3, 4, 5, 6, 9}) {
    for (const int64_t height : {1, 5, 13}) {
      const int64_t width = 39 + kernel;  // too many pixels for turned_planes.cpp
      test_grouped(kernels, isa, depthwise(1, 2, height, width, kernel, kernel, 1, 1, kernel, kernel, 1, 1));
      test_grouped(kernels, isa, depthwise(1, 2, height, width, kernel, 3, 1, 1, 2 * kernel, 1, 2, 2));
      test_grouped(kernels, isa, depthwise(1, 2, height, width, kernel, 3, 2, 2, 3 * kernel, 1, 3, 1));
      test_grouped(kernels, isa, depthwise(1, 2, height, width, kernel, 2, 3, 1, kernel, 1, 1, 1));
    }
  }
  test_grouped(kernels, isa, depthwise(4, 3, 11, 13, 5, 3, 3, 2, 2, 1, 1, 2));
  test_grouped(kernels, isa, depthwise(1, 1, 8, 8, 3, 3, 1, 1, 5, 5, 1, 1));  // more padding than kernel
  test_grouped(kernels, isa, depthwise(1, 1, 4, 5, 3, 3, 1, 1, 99999, 99999, 99999, 99999));  // which no scratch holds
  test_grouped(kernels, isa, depthwise(1, 1, 3, 3, 2, 2, 5, 5, 0, 0, 1, 1));    // stride beyond the kernel
  test_grouped(kernels, isa, depthwise(1, 2, 13, 14, 4, 6, 4, 6, 1, 2, 6, 4));  // strides and dilations in common
  test_grouped(kernels, isa, depthwise(1, 1, 20, 40, 11, 31, 1, 1, 5, 15, 1, 1));
  test_grouped(kernels, isa, depthwise(1, 1, 40, 20, 3, 3, 1, 3, 4, 4, 4, 4));
  test_grouped(kernels, isa, depthwise(1, 1, 21, 500, 5, 5, 1, 1, 2, 2, 1, 1));  // several strips of a plane
  test_grouped(kernels, isa, depthwise(1, 1, 21, 500, 7, 7, 2, 2, 3, 3, 1, 1));
  test_grouped(kernels, isa, depthwise(1, 2, 31, 200, 3, 3, 3, 3, 1, 1, 1, 1));
  for (const int64_t width : {1, 5, 8, 16, 17, 33}) {
    for (const int64_t kernel : {1, 3, 5}) {
      const int64_t pad = kernel / 2;
      test_grouped(kernels, isa, grouped(2, 2, depthwise(0, 3, 6, width, kernel, kernel, 1, 1, pad, pad, 1, 1)));
      test_grouped(kernels, isa, grouped(3, 3, depthwise(0, 1, 9, width, kernel, kernel, 2, 2, pad, pad, 1, 1)));
    }
  }
  for (const int64_t per_group : {4, 15, 16, 17}) {  // the unrolled kernels hold the weights of 16
    test_grouped(kernels, isa, grouped(2, per_group, depthwise(0, 2, 5, 18, 3, 3, 1, 1, 1, 1, 1, 1)));
  }
  test_grouped(kernels, isa, grouped(2, 3, depthwise(0, 2, 9, 12, 3, 2, 2, 3, 1, 0, 2, 1)));
}

template <typename T>
void test_nhwc_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<T>();
  const std::string isa = set.name;
  for (const int64_t width : {1, 2, 3, 4, 5, 8, 9, 17}) {  // pixels where they are: tiles of all sizes, and edges
    for (const int64_t channels : {1, 4, 16, 35}) {
      test_nhwc(kernels, isa, depthwise(channels, 1, 3, width, 1, 1, 1, 1, 0, 0, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, 1, 3, width, 2, 2, 1, 1, 1, 1, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, 1, 7, 3 * width, 3, 3, 3, 3, 1, 1, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, 1, 7, 2 * width, 3, 3, 2, 2, 2, 2, 2, 2));
      test_nhwc(kernels, isa, depthwise(channels, 1, 9, 4 * width, 7, 5, 4, 4, 3, 4, 1, 1));
    }
  }
  test_nhwc(kernels, isa, depthwise(5, 1, 3, 9, 31, 31, 1, 1, 15, 15, 1, 1));  // taps that meet only zeros
  test_nhwc(kernels, isa, depthwise(5, 1, 9, 12, 15, 31, 2, 2, 14, 30, 2, 2));
  for (const int64_t channels : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33}) {  // straddle the vectors
    test_nhwc(kernels, isa, depthwise(channels, 1, 6, 11, 3, 3, 1, 1, 1, 1, 1, 1));
    test_nhwc(kernels, isa, depthwise(channels, 1, 9, 10, 3, 3, 2, 2, 1, 1, 1, 1));
  }
  for (const int64_t size : {1, 2, 3, 4, 5, 6}) {  // rows without and with edges
    for (const int64_t other : {3, 4, 7}) {
      for (const int64_t stride : {1, 2}) {
        test_nhwc(kernels, isa, depthwise(17, 1, size, other, 3, 3, stride, stride, 1, 0, 1, 1));
        test_nhwc(kernels, isa, depthwise(17, 1, other, size, 3, 3, stride, stride, 0, 1, 1, 1));
      }
    }
  }
  for (const int64_t width : {1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 27}) {  // tiles of all sizes, one to four
    for (const int64_t kernel : {1, 2, 4, 5, 6, 7, 9}) {
      test_nhwc(kernels, isa, depthwise(5, 1, 6, width, kernel, kernel, 1, 1, kernel / 2, kernel / 2, 1, 1));
      test_nhwc(kernels, isa, depthwise(5, 1, 8, 2 * width, kernel, kernel, 2, 2, kernel / 2, kernel / 2, 1, 1));
    }
    test_nhwc(kernels, isa, depthwise(5, 1, 7, width, 3, 5, 2, 1, 0, 4, 2, 2));
  }
  for (const int64_t multiplier : {2, 3, 4}) {
    for (const int64_t channels : {1, 5, 8, 16, 19}) {  // straddle the vectors, of input and of output channels
      test_nhwc(kernels, isa, depthwise(channels, multiplier, 6, 11, 3, 3, 1, 1, 1, 1, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, multiplier, 9, 3, 5, 4, 2, 2, 2, 1, 1, 1));
    }
    test_nhwc(kernels, isa, depthwise(33, multiplier, 11, 210, 3, 3, 1, 2, 2, 2, 2, 1));  // several strips
  }
  for (const int64_t groups : {1, 3, 8, 16, 17}) {
    test_nhwc(kernels, isa, grouped(groups, 2, depthwise(0, 3, 6, 11, 3, 3, 1, 1, 1, 1, 1, 1)));
    test_nhwc(kernels, isa, grouped(groups, 4, depthwise(0, 4, 9, 3, 3, 5, 2, 2, 1, 2, 1, 1)));
    test_nhwc(kernels, isa, grouped(groups, 3, depthwise(0, 1, 11, 13, 5, 3, 3, 2, 2, 1, 1, 2)));
  }
  test_nhwc(kernels, isa, depthwise(4, 1, 11, 13, 5, 3, 3, 2, 2, 1, 1, 2));
  test_nhwc(kernels, isa, depthwise(2, 1, 3, 3, 2, 2, 5, 5, 0, 0, 1, 1));
  test_nhwc(kernels, isa, depthwise(2, 1, 13, 14, 4, 6, 4, 6, 1, 2, 6, 4));
  test_nhwc(kernels, isa, depthwise(3, 1, 20, 40, 11, 31, 1, 1, 5, 15, 1, 1));
  test_nhwc(kernels, isa, depthwise(3, 1, 9, 1100, 3, 3, 1, 1, 1, 1, 1, 1));  // several strips of rows
  for (const int64_t stride : {1, 2, 3}) {
    for (const int64_t dilation : {1, 2}) {  // the same, several vectors, the last of them not full
      test_nhwc(kernels, isa, depthwise(35, 1, 11, 210, 5, 5, stride, stride, 4, 3, dilation, dilation));
      test_nhwc(kernels, isa, depthwise(64, 1, 40, 9, 7, 5, stride, stride, 3, 2, dilation, dilation));
    }
  }
}

// Outputs large enough to be written around the cache.
void test_large(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<float>();
  test_grouped(kernels, set.name, depthwise(4, 1, 512, 1033, 3, 3, 1, 1, 1, 1, 1, 1));
  test_grouped(kernels, set.name, depthwise(4, 1, 1300, 416, 3, 3, 1, 1, 1, 1, 1, 1));  // whole lines
  test_grouped(kernels, set.name, depthwise(4, 1, 512, 1040, 3, 3, 2, 2, 1, 1, 1, 1));  // whole lines
  test_grouped(kernels, set.name, depthwise(42801, 1, 7, 7, 2, 2, 1, 1, 1, 1, 1, 1));
  test_grouped(kernels, set.name, depthwise(42801, 1, 7, 7, 3, 3, 1, 1, 1, 1, 1, 1));
  test_nhwc(kernels, set.name, depthwise(32, 1, 256, 260, 3, 3, 1, 1, 1, 1, 1, 1));
  test_nhwc(kernels, set.name, depthwise(32, 1, 256, 260, 5, 5, 1, 1, 2, 2, 1, 1));
  test_nhwc(kernels, set.name, depthwise(32, 1, 256, 260, 2, 2, 2, 2, 0, 0, 1, 1));
}

// Elements of one of two images, of a channels_last map large enough for tiles of 2x2 pixels, also with stride 2.
template <typename T>
constexpr int64_t kTiledElements = (6 << 20) / sizeof(T) / 2;

void test_nhwc_tiles(const refconv::cpu::InstructionSet& set) {
  constexpr int64_t kElements = kTiledElements<float>, kDoubles = kTiledElements<double>;
  const auto& kernels = set.kernels.grouped<float>();
  for (const int64_t width : {2, 3, 5, 6}) {  // tiles of all shapes; pairs of rows, and some alone
    const int64_t height = 4 + width % 3, channels = (kElements / width / height / 16 + 1) * 16;
    test_nhwc(kernels, set.name, depthwise(channels, 1, height, width, 3, 3, 1, 1, 1, 1, 1, 1));
    test_nhwc(kernels, set.name, depthwise(channels, 1, height, width, 3, 3, 2, 2, 1, 1, 1, 1));
    if (width < 5) continue;
    test_nhwc(kernels, set.name, depthwise(channels + 3, 1, height, width, 3, 3, 1, 1, 1, 0, 1, 1));
    test_nhwc(kernels, set.name, depthwise(channels + 3, 1, height, width, 3, 3, 2, 2, 1, 0, 1, 1));
  }
  test_nhwc(kernels, set.name, depthwise(208, 1, kElements / 208 / 60 + 1, 60, 3, 3, 1, 1, 1, 1, 1, 1));  // blocks
  test_nhwc(kernels, set.name, depthwise(512, 1, kElements / 512 / 31 + 1, 31, 3, 3, 1, 1, 1, 1, 1, 1));
  test_nhwc(kernels, set.name, depthwise(208, 1, kElements / 208 / 61 + 1, 61, 3, 3, 2, 2, 1, 1, 1, 1));
  test_nhwc(kernels, set.name, depthwise(35, 1, 7, kElements / 35 / 7 + 1, 3, 3, 1, 1, 0, 1, 1, 1));
  for (const int64_t stride : {1, 2}) {
    const int64_t height = kDoubles / 104 / 31 + 1;
    test_nhwc(set.kernels.grouped<double>(), set.name, depthwise(104, 1, height, 31, 3, 3, stride, stride, 1, 1, 1, 1));
  }
}

}  // namespace

void test_convolutions(const InstructionSet& set) {
  test_grouped_all<float>(set);
  test_grouped_all<double>(set);
  test_grouped_all<BFloat16>(set);
  test_grouped_all<Half>(set);
  test_nhwc_all<float>(set);
  test_nhwc_all<double>(set);
  test_nhwc_all<BFloat16>(set);
  test_nhwc_all<Half>(set);
  test_large(set);
  test_nhwc_tiles(set);
}
