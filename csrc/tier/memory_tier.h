// MemoryTier: one slab of memory cut into equal slots, for DRAM and for the device pool.
#pragma once

#include <memory>
#include <vector>

#include "csrc/base/kv_layout.h"
#include "csrc/base/slab.h"
#include "csrc/tier/slot_pool.h"

namespace cachedattn {

class MemoryTier {
 public:
  // A slab of at most `bytes` (a hard cap). kInvalidArgument when `bytes` does not hold one slot;
  // else the errors of `allocate`. `poison`: the slices of a free slot are NaN, so that a read too
  // early or too late shows, and a write to memory of this process aborts.
  static Result<std::unique_ptr<MemoryTier>> Open(Tier tier, uint64_t bytes, const KvLayout& layout,
                                                  bool poison = false,
                                                  const AllocateSlab& allocate = MapHostSlab);

  SlotPool& slots() { return slots_; }
  const SlotPool& slots() const { return slots_; }

  // Where a slot begins (its header page in DRAM), and where its first layer slice does.
  std::byte* slot(SlotId id) const { return base_ + id * slot_bytes_; }
  std::byte* payload(SlotId id) const { return slot(id) + header_bytes_; }

  void LeaveOutOfDumps() { slab_->LeaveOutOfDumps(); }
  void Wipe(SlotId id) { slab_->Fill(slot(id), 0, slot_bytes_); }

  uint64_t slot_bytes() const { return slot_bytes_; }
  uint64_t capacity_bytes() const { return slots_.capacity() * slot_bytes_; }
  std::span<std::byte> slab() const { return slab_->bytes(); }

 private:
  MemoryTier(std::unique_ptr<Slab> slab, const KvLayout& layout, uint64_t slot_bytes,
             uint64_t header_bytes, uint32_t num_slots, bool poison);
  void OnSlot(SlotId id, bool taken);

  const std::unique_ptr<Slab> slab_;
  const KvLayout layout_;
  const uint64_t slot_bytes_;
  const uint64_t header_bytes_;
  std::byte* const base_;
  std::vector<bool> poisoned_;  // slots that were freed once; empty: no poison
  SlotPool slots_;
};

}  // namespace cachedattn
