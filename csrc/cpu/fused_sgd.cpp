// SGD on the W_r of 3x3 bases: dW_r from dW_t, its step, and the W_t of the next forward, in one pass.
//
// Equations: csrc/problem.h. Ownership: 2-D kernels per task.
// Bytes: reads and writes W_r and the momentum; for a dense basis, whose other tensors are as large, also reads W_b and
// dW_t and writes W_t where dW_t was: seven times W_r, two more than SGD alone; otherwise four times, one less, since
// dW_r is never in memory: a part of it stays in the first cache.
// Multiply-adds: as many as both transformations; 98 per dense kernel, 18 per entry of W_r otherwise.
#include "elements.h"
#include "entry_points.h"
#include "refocus_dense_3x3.h"
#include "refocus_wide.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {
namespace {

// One step on `count` entries of W_r. `momentum` may be null if p.momentum is 0. The entries `ahead` are fetched, those
// of the momentum only with `FETCH_MOMENTUM`.
template <bool FETCH_MOMENTUM, typename T>
void step(const FusedSgdProblem& p, const T* grad, T* refocus, T* momentum, int64_t count, int64_t ahead) {
  const Vec<T> sign = broadcast(T(p.maximize ? -1 : 1)), decay = broadcast(static_cast<T>(p.weight_decay));
  const Vec<T> keep = broadcast(static_cast<T>(p.momentum)), take = broadcast(static_cast<T>(1 - p.dampening));
  const Vec<T> rate = broadcast(static_cast<T>(-p.lr));
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    prefetch(refocus + i + ahead, kLanes<T>);
    const Vec<T> weight = load_lanes(refocus + i, count - i);
    Vec<T> direction = sign * load_lanes(grad + i, count - i) + decay * weight;
    if (momentum != nullptr) {
      if (FETCH_MOMENTUM) prefetch(momentum + i + ahead, kLanes<T>);
      const Vec<T> moved = p.first ? direction : keep * load_lanes<T>(momentum + i, count - i) + take * direction;
      store_lanes(momentum + i, moved, count - i);
      direction = p.nesterov ? direction + keep * moved : moved;
    }
    store_lanes(refocus + i, weight + rate * direction, count - i);
  }
}

template <typename T>
void dense_sgd(const FusedSgdProblem& p, const T* basis, T* transformed, T* refocus, T* momentum, int64_t begin,
               int64_t end) {
  constexpr int64_t kHeld = 64;  // kernels whose dW_r is held
  const auto forward = p.transformation.identity ? refocus_some_kernels<T, true> : refocus_some_kernels<T, false>;
  alignas(64) T held[kHeld * 9];
  for (int64_t n = begin; n < end; n += kHeld) {
    const int64_t count = least(kHeld, end - n), at = n * 9;
    refocus_some_kernels<T, false>(basis + at, transformed + at, held, count, true);
    step<true>(p, held, refocus + at, momentum == nullptr ? nullptr : momentum + at, count * 9, kHeld * 9);
    forward(basis + at, refocus + at, transformed + at, count, true);
  }
}

// The same for wide groups, in the loops of refocus_wide.h: a block of U meets some rows of W_r both ways.
template <typename T>
class WideSgd {
 public:
  explicit WideSgd(const FusedSgdProblem& p)
      : p_(p),
        length_(p.transformation.row_length()),
        u_(p.transformation),
        held_(kAtOnce * u_.block()),
        grads_(kRowGroup * kTaps3x3),
        sums_(kRowGroup * kTaps3x3) {}

  void run(const T* basis, T* transformed, T* refocus, T* momentum, int64_t begin, int64_t end) {
    for_each_group(p_.transformation, begin, end, [&](int64_t first, int64_t n, int64_t last) {
      u_.fill(basis + first * kTaps3x3);
      for (; n < last; n += kRowGroup) {
        rows(least(kRowGroup, last - n), basis + n * kTaps3x3, transformed + n * kTaps3x3, refocus + n * length_,
             momentum == nullptr ? nullptr : momentum + n * length_);
      }
    });
  }

 private:
  static constexpr int kAtOnce = kRows<kColumns>;

  void rows(int64_t count, const T* basis, T* transformed, T* refocus, T* momentum) {
    for (int64_t k = 0; k < count * kTaps3x3; ++k) grads_[k] = transformed[k], sums_[k] = Vec<T>{};
    for (int64_t q = 0; q < length_; q += u_.block()) {
      const int64_t end = least(q + u_.block(), length_);
      for (int64_t r = 0, some; r < count; r += some) {
        some = count - r < kAtOnce ? 1 : kAtOnce;
        // What comes next: the following rows, the first ones of the next block, or of the next group.
        const int64_t next = r + some < count ? some * length_
                             : end < length_  ? end - q - r * length_
                                              : (count - r) * length_ - q;
        const auto run = some == kAtOnce ? &WideSgd::some_rows<kAtOnce> : &WideSgd::some_rows<1>;
        (this->*run)(r, q, end, next, refocus, momentum);
      }
    }
    for (int64_t k = 0; k < count * kTaps3x3; ++k) {
      const T start = p_.transformation.identity ? basis[k] : T(0);
      transformed[k] = static_cast<T>(static_cast<double>(start) + sum<T>(sums_[k]));
    }
  }

  template <int ROWS>
  void some_rows(int64_t r, int64_t q, int64_t end, int64_t next, T* refocus, T* momentum) {
    const int64_t block = u_.block();
    const auto backward = kHoldsGradients ? backward_rows_held<T, ROWS, kTaps3x3> : backward_rows<T, ROWS>;
    backward(p_.transformation, u_, grads_.data() + r * kTaps3x3, held_.data(), block, q, end, false);
    for (int64_t n = 0; n < ROWS; ++n) {
      const int64_t at = (r + n) * length_ + q;
      step<false>(p_, held_.data() + n * block, refocus + at, momentum == nullptr ? nullptr : momentum + at, end - q,
                  next);
    }
    const int64_t first = r * length_;
    const T* fetched = (momentum != nullptr ? momentum : refocus) + first + q + next;
    product<T, ROWS, ROWS == 1 ? kTaps3x3 : kColumns>(refocus + first, length_, u_, q, end, 0, kTaps3x3, fetched,
                                                      sums_.data() + r * kTaps3x3);
  }

  const FusedSgdProblem& p_;
  const int64_t length_;
  Unfolded<T> u_;
  Scratch<T> held_, grads_;
  Scratch<Vec<T>> sums_;
};

}  // namespace

template <typename T>
void fused_sgd(const FusedSgdProblem& p, const T* basis, T* transformed, T* refocus, T* momentum, int64_t begin,
               int64_t end) {
  if (is_dense_3x3(p.transformation)) return dense_sgd(p, basis, transformed, refocus, momentum, begin, end);
  WideSgd<T>(p).run(basis, transformed, refocus, momentum, begin, end);
}

REFCONV_INSTANTIATE_FUSED_SGD(float)
REFCONV_INSTANTIATE_FUSED_SGD(double)

}  // namespace refconv::cpu::REFCONV_ISA
