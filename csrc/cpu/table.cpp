#include "entry_points.h"

namespace refconv::cpu::REFCONV_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    {depthwise_forward<float>, depthwise_backward<float>},
    {depthwise_forward<double>, depthwise_backward<double>},
    {depthwise_forward<BFloat16>, depthwise_backward<BFloat16>},
    {depthwise_forward<Half>, depthwise_backward<Half>},
    {refocus_forward<float>, refocus_backward<float>},
    {refocus_forward<double>, refocus_backward<double>},
};

}  // namespace refconv::cpu::REFCONV_ISA
