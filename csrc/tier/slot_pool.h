// SlotPool: the places of one tier. Each is free, or owned by exactly one Slot.
// Each taken place counts for a tenant, which is a small number here.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "csrc/base/check.h"
#include "csrc/base/types.h"

namespace cachedattn {

class SlotPool;

// The right to a place for one block. Move-only: holding one is what keeps others out; letting go
// of it frees the place.
class Slot {
 public:
  Slot() = default;
  Slot(Slot&& other) noexcept
      : pool_(std::exchange(other.pool_, nullptr)),
        id_(std::exchange(other.id_, kNoSlot)),
        tenant_(other.tenant_) {}
  Slot& operator=(Slot&& other) noexcept {
    if (this != &other) {
      Release();
      pool_ = std::exchange(other.pool_, nullptr);
      id_ = std::exchange(other.id_, kNoSlot);
      tenant_ = other.tenant_;
    }
    return *this;
  }
  ~Slot() { Release(); }

  SlotId id() const { return id_; }
  explicit operator bool() const { return pool_ != nullptr; }

  void Release();  // the place is free again

 private:
  friend class SlotPool;
  Slot(SlotPool* pool, SlotId id, uint32_t tenant) : pool_(pool), id_(id), tenant_(tenant) {}

  SlotPool* pool_ = nullptr;
  SlotId id_ = kNoSlot;
  uint32_t tenant_ = 0;
};

// Not thread-safe: belongs to the store's control thread. Outlives its Slots.
class SlotPool {
 public:
  // `watch`, if given, is told of every place that is taken, and of every one that comes back.
  explicit SlotPool(uint32_t num_slots, std::function<void(SlotId, bool taken)> watch = nullptr);
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  // An empty Slot when none is free.
  Slot Take(uint32_t tenant = 0);
  // The place `id`, which must be free (an index being rebuilt knows where its blocks are).
  Slot TakeAt(SlotId id, uint32_t tenant = 0);

  // What one tenant should hold at most. The pool refuses nothing; who takes asks first.
  void SetQuota(uint32_t num_slots) { quota_ = num_slots; }
  uint32_t quota() const { return quota_; }
  bool WithinQuota(uint32_t tenant, uint32_t more) const {
    return uint64_t{num_used(tenant)} + more <= quota_;
  }
  uint32_t num_used(uint32_t tenant) const { return tenant < used_.size() ? used_[tenant] : 0; }

  uint32_t capacity() const { return static_cast<uint32_t>(position_.size()); }
  uint32_t num_free() const { return static_cast<uint32_t>(free_.size()); }
  bool is_free(SlotId id) const { return position_[id] != kNoSlot; }

 private:
  friend class Slot;
  void Return(SlotId id, uint32_t tenant);

  std::vector<SlotId> free_;        // a stack: the warmest place is taken first
  std::vector<uint32_t> position_;  // of each place in free_; kNoSlot: not free
  uint32_t quota_ = UINT32_MAX;
  std::vector<uint32_t> used_;  // by tenant
  const std::function<void(SlotId, bool taken)> watch_;
};

}  // namespace cachedattn
