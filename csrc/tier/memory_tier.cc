#include "csrc/tier/memory_tier.h"

#include <algorithm>
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
                                                     const KvLayout& layout, bool poison,
                                                     const AllocateSlab& allocate) {
  const bool device = tier == Tier::kDevice;
  const char* option = device ? "device_bytes" : "dram_bytes";
  const uint64_t slot_bytes = device ? layout.payload_bytes() : layout.host_slot_bytes();
  const uint64_t num_slots = std::min<uint64_t>(bytes / slot_bytes, INT32_MAX);
  if (num_slots == 0) {
    return Status(Code::kInvalidArgument, std::string(option) + ": " + std::to_string(bytes) +
                                              " bytes hold no block of " +
                                              std::to_string(slot_bytes) + " bytes");
  }
  auto slab = allocate(num_slots * slot_bytes);
  if (!slab.ok()) {
    return Status(slab.status().code(), std::string(option) + ": " + slab.status().message());
  }
  const uint64_t header_bytes = device ? 0 : KvLayout::kHeaderBytes;
  return std::unique_ptr<MemoryTier>(new MemoryTier(std::move(slab.value()), layout, slot_bytes,
                                                    header_bytes, static_cast<uint32_t>(num_slots),
                                                    poison));
}

MemoryTier::MemoryTier(std::unique_ptr<Slab> slab, const KvLayout& layout, uint64_t slot_bytes,
                       uint64_t header_bytes, uint32_t num_slots, bool poison)
    : slab_(std::move(slab)),
      layout_(layout),
      slot_bytes_(slot_bytes),
      header_bytes_(header_bytes),
      base_(slab_->bytes().data()),
      poisoned_(poison ? num_slots : 0),
      slots_(num_slots, poison ? [this](SlotId id, bool taken) { OnSlot(id, taken); }
                               : std::function<void(SlotId, bool)>()) {}

// Poisons a place that comes back, and one that is taken for the first time: memory comes from the
// system when it is written, so not all of it at open. What is not K or V stays as it is.
void MemoryTier::OnSlot(SlotId id, bool taken) {
  const uint64_t bytes = layout_.slice_bytes();
  for (uint32_t layer = 0; layer < layout_.num_layers; ++layer) {
    std::byte* slice = payload(id) + layout_.device_slice_offset(layer);
    if (!taken || !poisoned_[id]) {
      slab_->Fill(slice, static_cast<int>(kPoison), bytes);
    } else if (slab_->on_host()) {
      CA_CHECK(IsPoison(slice, bytes));  // else somebody wrote to a place that was not his
    }
  }
  poisoned_[id] = true;
}

}  // namespace cachedattn
