// dlrm::advise_huge_pages: asks the kernel for 2 MiB pages under a large tensor.
//
// A lookup in a large table misses the TLB as well as the cache. With 4 KiB pages the walk through the page table is a
// miss of its own; with 2 MiB pages that table is small enough to stay in the cache.

#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dlrm {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(2) << 20;

void advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + tensor.storage().nbytes()) / kHugePage * kHugePage;
  // Only advice: where the kernel cannot follow it, nothing is lost but time, so there is nothing to check.
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#ifdef MADV_COLLAPSE
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE);  // also pages that were written before
#endif
  }
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(dlrm, CPU, m) { m.impl("advise_huge_pages", advise_huge_pages); }

}  // namespace dlrm
