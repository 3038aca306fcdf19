// Convolutions on channels_last maps, against convolutions.h.
#include "convolutions.h"

namespace {

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
    const int64_t block = wanted && !refconv::cpu::has_nhwc_3x3(p) ? (p.channels + 2) / 3 : p.channels;
    const int64_t tasks = chunks * ((p.channels + block - 1) / block);
    for (int64_t task = 0; task < tasks; task += 2) {
      kernels.nhwc_backward(p, dy_last.get(), x_last.get(), w.get(), wanted ? got.get() : nullptr, totals.get(), chunks,
                            block, true, wanted, task, std::min(task + 2, tasks));
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

template <typename T>
void test_nhwc_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<T>();
  const std::string isa = set.name;
  for (const int64_t width : {1, 2, 3, 4, 5, 8, 9, 17}) {  // pixels where they are: tiles of all sizes, and edges
    for (const int64_t channels : {1, 4, 16, 35}) {
      test_nhwc(kernels, isa, depthwise(channels, 1, 3, width, 1, 1, 1, 1, 0, 0, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, 1, 3, width, 2, 2, 1, 1, 1, 1, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, 1, 7, 3 * width, 3, 3, 3, 3, 1, 1, 1, 1));
      test_nhwc(kernels, isa, depthwise(channels, 1, 6, width, 3, 3, 1, 1, 2, 2, 2, 2));
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
  for (const int64_t groups : {1, 3, 8, 16, 17}) {  // what the lanes of a vector meet fits one, two, or needs more
    test_nhwc(kernels, isa, grouped(groups, 2, depthwise(0, 3, 6, 11, 3, 3, 1, 1, 1, 1, 1, 1)));
    test_nhwc(kernels, isa, grouped(groups, 3, depthwise(0, 3, 5, 7, 3, 3, 1, 1, 1, 1, 1, 1)));
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

void test_channels_last(const InstructionSet& set) {
  test_nhwc_all<float>(set);
  test_nhwc_all<double>(set);
  test_nhwc_all<BFloat16>(set);
  test_nhwc_all<Half>(set);
  test_large(set);
  test_nhwc_tiles(set);
}
