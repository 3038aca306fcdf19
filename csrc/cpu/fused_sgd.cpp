// SGD on the W_r of dense 3x3 bases: dW_r from dW_t, its step, and the W_t of the next forward, in one pass.
//
// Equations: csrc/problem.h. Ownership: 2-D kernels per task.
// Bytes: reads W_b, dW_t, W_r and the momentum, writes the last two and W_t where dW_t was: seven times W_b, two more
// than SGD alone. dW_r stays in the first cache. Multiply-adds: 98 per kernel for both transformations.
#include "elements.h"
#include "entry_points.h"
#include "refocus_dense_3x3.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

constexpr int64_t kHeld = 64;  // kernels whose dW_r is held

// One step on `count` entries of W_r. `momentum` may be null if p.momentum is 0.
template <typename T>
void step(const FusedSgdProblem& p, const T* grad, T* refocus, T* momentum, int64_t count) {
  const Vec<T> sign = broadcast(T(p.maximize ? -1 : 1)), decay = broadcast(static_cast<T>(p.weight_decay));
  const Vec<T> keep = broadcast(static_cast<T>(p.momentum)), take = broadcast(static_cast<T>(1 - p.dampening));
  const Vec<T> rate = broadcast(static_cast<T>(-p.lr));
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    prefetch(refocus + i + kHeld * 9, kLanes<T>);
    const Vec<T> weight = load_lanes(refocus + i, count - i);
    Vec<T> direction = sign * load_lanes(grad + i, count - i) + decay * weight;
    if (momentum != nullptr) {
      prefetch(momentum + i + kHeld * 9, kLanes<T>);
      const Vec<T> moved = p.first ? direction : keep * load_lanes<T>(momentum + i, count - i) + take * direction;
      store_lanes(momentum + i, moved, count - i);
      direction = p.nesterov ? direction + keep * moved : moved;
    }
    store_lanes(refocus + i, weight + rate * direction, count - i);
  }
}

}  // namespace

template <typename T>
void fused_sgd(const FusedSgdProblem& p, const T* basis, T* transformed, T* refocus, T* momentum, int64_t begin,
               int64_t end) {
  const auto forward = p.transformation.identity ? refocus_some_kernels<T, true> : refocus_some_kernels<T, false>;
  alignas(64) T held[kHeld * 9];
  for (int64_t n = begin; n < end; n += kHeld) {
    const int64_t count = least(kHeld, end - n), at = n * 9;
    refocus_some_kernels<T, false>(basis + at, transformed + at, held, count, true);
    step(p, held, refocus + at, momentum == nullptr ? nullptr : momentum + at, count * 9);
    forward(basis + at, refocus + at, transformed + at, count, true);
  }
}

REFCONV_INSTANTIATE_FUSED_SGD(float)
REFCONV_INSTANTIATE_FUSED_SGD(double)

}  // namespace refconv::cpu::REFCONV_ISA
