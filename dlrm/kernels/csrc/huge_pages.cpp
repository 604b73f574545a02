// dlrm::advise_huge_pages: asks the kernel for 2 MiB pages under a large tensor.
//
// A lookup in a large table misses the TLB as well as the cache. With 4 KiB pages, walking the page table is
// one more miss; with 2 MiB pages, the page table is small enough to stay in the cache.

#include "ops.h"

#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // known to Linux 6.1, but not to C libraries of its time; older systems refuse it
#endif
#endif

namespace dlrm {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(2) << 20;

}  // namespace

void advise_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + tensor.nbytes()) / kHugePage * kHugePage;
  // This is advice: if the kernel cannot follow it, only time is lost. So no result is checked.
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE);  // for pages that exist already
  }
#endif
}

}  // namespace dlrm
