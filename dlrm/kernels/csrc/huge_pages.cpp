// dlrm::advise_huge_pages: asks the kernel for 2 MiB pages under a large tensor.
//
// A lookup in a large table misses the TLB as well as the cache. With 4 KiB pages the walk through the page table is a
// miss of its own; with 2 MiB pages that table is small enough to stay in the cache.

#include "ops.h"

#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // since Linux 6.1, but not in the headers of that time's C library; older systems refuse it
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
  // Only advice: where the kernel cannot follow it, nothing is lost but time, so there is nothing to check.
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE);  // what has been written in small pages
  }
#endif
}

}  // namespace dlrm
