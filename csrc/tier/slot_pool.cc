#include "csrc/tier/slot_pool.h"

namespace cachedattn {

void Slot::Release() {
  if (pool_ != nullptr) pool_->Return(id_, tenant_);
  pool_ = nullptr;
  id_ = kNoSlot;
}

SlotPool::SlotPool(uint32_t num_slots, std::function<void(SlotId, bool taken)> watch)
    : free_(num_slots), position_(num_slots), watch_(std::move(watch)) {
  for (uint32_t i = 0; i < num_slots; ++i) {
    free_[i] = num_slots - 1 - i;  // so that the lowest place is taken first
    position_[free_[i]] = i;
  }
}

Slot SlotPool::Take(uint32_t tenant) {
  return free_.empty() ? Slot() : TakeAt(free_.back(), tenant);
}

Slot SlotPool::TakeAt(SlotId id, uint32_t tenant) {
  CA_CHECK(id < capacity() && is_free(id));
  const uint32_t hole = std::exchange(position_[id], kNoSlot);
  const SlotId last = free_.back();
  free_.pop_back();
  if (last != id) {
    free_[hole] = last;
    position_[last] = hole;
  }
  if (watch_) watch_(id, true);
  if (tenant >= used_.size()) used_.resize(tenant + 1);
  ++used_[tenant];
  return Slot(this, id, tenant);
}

void SlotPool::Return(SlotId id, uint32_t tenant) {
  CA_CHECK(!is_free(id) && used_[tenant] > 0);
  --used_[tenant];
  if (watch_) watch_(id, false);
  position_[id] = num_free();
  free_.push_back(id);
}

}  // namespace cachedattn
