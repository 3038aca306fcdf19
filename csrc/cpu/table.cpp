#include "entry_points.h"
#include "simd.h"

namespace refconv::cpu::REFCONV_ISA {

namespace {

template <typename S>
constexpr GroupedKernels<S> kGrouped = {
    grouped_forward<S>, grouped_backward<S>, turned_forward<S>, turned_backward<S>,
    nhwc_forward<S>,    nhwc_backward<S>,    add_chunks<S>,
};

template <typename S>
constexpr RefocusKernels<S> kRefocus = {refocus_forward<S>, refocus_backward<S>};

template <typename S>
constexpr ThinKernels<S> kThin = {thin_forward<S>, thin_backward<S>};

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    kVectorRegisters, kGrouped<float>,    kGrouped<double>,    kGrouped<BFloat16>, kGrouped<Half>,    kRefocus<float>,
    kRefocus<double>, kRefocus<BFloat16>, kRefocus<Half>,      kThin<float>,       kThin<double>,     kThin<BFloat16>,
    kThin<Half>,      folded_adam<float>, folded_adam<double>, fused_sgd<float>,   fused_sgd<double>,
};

}  // namespace refconv::cpu::REFCONV_ISA
