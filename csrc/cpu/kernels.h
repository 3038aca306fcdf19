// Entry points of the CPU kernels, and the choice of instruction set at run time.
//
// The kernels are compiled once per instruction set (see CMakeLists.txt); each copy fills one table of function
// pointers. An entry point works on a range [begin, end) of independent
// tasks, so the caller decides how to spread them over threads; results do not depend on the split.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"
#include "choice.h"

namespace refconv::cpu {

// S is the type that is stored: float, double, BFloat16 or Half; the last two are computed with in float.
template <typename S>
struct GroupedKernels {
  // Tasks: the batch * out_channels output planes. bias may be null.
  void (*forward)(const GroupedProblem&, const S* x, const S* weight, const S* bias, S* y, int64_t begin, int64_t end);
  // Tasks: the input channels. Any of grad_x, grad_weight, grad_bias may be null.
  void (*backward)(const GroupedProblem&, const S* grad_y, const S* x, const S* weight, S* grad_x, S* grad_weight,
                   S* grad_bias, int64_t begin, int64_t end);

  // The same for small planes, a block of whose channels is turned into the lanes of vectors: has_turned_planes().
  // Tasks: batch * groups of all images.
  void (*turned_forward)(const GroupedProblem&, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                         int64_t end);
  // Tasks: the groups, of `chunks` parts of the batch one after the other. grad_x may be null. Sets totals, of
  // (per_group * taps + 1) * out_channels numbers per chunk: the sums of dW [multiplier, taps, channels], then
  // those of dbias, anything where not needed. They depend on `chunks`, so that must not depend on the threads.
  void (*turned_backward)(const GroupedProblem&, const S* grad_y, const S* x, const S* weight, S* grad_x,
                          double* totals, int64_t chunks, bool need_weight, bool need_bias, int64_t begin, int64_t end);

  // The same for channels_last feature maps.
  // Tasks: the batch * out_h output rows.
  void (*nhwc_forward)(const GroupedProblem&, const S* x, const S* weight, const S* bias, S* y, int64_t begin,
                       int64_t end);
  // Tasks: `chunks` parts of the rows of all images, for every `block` channels of x; that is all of them for
  // has_nhwc_3x3(). Otherwise as turned_backward.
  void (*nhwc_backward)(const GroupedProblem&, const S* grad_y, const S* x, const S* weight, S* grad_x, double* totals,
                        int64_t chunks, int64_t block, bool need_weight, bool need_bias, int64_t begin, int64_t end);
  // Tasks: the groups. Adds up the chunks of totals, in the first of them. Either output may be null.
  void (*add_chunks)(const GroupedProblem&, bool nhwc, const S* grad_y, const S* x, double* totals, int64_t chunks,
                     S* grad_weight, S* grad_bias, int64_t begin, int64_t end);
};

template <typename S>
struct RefocusKernels {
  // Tasks: the 2-D kernels.
  void (*forward)(const RefocusProblem&, const S* basis, const S* refocus, S* transformed, int64_t begin, int64_t end);
  void (*backward)(const RefocusProblem&, const S* grad_transformed, const S* basis, S* grad_refocus, int64_t begin,
                   int64_t end);
};

template <typename S>
struct ThinKernels {
  // Tasks: the 2-D kernels.
  void (*forward)(const ThinProblem&, const S* basis, const S* coordinates, const S* factor, S* transformed,
                  int64_t begin, int64_t end);
  void (*backward)(const ThinProblem&, const S* grad_transformed, const S* factor, S* grad_coordinates, int64_t begin,
                   int64_t end);
};

// Tasks: the rows of E. first and gradient are m and g, root is U before and updated after g.
template <typename T>
using FoldedAdamKernel = void (*)(const FoldedAdamProblem&, const T* first, const T* root, const T* gradient,
                                  const T* rotation, T* updated, T* direction, int64_t begin, int64_t end);

// Tasks: the 2-D kernels. transformed is dW_t before and W_t after. For 3x3 kernels; momentum may be null if that of
// the problem is 0.
template <typename T>
using FusedSgdKernel = void (*)(const FusedSgdProblem&, const T* basis, T* transformed, T* refocus, T* momentum,
                                int64_t begin, int64_t end);

struct Kernels {
  int vector_registers;
  GroupedKernels<float> grouped_f32;
  GroupedKernels<double> grouped_f64;
  GroupedKernels<BFloat16> grouped_bf16;
  GroupedKernels<Half> grouped_f16;
  RefocusKernels<float> refocus_f32;
  RefocusKernels<double> refocus_f64;
  RefocusKernels<BFloat16> refocus_bf16;
  RefocusKernels<Half> refocus_f16;
  ThinKernels<float> thin_f32;
  ThinKernels<double> thin_f64;
  ThinKernels<BFloat16> thin_bf16;
  ThinKernels<Half> thin_f16;
  FoldedAdamKernel<float> folded_adam_f32;
  FoldedAdamKernel<double> folded_adam_f64;
  FusedSgdKernel<float> fused_sgd_f32;
  FusedSgdKernel<double> fused_sgd_f64;

