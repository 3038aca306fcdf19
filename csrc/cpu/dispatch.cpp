#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace refconv::cpu {

#define REFCONV_DECLARE_ISA(isa)            \
  namespace isa {                           \
  extern const Kernels<float> kernels_f32;  \
  extern const Kernels<double> kernels_f64; \
  }

REFCONV_DECLARE_ISA(portable)
#ifdef REFCONV_X86
REFCONV_DECLARE_ISA(avx2)
REFCONV_DECLARE_ISA(avx512)
#endif

namespace {

const InstructionSet kInstructionSets[] = {
#ifdef REFCONV_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
     },
     avx512::kernels_f32, avx512::kernels_f64},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::kernels_f32,
     avx2::kernels_f64},
#endif
    {"portable", [] { return true; }, portable::kernels_f32, portable::kernels_f64},
};

const InstructionSet* find(const std::string& name) {
  std::string known;
  for (const InstructionSet* set : instruction_sets()) {
    if (name == set->name) return set;
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction set (='" + name + "') must be one that this machine runs: " + known);
}

std::atomic<const InstructionSet*>& active() {
  static std::atomic<const InstructionSet*> chosen{[] {
    const char* wanted = std::getenv("REFCONV_CPU_ISA");
    return wanted != nullptr && *wanted != '\0' ? find(wanted) : instruction_sets().front();
  }()};
  return chosen;
}

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) sets.push_back(&set);
  }
  return sets;
}

const InstructionSet& instruction_set() { return *active().load(std::memory_order_relaxed); }

void set_instruction_set(const std::string& name) { active().store(find(name), std::memory_order_relaxed); }

template <>
const Kernels<float>& kernels<float>() {
  return instruction_set().f32;
}

template <>
const Kernels<double>& kernels<double>() {
  return instruction_set().f64;
}

}  // namespace refconv::cpu
