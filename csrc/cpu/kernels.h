// Entry points of the CPU kernels, and the choice of instruction set at run time.
//
// depthwise.cpp and refocus.cpp are compiled once per instruction set (see CMakeLists.txt); each copy
// fills one table of function pointers. An entry point works on a range [begin, end) of independent
// tasks, so the caller decides how to spread them over threads; results do not depend on the split.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"

namespace refconv::cpu {

template <typename T>
struct Kernels {
  // Tasks: the batch * out_channels output planes. bias may be null.
  void (*depthwise_forward)(const DepthwiseProblem&, const T* x, const T* weight, const T* bias, T* y, int64_t begin,
                            int64_t end);
  // Tasks: the input channels. Any of grad_x, grad_weight, grad_bias may be null.
  void (*depthwise_backward)(const DepthwiseProblem&, const T* grad_y, const T* x, const T* weight, T* grad_x,
                             T* grad_weight, T* grad_bias, int64_t begin, int64_t end);
  // Tasks: the 2-D kernels.
  void (*refocus_forward)(const RefocusProblem&, const T* basis, const T* refocus, T* transformed, int64_t begin,
                          int64_t end);
  void (*refocus_backward)(const RefocusProblem&, const T* grad_transformed, const T* basis, T* grad_refocus,
                           int64_t begin, int64_t end);
};

struct InstructionSet {
  const char* name;
  int64_t vector_bytes;
  bool (*runs_here)();
  const Kernels<float>& f32;
  const Kernels<double>& f64;
};

// Every instruction set compiled in that this machine runs, best first; "portable" is always last.
std::vector<const InstructionSet*> instruction_sets();
// The one in use: the best one, unless the environment's REFCONV_CPU_ISA or set_instruction_set() names another.
const InstructionSet& instruction_set();
// Use the one named, and no other, from now on; "auto" returns to the choice by problem. Throws
// std::invalid_argument when `name` was not compiled in or does not run on this machine.
void set_instruction_set(const std::string& name);

// For rows of `width` elements of `element_bytes`: unless one was named, the one whose vectors they fill best,
// the wider of equals. Rows of 7 floats fill 7 of 8 lanes with AVX2, 7 of 16 with AVX-512.
const InstructionSet& instruction_set_for_rows(int64_t width, int64_t element_bytes);

template <typename T>
const Kernels<T>& kernels_of(const InstructionSet& set);

}  // namespace refconv::cpu