  template <typename S>
  const GroupedKernels<S>& grouped() const;
  template <typename S>
  const RefocusKernels<S>& refocus() const;
  template <typename S>
  const ThinKernels<S>& thin() const;
  template <typename T>
  FoldedAdamKernel<T> folded_adam() const;
  template <typename T>
  FusedSgdKernel<T> fused_sgd() const;
};

// clang-format off
template <> inline const GroupedKernels<float>& Kernels::grouped() const { return grouped_f32; }
template <> inline const GroupedKernels<double>& Kernels::grouped() const { return grouped_f64; }
template <> inline const GroupedKernels<BFloat16>& Kernels::grouped() const { return grouped_bf16; }
template <> inline const GroupedKernels<Half>& Kernels::grouped() const { return grouped_f16; }
template <> inline const RefocusKernels<float>& Kernels::refocus() const { return refocus_f32; }
template <> inline const RefocusKernels<double>& Kernels::refocus() const { return refocus_f64; }
template <> inline const RefocusKernels<BFloat16>& Kernels::refocus() const { return refocus_bf16; }
template <> inline const RefocusKernels<Half>& Kernels::refocus() const { return refocus_f16; }
template <> inline const ThinKernels<float>& Kernels::thin() const { return thin_f32; }
template <> inline const ThinKernels<double>& Kernels::thin() const { return thin_f64; }
template <> inline const ThinKernels<BFloat16>& Kernels::thin() const { return thin_bf16; }
template <> inline const ThinKernels<Half>& Kernels::thin() const { return thin_f16; }
template <> inline FoldedAdamKernel<float> Kernels::folded_adam() const { return folded_adam_f32; }
template <> inline FoldedAdamKernel<double> Kernels::folded_adam() const { return folded_adam_f64; }
template <> inline FusedSgdKernel<float> Kernels::fused_sgd() const { return fused_sgd_f32; }
template <> inline FusedSgdKernel<double> Kernels::fused_sgd() const { return fused_sgd_f64; }
// clang-format on

struct InstructionSet {
  const char* name;
  int64_t vector_bytes;
  bool (*runs_here)();
  const Kernels& kernels;
};

// Every instruction set compiled in that this machine runs, best first; "portable" is always last.
std::vector<const InstructionSet*> instruction_sets();
// The one in use: the best one, unless the environment's REFCONV_CPU_ISA or set_instruction_set() names another.
const InstructionSet& instruction_set();
// Use the one named, and no other, from now on; "auto" returns to the choice by problem. Throws
// std::invalid_argument when `name` was not compiled in or does not run on this machine.
void set_instruction_set(const std::string& name);

// For rows of `width` elements of `element_bytes`: unless one was named, the one whose vectors take the least time, the
// wider of equals. A row of 7 floats is one vector with either of two widths; one of 56 is 4 of 64 bytes or 7 of 32,
// which take longer, unless the processor computes the wide ones in halves.
const InstructionSet& instruction_set_for_rows(int64_t width, int64_t element_bytes);
// The size of the last cache, and of the second one of a core; 32 MB and 512 KB where the processor does not say.
int64_t last_cache_bytes();
int64_t second_cache_bytes();
// Whether the processor computes vectors of 64 bytes in two halves, as Zen 4 does.
bool has_half_width_units();
// For a transformation: unless one was named, dense 3x3 bases take vectors of 32 bytes where those of 64 are computed
// in halves. Turning the taps of so many kernels is three steps instead of four, and as fast per byte.
const InstructionSet& instruction_set_for(const RefocusProblem& p);

}  // namespace refconv::cpu
