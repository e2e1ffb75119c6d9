#include "csrc/tier/memory_tier.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace cachedattn {

namespace {

constexpr auto kPoison = std::byte{0xFF};  // NaN in each dtype

bool IsPoison(const std::byte* bytes, uint64_t size) {
  return bytes[0] == kPoison && std::memcmp(bytes, bytes + 1, size - 1) == 0;
}

}  // namespace

Result<std::unique_ptr<MemoryTier>> MemoryTier::Open(Tier tier, uint64_t bytes,
                                                     const KvLayout& layout, bool poison) {
  const bool device = tier == Tier::kDevice;
  const char* option = device ? "device_bytes" : "dram_bytes";
  const uint64_t slot_bytes = device ? layout.payload_bytes() : layout.host_slot_bytes();
  const uint64_t num_slots = std::min<uint64_t>(bytes / slot_bytes, INT32_MAX);
  if (num_slots == 0) {
    return Status(Code::kInvalidArgument, std::string(option) + ": " + std::to_string(bytes) +
                                              " bytes hold no block of " +
                                              std::to_string(slot_bytes) + " bytes");
  }
  // A slab of less than a huge page would have one cleared for it.
  const uint64_t alignment = num_slots * slot_bytes < kHugePage ? kPage : kHugePage;
  const uint64_t mapping_bytes = num_slots * slot_bytes + (alignment - kPage);
  void* mapping = mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    return Status(Code::kExhausted, std::string(option) + ": cannot map " +
                                        std::to_string(mapping_bytes) +
                                        " bytes: " + std::strerror(errno));
  }
  // Before first touch, or the pages are small for good. Disk transfers into 4 KiB pages run at
  // half the rate; a system without huge pages is slower, not wrong.
  if (alignment == kHugePage) (void)madvise(mapping, mapping_bytes, MADV_HUGEPAGE);
  const uint64_t header_bytes = device ? 0 : KvLayout::kHeaderBytes;
  return std::unique_ptr<MemoryTier>(new MemoryTier(mapping, mapping_bytes, layout, slot_bytes,
                                                    header_bytes, static_cast<uint32_t>(num_slots),
                                                    poison));
}

MemoryTier::MemoryTier(void* mapping, uint64_t mapping_bytes, const KvLayout& layout,
                       uint64_t slot_bytes, uint64_t header_bytes, uint32_t num_slots, bool poison)
    : mapping_(mapping),
      mapping_bytes_(mapping_bytes),
      layout_(layout),
      slot_bytes_(slot_bytes),
      header_bytes_(header_bytes),
      base_(reinterpret_cast<std::byte*>(AlignUp(reinterpret_cast<uintptr_t>(mapping),
                                                 mapping_bytes < kHugePage ? kPage : kHugePage))),
      poisoned_(poison ? num_slots : 0),
      slots_(num_slots, poison ? [this](SlotId id, bool taken) { OnSlot(id, taken); }
                               : std::function<void(SlotId, bool)>()) {}

void MemoryTier::LeaveOutOfDumps() { (void)madvise(mapping_, mapping_bytes_, MADV_DONTDUMP); }

MemoryTier::~MemoryTier() { munmap(mapping_, mapping_bytes_); }

// Poisons a place that comes back, and one that is taken for the first time: memory comes from the
// system when it is written, so not all of it at open. What is not K or V stays as it is.
void MemoryTier::OnSlot(SlotId id, bool taken) {
  const uint64_t bytes = layout_.slice_bytes();
  for (uint32_t layer = 0; layer < layout_.num_layers; ++layer) {
    std::byte* slice = payload(id) + layout_.device_slice_offset(layer);
    if (taken && poisoned_[id]) {
      CA_CHECK(IsPoison(slice, bytes));  // else somebody wrote to a place that was not his
    } else {
      std::memset(slice, static_cast<int>(kPoison), bytes);
    }
  }
  poisoned_[id] = true;
}

}  // namespace cachedattn
