#include "csrc/tier/memory_tier.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace cachedattn {

Result<std::unique_ptr<MemoryTier>> MemoryTier::Open(Tier tier, uint64_t bytes,
                                                     const KvLayout& layout) {
  const bool device = tier == Tier::kDevice;
  const char* option = device ? "device_bytes" : "dram_bytes";
  const uint64_t slot_bytes = device ? layout.payload_bytes() : layout.host_slot_bytes();
  const uint64_t num_slots = std::min<uint64_t>(bytes / slot_bytes, INT32_MAX);
  if (num_slots == 0) {
    return Status(Code::kInvalidArgument, std::string(option) + ": " + std::to_string(bytes) +
                                              " bytes hold no block of " +
                                              std::to_string(slot_bytes) + " bytes");
  }
  const uint64_t mapping_bytes = num_slots * slot_bytes + kHugePage;
  void* mapping = mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return Status(Code::kExhausted, std::string(option) + ": cannot map " +
                                        std::to_string(mapping_bytes) +
                                        " bytes: " + std::strerror(errno));
  }
  // Before first touch, or the pages are small for good. Disk transfers into 4 KiB pages run at
  // half the rate; a system without huge pages is slower, not wrong.
  (void)madvise(mapping, mapping_bytes, MADV_HUGEPAGE);
  const uint64_t header_bytes = device ? 0 : KvLayout::kHeaderBytes;
  return std::unique_ptr<MemoryTier>(new MemoryTier(
      mapping, mapping_bytes, slot_bytes, header_bytes, static_cast<uint32_t>(num_slots)));
}

MemoryTier::MemoryTier(void* mapping, uint64_t mapping_bytes, uint64_t slot_bytes,
                       uint64_t header_bytes, uint32_t num_slots)
    : mapping_(mapping),
      mapping_bytes_(mapping_bytes),
      slot_bytes_(slot_bytes),
      header_bytes_(header_bytes),
      base_(reinterpret_cast<std::byte*>(AlignUp(reinterpret_cast<uintptr_t>(mapping), kHugePage))),
      slots_(num_slots) {}

MemoryTier::~MemoryTier() { munmap(mapping_, mapping_bytes_); }

}  // namespace cachedattn
