// MemoryTier: one slab of memory cut into equal slots, for DRAM and for the emulated device pool.
#pragma once

#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "csrc/base/kv_layout.h"
#include "csrc/base/status.h"
#include "csrc/tier/slot_pool.h"

namespace cachedattn {

class MemoryTier {
 public:
  // A slab of at most `bytes` (a hard cap), 2 MiB-aligned, with huge pages asked for. Memory is
  // taken from the system when a slot is first written, not here. kInvalidArgument when `bytes`
  // does not hold one slot; kExhausted when the address space is refused. `poison`: the slices of
  // a free slot are NaN, so that a read too early or too late shows, and a write aborts.
  static Result<std::unique_ptr<MemoryTier>> Open(Tier tier, uint64_t bytes, const KvLayout& layout,
                                                  bool poison = false);
  ~MemoryTier();
  MemoryTier(const MemoryTier&) = delete;
  MemoryTier& operator=(const MemoryTier&) = delete;

  SlotPool& slots() { return slots_; }
  const SlotPool& slots() const { return slots_; }

  // Where a slot begins (its header page in DRAM), and where its first layer slice does.
  std::byte* slot(SlotId id) const { return base_ + id * slot_bytes_; }
  std::byte* payload(SlotId id) const { return slot(id) + header_bytes_; }

  // Core dumps are made without this memory, where the system allows that.
  void LeaveOutOfDumps();
  void Wipe(SlotId id) { std::memset(slot(id), 0, slot_bytes_); }

  uint64_t slot_bytes() const { return slot_bytes_; }
  uint64_t capacity_bytes() const { return slots_.capacity() * slot_bytes_; }
  std::span<std::byte> slab() const { return {base_, capacity_bytes()}; }

 private:
  MemoryTier(void* mapping, uint64_t mapping_bytes, const KvLayout& layout, uint64_t slot_bytes,
             uint64_t header_bytes, uint32_t num_slots, bool poison);
  void OnSlot(SlotId id, bool taken);

  void* const mapping_;
  const uint64_t mapping_bytes_;
  const KvLayout layout_;
  const uint64_t slot_bytes_;
  const uint64_t header_bytes_;
  std::byte* const base_;
  std::vector<bool> poisoned_;  // slots that were freed once; empty: no poison
  SlotPool slots_;
};

}  // namespace cachedattn
