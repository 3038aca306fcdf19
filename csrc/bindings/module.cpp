// The registration of the operators, and the pybind11 module with what is not one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(refconv_cpu, CPU, m) {
  using namespace refconv::bindings;
  m.impl("folded_adam", TORCH_BOX(&folded_adam));
  m.impl("fused_sgd", TORCH_BOX(&fused_sgd));
  m.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d));
  m.impl("grouped_conv2d_backward", TORCH_BOX(&grouped_conv2d_backward));
  m.impl("refconv2d", TORCH_BOX(&refconv2d));
  m.impl("refconv2d_backward", TORCH_BOX(&refconv2d_backward));
  m.impl("refocus_weight", TORCH_BOX(&refocus_weight));
  m.impl("refocus_weight_backward", TORCH_BOX(&refocus_weight_backward));
  m.impl("thin_refconv2d", TORCH_BOX(&thin_refconv2d));
  m.impl("thin_refconv2d_backward", TORCH_BOX(&thin_refconv2d_backward));
  m.impl("thin_refocus_weight", TORCH_BOX(&thin_refocus_weight));
  m.impl("thin_refocus_weight_backward", TORCH_BOX(&thin_refocus_weight_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of refconv_kernels: build facts and the choice of instruction set.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = REFCONV_COMPILER;
        info["torch_headers"] = TORCH_VERSION;
        info["torch_abi_target"] = REFCONV_TORCH_TARGET;
        info["build_type"] = REFCONV_BUILD_TYPE;
        return info;
      },
      "Compiler, the torch whose headers were used, the oldest torch this binary runs with, and the build type.");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const auto* set : refconv::cpu::instruction_sets()) names.emplace_back(set->name);
        return names;
      },
      "Instruction sets compiled in that this machine runs, best first.");
  m.def(
      "instruction_set", [] { return refconv::cpu::instruction_set().name; },
      "The instruction set in use: the one named, or the best.");
  m.def(
      "instruction_set_for_rows",
      [](int64_t width, int64_t element_bytes) {
        return refconv::cpu::instruction_set_for_rows(width, element_bytes).name;
      },
      pybind11::arg("width"), pybind11::arg("element_bytes"),
      "The instruction set that a grouped convolution with output rows of `width` elements gets.");
  m.def("has_half_width_units", &refconv::cpu::has_half_width_units,
        "Whether the processor computes vectors of 64 bytes in two halves.");
  m.def("grouped_kernel", &refconv::bindings::grouped_kernel, pybind11::arg("input"), pybind11::arg("weight"),
        pybind11::arg("stride"), pybind11::arg("padding"), pybind11::arg("dilation"), pybind11::arg("channels_last"),
        pybind11::arg("element_bytes"), "The kernel that runs a convolution of these shapes forward, in words.");
  m.def(
      "set_instruction_set", [](const std::string& name) { refconv::cpu::set_instruction_set(name); },
      pybind11::arg("name"), "Use only this instruction set from now on, for tests and measurements; or \"auto\".");
}
