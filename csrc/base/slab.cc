#include "csrc/base/slab.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>

namespace cachedattn {

namespace {

class HostSlab final : public Slab {
 public:
  HostSlab(std::span<std::byte> bytes, void* mapping, uint64_t mapping_bytes)
      : Slab(bytes), mapping_(mapping), mapping_bytes_(mapping_bytes) {}
  ~HostSlab() override { munmap(mapping_, mapping_bytes_); }
  HostSlab(const HostSlab&) = delete;
  HostSlab& operator=(const HostSlab&) = delete;

  bool on_host() const override { return true; }
  void Fill(std::byte* at, int value, uint64_t size) override { std::memset(at, value, size); }
  void LeaveOutOfDumps() override { (void)madvise(mapping_, mapping_bytes_, MADV_DONTDUMP); }

 private:
  void* const mapping_;
  const uint64_t mapping_bytes_;
};

}  // namespace

Result<std::unique_ptr<Slab>> MapHostSlab(uint64_t bytes) {
  // A slab of less than a huge page would have one cleared for it.
  const uint64_t alignment = bytes < kHugePage ? kPage : kHugePage;
  const uint64_t mapping_bytes = bytes + (alignment - kPage);
  void* mapping = mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return Status(Code::kExhausted, "cannot map " + std::to_string(mapping_bytes) +
                                        " bytes: " + std::strerror(errno));
  }
  // Before first touch, or the pages are small for good. Disk transfers into 4 KiB pages run at
  // half the rate; a system without huge pages is slower, not wrong.
  if (alignment == kHugePage) (void)madvise(mapping, mapping_bytes, MADV_HUGEPAGE);
  const auto base = AlignUp(reinterpret_cast<uintptr_t>(mapping), alignment);
  return std::unique_ptr<Slab>(std::make_unique<HostSlab>(
      std::span(reinterpret_cast<std::byte*>(base), bytes), mapping, mapping_bytes));
}

}  // namespace cachedattn
