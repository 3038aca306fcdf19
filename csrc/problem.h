// The problems the kernels solve, as plain structs. No torch here: a kernel takes a problem and raw
// pointers, so it compiles in seconds and is tested from C++ alone.
#pragma once

#include <cstdint>

namespace refconv {

// Grouped convolution, weight [out_channels, per_group, kernel_h, kernel_w], in NCHW index order, with
// first = co / multiplier * per_group:
//   y[n, co, i, j] = bias[co]
//     + sum_{m,a,b} w[co, m, a, b] * x[n, first + m, i * stride_h - pad_h + a * dilation_h,
//                                                    j * stride_w - pad_w + b * dilation_w]
// Depthwise is one input channel per group.
// Feature maps are dense, in NCHW or, where an entry point says so, in NHWC (channels_last) memory order.
struct GroupedProblem {
  int64_t batch;
  int64_t channels;    // input channels
  int64_t multiplier;  // output channels per group
  int64_t in_h, in_w;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;  // top and left; what lies beyond the input is zero
  int64_t dilation_h, dilation_w;

  int64_t per_group = 1;  // input channels per group

  int64_t groups() const { return channels / per_group; }
  int64_t out_channels() const { return groups() * multiplier; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t group_taps() const { return multiplier * per_group * taps(); }  // weights of a group
  int64_t in_size() const { return in_h * in_w; }
  int64_t out_size() const { return out_h * out_w; }
};

// The Refocusing Transformation (Eq. 1 and 2 of the paper). `kernels` 2-D kernels in row-major (out, in)
// order; each refocus group mixes `group_size` consecutive ones:
//   W_t[n] = identity * W_b[n] + sum_{j < group_size} correlate(W_b[first_of_group(n) + j], W_r[n, j])
// with zero padding map_size / 2. W_b, W_t: [kernels, kernel_h, kernel_w];
// W_r: [kernels, group_size, map_size, map_size].
struct RefocusProblem {
  int64_t kernels;     // N = C_out * C_in / g
  int64_t group_size;  // g
  int64_t kernel_h, kernel_w;
  int64_t map_size;  // k, odd
  bool identity;

  int64_t kernel_size() const { return kernel_h * kernel_w; }
  int64_t map_taps() const { return map_size * map_size; }
  int64_t row_length() const { return group_size * map_taps(); }  // entries of W_r per kernel
};

// The thin form of the Refocusing Transformation (docs/numerics.md): kernel n of refocus group t = n / group_size has
//   W_t[n] = identity * W_b[n] + sum_{i < rank} E[n, i] * R[t, i]
// W_b, W_t: [kernels, kernel_size]; E: [kernels, rank]; R: [kernels / group_size, rank, kernel_size].
struct ThinProblem {
  int64_t kernels;
  int64_t group_size;
  int64_t rank;
  int64_t kernel_size;
  bool identity;
};

// AdamW on W_r in the coordinates E = W_r Q of the thin form. Per row of E, in order: S <- keep S + (1 - keep) g g^T,
// where S = U^T U and U is upper triangular, and
//   direction = sum_j Q_j scale_first (m . Q_j) / (scale_second |U Q_j| + eps)
// over the `columns` rows Q_j of its refocus group's Q; a term that is 0/0 counts as 0.
// m, g, direction: [rows, rank]; U: [rows, root_size()], its rows from the diagonal on; Q transposed:
// [rows / per_group, rank, columns].
struct FoldedAdamProblem {
  int64_t rows;
  int64_t per_group;  // rows per refocus group
  int64_t columns;    // g k^2
  int64_t rank;
  double keep;
  double scale_first, scale_second, eps;

  int64_t root_size() const { return rank * (rank + 1) / 2; }
};

// SGD on W_r from dW_t, and the W_t of the next step. Per entry of W_r, with its gradient dW_r (of RefocusProblem):
//   d = (maximize ? -dW_r : dW_r) + weight_decay W_r
//   m <- first ? d : momentum m + (1 - dampening) d      (only if momentum is not 0)
//   W_r <- W_r - lr (momentum is 0 ? d : nesterov ? d + momentum m : m)
struct FusedSgdProblem {
  RefocusProblem transformation;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first;  // m holds nothing yet
};

// Element types that are stored in 16 bits and computed with in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Half> {
  using type = float;
};
// The type that elements of type S are computed with.
template <typename S>
using Compute = typename ComputeOf<S>::type;

}  // namespace refconv
