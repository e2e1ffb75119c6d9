#include "csrc/store/evict.h"

namespace cachedattn {

Evictor::Evictor(Tiers* tiers, Directory* directory, WriteBehind* writes, Trace* trace,
                 uint32_t reserve)
    : tiers_(tiers), directory_(directory), writes_(writes), trace_(trace), reserve_(reserve) {}

bool Evictor::Unsaved(Tier tier, Block* block) {
  if (tier == Tier::kDevice) return block->save_queued;
  return tier == Tier::kDram && writes_->MustDemote(directory_->Find(block->key));
}

void Evictor::Evict(Tier tier, Block* block) {
  trace_->Add(TraceKind::kEvict, 0, 0, 0, block->copy(tier).slot.id());
  ++num_evicted_[static_cast<int>(tier)];
  directory_->Drop(block, tier);
}

bool Evictor::CanMakeRoom(Tier tier, uint32_t n, bool lose_unsaved) {
  uint32_t available = tiers_->slots(tier)->num_free();
  for (const auto& [rank, block] : directory_->evictable(tier)) {
    if (available >= n) return true;
    available += lose_unsaved || !Unsaved(tier, block);
  }
  return available >= n;
}

void Evictor::MakeRoom(Tier tier, uint32_t n, bool lose_unsaved) {
  const SlotPool& slots = *tiers_->slots(tier);
  const auto& evictable = directory_->evictable(tier);
  for (auto it = evictable.begin(); it != evictable.end() && slots.num_free() < n;) {
    Block* block = (it++)->block;
    if (!Unsaved(tier, block)) Evict(tier, block);
  }
  while (lose_unsaved && slots.num_free() < n && !evictable.empty()) {
    Evict(tier, evictable.begin()->block);
  }
  CA_CHECK(slots.num_free() >= n);
}

void Evictor::KeepReserve() {
  const uint32_t num_free = tiers_->dram->slots().num_free();
  if (num_free >= reserve_) return;
  // A block whose write is on its way counts: it goes when the write has landed, and a block
  // that ranks higher does not go in its place.
  uint32_t needed = reserve_ - num_free;
  const auto& evictable = directory_->evictable(Tier::kDram);
  for (auto it = evictable.begin(); it != evictable.end() && needed > 0; --needed) {
    Block* block = (it++)->block;
    if (!Unsaved(Tier::kDram, block)) Evict(Tier::kDram, block);
  }
}

bool Evictor::MakeSpareRoom(const Rank& rank) {
  if (tiers_->dram->slots().num_free() > reserve_) return true;
  const auto& evictable = directory_->evictable(Tier::kDram);
  if (tiers_->dram->slots().num_free() < reserve_ || evictable.empty()) return false;
  const auto [victim_rank, victim] = *evictable.begin();
  if (!(victim_rank < rank) || Unsaved(Tier::kDram, victim)) return false;
  Evict(Tier::kDram, victim);
  return true;
}

void Evictor::DropAll(Tier tier) {
  const auto& evictable = directory_->evictable(tier);
  while (!evictable.empty()) Evict(tier, evictable.begin()->block);
}

}  // namespace cachedattn
