// The pybind11 module, with what is not a tensor operator. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <string>
#include <vector>

#include "../cpu/kernels.h"

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
  m.def(
      "set_instruction_set", [](const std::string& name) { refconv::cpu::set_instruction_set(name); },
      pybind11::arg("name"), "Use only this instruction set from now on, for tests and measurements; or \"auto\".");
}
