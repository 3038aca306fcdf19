#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {

extern const Kernels<float> kernels_f32;
const Kernels<float> kernels_f32 = {depthwise_forward<float>, depthwise_backward<float>, refocus_forward<float>,
                                    refocus_backward<float>};

extern const Kernels<double> kernels_f64;
const Kernels<double> kernels_f64 = {depthwise_forward<double>, depthwise_backward<double>, refocus_forward<double>,
                                     refocus_backward<double>};

}  // namespace refconv::cpu::REFCONV_ISA
