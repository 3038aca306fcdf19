// Convolutions on NCHW maps, against convolutions.h.
#include "convolutions.h"

namespace {

// Elements of which two combinations of outputs are enough: these problems are there for how large tensors are written.
constexpr int64_t kLarge = 1 << 20;

// Planes as they are, or turned, which is for small ones.
template <typename T>
void test_planes(const refconv::cpu::GroupedKernels<T>& kernels, const std::string& isa, const GroupedProblem& p,
                 bool turned, const T* x, const T* w, const T* bias, const T* dy, const Expected& want) {
  const int64_t x_size = p.batch * p.channels * p.in_h * p.in_w, w_size = p.out_channels() * p.per_group * p.taps();
  const int64_t y_size = p.batch * p.out_channels() * p.out_h * p.out_w;
  const std::string name = isa + Element<T>::name + (turned ? " turned K" : " K") + std::to_string(p.kernel_h) + "x" +
                           std::to_string(p.kernel_w) + " s" + std::to_string(p.stride_h) + std::to_string(p.stride_w) +
                           " p" + std::to_string(p.pad_h) + std::to_string(p.pad_w) + " d" +
                           std::to_string(p.dilation_h) + std::to_string(p.dilation_w) + " g" +
                           std::to_string(p.per_group) + " m" + std::to_string(p.multiplier) + " " +
                           std::to_string(p.in_h) + "x" + std::to_string(p.in_w);
  const int64_t out_plane = p.out_size();

  // Split unevenly, as threads would.
  const auto forward = turned ? kernels.turned_forward : kernels.forward;
  const int64_t planes = p.batch * (turned ? p.groups() : p.out_channels());
  const int64_t channel_cut = p.channels / 3, plane_cut = planes / 3;
  Buffer<T> y = poisoned_buffer<T>(y_size);
  forward(p, x, w, bias, y.get(), 0, plane_cut);
  forward(p, x, w, bias, y.get(), plane_cut, planes);
  expect_close("forward " + name, y.get(), want.y_biased, p.per_group * p.taps());
  y = poisoned_buffer<T>(y_size);
  forward(p, x, w, nullptr, y.get(), 0, planes);
  expect_close("forward without bias " + name, y.get(), want.y, p.per_group * p.taps());

  for (int wanted = 1; wanted < 8; ++wanted) {  // every combination of outputs
    if (x_size + y_size > kLarge && wanted != 1 && wanted != 7) continue;
    Buffer<T> dx = poisoned_buffer<T>(x_size), dw = poisoned_buffer<T>(w_size);
    Buffer<T> db = poisoned_buffer<T>(p.out_channels());
    T *to_dx = wanted & 1 ? dx.get() : nullptr, *to_dw = wanted & 2 ? dw.get() : nullptr;
    T* to_db = wanted & 4 ? db.get() : nullptr;
    if (turned) {
      const int64_t chunks = wanted % 2 + 1, tasks = chunks * p.groups();
      Buffer<double> totals = poisoned_buffer<double>(chunks * p.out_channels() * (p.per_group * p.taps() + 1));
      for (const auto& [begin, end] : {std::pair{int64_t{0}, tasks / 3}, std::pair{tasks / 3, tasks}}) {
        kernels.turned_backward(p, dy, x, w, to_dx, totals.get(), chunks, to_dw != nullptr, to_db != nullptr, begin,
                                end);
      }
      kernels.add_chunks(p, false, dy, x, totals.get(), chunks, to_dw, to_db, 0, p.groups());
    } else {
      kernels.backward(p, dy, x, w, to_dx, to_dw, to_db, 0, channel_cut);
      kernels.backward(p, dy, x, w, to_dx, to_dw, to_db, channel_cut, p.channels);
    }
    if (wanted & 1) expect_close("dx " + name, dx.get(), want.dx, p.taps() * p.multiplier);
    if (wanted & 2) expect_close("dW " + name, dw.get(), want.dw, p.batch * out_plane);
    if (wanted & 4) expect_close("dbias " + name, db.get(), want.db, p.batch * out_plane);
  }
}

template <typename T>
void test_grouped(const refconv::cpu::GroupedKernels<T>& kernels, const std::string& isa, const GroupedProblem& p) {
  constexpr int64_t kMostTurned = 800;  // pixels: more only take longer
  const Buffer<T> x = random_buffer<T>(p.batch * p.channels * p.in_size());
  const Buffer<T> w = random_buffer<T>(p.groups() * p.group_taps()), bias = random_buffer<T>(p.out_channels());
  const Buffer<T> dy = random_buffer<T>(p.batch * p.out_channels() * p.out_size());
  const Expected want(p, x.get(), w.get(), bias.get(), dy.get());
  for (const bool turned : {false, true}) {
    if (turned ? p.in_size() > kMostTurned : refconv::cpu::is_mostly_padding(p)) continue;
    test_planes(kernels, isa, p, turned, x.get(), w.get(), bias.get(), dy.get(), want);
  }
}

template <typename T>
void test_grouped_all(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<T>();
  const std::string isa = set.name;
  // Widths straddle one and two vectors of every instruction set (2 to 16 lanes).
  for (const int64_t width : {1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33}) {
    const int64_t tall = 6 + 200 / width;
    for (const int64_t kernel : {1, 2, 3, 5, 7}) {
      const int64_t pad = kernel / 2;
      test_grouped(kernels, isa, depthwise(3, 1, 6, width, kernel, kernel, 1, 1, pad, pad, 1, 1));
      test_grouped(kernels, isa, depthwise(2, 1, tall, width, kernel, kernel, 1, 1, pad, pad, 1, 1));
    }
    for (const int64_t kernel : {3, 5, 7}) {
      const int64_t pad = kernel / 2;
      test_grouped(kernels, isa, depthwise(2, 1, 9, width, kernel, kernel, 2, 2, pad, pad, 1, 1));
      test_grouped(kernels, isa, depthwise(1, 1, 2 * tall, width, kernel, kernel, 2, 2, pad, pad, 1, 1));
    }
    test_grouped(kernels, isa, depthwise(2, 2, 5, width, 3, 3, 1, 1, 1, 1, 1, 1));
    for (const int64_t stride : {1, 2}) {  // 3x3, but not planes_3x3.h
      test_grouped(kernels, isa, depthwise(1, 1, 2 * tall, width, 3, 3, stride, stride, 2, 2, 2, 2));
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
      const int64_t width = 39 + kernel;
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
  for (const int64_t groups : {1, 2, 3, 8, 15, 16, 17}) {  // straddle the blocks of turned_planes.cpp
    test_grouped(kernels, isa, grouped(groups, 2, depthwise(0, 2, 5, 7, 3, 3, 1, 1, 1, 1, 1, 1)));
    test_grouped(kernels, isa, grouped(groups, 3, depthwise(0, 1, 6, 5, 5, 4, 2, 2, 2, 1, 1, 1)));
    test_grouped(kernels, isa, grouped(groups, 1, depthwise(0, 4, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1)));
    test_grouped(kernels, isa, grouped(groups, 4, depthwise(0, 4, 7, 9, 3, 3, 3, 3, 1, 1, 1, 1)));
  }
  for (const int64_t per_group : {4, 15, 16, 17}) {  // the unrolled kernels hold the weights of 16
    test_grouped(kernels, isa, grouped(2, per_group, depthwise(0, 2, 5, 18, 3, 3, 1, 1, 1, 1, 1, 1)));
  }
  test_grouped(kernels, isa, grouped(2, 3, depthwise(0, 2, 9, 12, 3, 2, 2, 3, 1, 0, 2, 1)));
}

// Outputs large enough to be written around the cache.
void test_large(const refconv::cpu::InstructionSet& set) {
  const auto& kernels = set.kernels.grouped<float>();
  test_grouped(kernels, set.name, depthwise(4, 1, 512, 1033, 3, 3, 1, 1, 1, 1, 1, 1));
  test_grouped(kernels, set.name, depthwise(4, 1, 1300, 416, 3, 3, 1, 1, 1, 1, 1, 1));  // whole lines
  test_grouped(kernels, set.name, depthwise(4, 1, 512, 1040, 3, 3, 2, 2, 1, 1, 1, 1));  // whole lines
  test_grouped(kernels, set.name, depthwise(42801, 1, 7, 7, 2, 2, 1, 1, 1, 1, 1, 1));
  test_grouped(kernels, set.name, depthwise(42801, 1, 7, 7, 3, 3, 1, 1, 1, 1, 1, 1));
}

}  // namespace

void test_convolutions(const InstructionSet& set) {
  test_grouped_all<float>(set);
  test_grouped_all<double>(set);
  test_grouped_all<BFloat16>(set);
  test_grouped_all<Half>(set);
  test_large(set);
}
