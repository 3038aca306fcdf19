#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace refconv::cpu {

#define REFCONV_DECLARE_ISA(isa) \
  namespace isa {                \
  extern const Kernels kernels;  \
  }

REFCONV_DECLARE_ISA(portable)
#ifdef REFCONV_AVX2
REFCONV_DECLARE_ISA(avx2)
#endif
#ifdef REFCONV_AVX512VL
REFCONV_DECLARE_ISA(avx512vl)
#endif
#ifdef REFCONV_AVX512
REFCONV_DECLARE_ISA(avx512)
#endif

namespace {

#if defined(REFCONV_AVX512) || defined(REFCONV_AVX512VL)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
#endif

const InstructionSet kInstructionSets[] = {
#ifdef REFCONV_AVX512
    {"avx512", 64, runs_avx512, avx512::kernels},
#endif
#ifdef REFCONV_AVX512VL
    // Half the width with the same 32 registers and masks: for rows that would leave lanes of the above idle.
    {"avx512vl", 32, runs_avx512, avx512vl::kernels},
#endif
#ifdef REFCONV_AVX2
    {"avx2", 32,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     avx2::kernels},
#endif
    {"portable", 16, [] { return true; }, portable::kernels},
};

const InstructionSet* find(const std::string& name) {
  std::string known;
  for (const InstructionSet* set : instruction_sets()) {
    if (name == set->name) return set;
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction set (='" + name + "') must be auto or one that this machine runs: " + known);
}

// The one that was named; null for the choice by problem.
std::atomic<const InstructionSet*>& named() {
  static std::atomic<const InstructionSet*> set{[]() -> const InstructionSet* {
    const char* wanted = std::getenv("REFCONV_CPU_ISA");
    return wanted != nullptr && *wanted != '\0' ? find(wanted) : nullptr;
  }()};
  return set;
}

const std::vector<const InstructionSet*>& found() {
  static const std::vector<const InstructionSet*> sets = instruction_sets();
  return sets;
}

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) sets.push_back(&set);
  }
  return sets;
}

const InstructionSet& instruction_set() {
  const InstructionSet* set = named().load(std::memory_order_relaxed);
  return set != nullptr ? *set : *found().front();
}

void set_instruction_set(const std::string& name) {
  named().store(name == "auto" ? nullptr : find(name), std::memory_order_relaxed);
}

const InstructionSet& instruction_set_for_rows(int64_t width, int64_t element_bytes) {
  const InstructionSet* best = &instruction_set();
  if (named().load(std::memory_order_relaxed) != nullptr) return *best;
  // In halves of what a vector of 32 bytes takes.
  const auto time = [&](const InstructionSet& set) {
    const int64_t lanes = set.vector_bytes / element_bytes;
    return (width + lanes - 1) / lanes * (set.vector_bytes < 64 ? 2 : has_half_width_units() ? 4 : 3);
  };
  for (const InstructionSet* set : found()) {
    const bool fused = set != found().back();  // "portable", the last one, has no fused multiply-add
    if (fused && time(*set) < time(*best)) best = set;
  }
  return *best;
}

namespace {

// The size of a level of the caches, `otherwise` where the processor does not say.
int64_t cache_bytes([[maybe_unused]] unsigned level, int64_t otherwise) {
  int64_t found = otherwise;
#if defined(__x86_64__)
  unsigned highest = 0, a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0, &highest, &b, &c, &d) == 0) return found;
  // Both makers describe one cache per number, in the same way; the last one of a level holds data.
  const unsigned leaf = c == signature_AMD_ecx ? 0x8000001d : 4;
  for (unsigned cache = 0; __get_cpuid_count(leaf, cache, &a, &b, &c, &d) != 0 && (a & 0x1f) != 0; ++cache) {
    const int64_t line = (b & 0xfff) + 1, partitions = (b >> 12 & 0x3ff) + 1, ways = (b >> 22) + 1;
    if ((a >> 5 & 7) == level) found = line * partitions * ways * (int64_t{c} + 1);
  }
#endif
  return found;
}

}  // namespace

int64_t second_cache_bytes() {
  static const int64_t bytes = cache_bytes(2, int64_t{512} << 10);
  return bytes;
}

int64_t last_cache_bytes() {
  static const int64_t bytes = cache_bytes(3, int64_t{32} << 20);
  return bytes;
}

bool has_half_width_units() {
#if defined(REFCONV_AVX512) || defined(REFCONV_AVX512VL)
  static const bool has = [] {
    unsigned highest = 0, b = 0, c = 0, d = 0, a = 0;
    if (__get_cpuid(0, &highest, &b, &c, &d) == 0 || c != signature_AMD_ecx) return false;
    constexpr unsigned kZen4 = 0x19;  // Zen 3 is of this family too, without AVX-512
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (a >> 8 & 0xf) + (a >> 20 & 0xff) == kZen4;
  }();
  return has;
#else
  return false;
#endif
}

const InstructionSet& instruction_set_for(const RefocusProblem& p) {
  constexpr int64_t kDenseBytes = 32;
  if (!is_dense_3x3(p) || !has_half_width_units() || named().load(std::memory_order_relaxed) != nullptr) {
    return instruction_set();
  }
  for (const InstructionSet* set : found()) {
    if (set->vector_bytes == kDenseBytes) return *set;  // portable code is no choice
  }
  return instruction_set();
}

}  // namespace refconv::cpu
