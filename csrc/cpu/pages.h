// Memory pages of large outputs.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace refconv::cpu {

// Asks for huge pages where `bytes` of fresh memory begin at `data`. A training step allocates its feature maps and
// gradients anew, and the first write to each page of 4 KB then costs as much as the convolution itself. Only whole
// huge pages inside the memory are named; where the system has none to give, nothing changes.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace refconv::cpu
