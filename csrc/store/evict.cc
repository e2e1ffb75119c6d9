#include "csrc/store/evict.h"

#include <algorithm>

namespace cachedattn {

namespace {

// Blocks that KeepReserve passes over while their writes are on the way: its cost at every call.
constexpr uint32_t kMaxAwaited = 64;

}  // namespace

Evictor::Evictor(Tiers* tiers, Directory* directory, WriteBehind* writes, Trace* trace,
                 uint32_t reserve)
    : tiers_(tiers), directory_(directory), writes_(writes), trace_(trace), reserve_(reserve) {}

// A copy that is to be written first is no longer among the saved ones.
bool Evictor::MustSaveFirst(Tier tier, Block* block) {
  return tier == Tier::kDram && writes_->MustDemote(block);
}

void Evictor::Evict(Tier tier, Block* block) {
  trace_->Add(TraceKind::kEvict, 0, 0, 0, block->copy(tier).slot.id());
  ++num_evicted_[static_cast<int>(tier)];
  directory_->Drop(block, tier);
}

bool Evictor::CanMakeRoom(Tier tier, uint32_t n, bool lose_unsaved) {
  const uint32_t num_free = tiers_->slots(tier)->num_free();
  if (num_free >= n) return true;
  const uint32_t missing = n - num_free;
  const RankHeap& saved = directory_->saved(tier);
  if (lose_unsaved) return saved.size() + directory_->unsaved(tier).size() >= missing;
  for (bool all_saved = false; !all_saved;) {
    if (saved.size() < missing) return false;
    all_saved = true;
    for (Block* block : saved.Lowest(missing)) {
      if (MustSaveFirst(tier, block)) all_saved = false;
    }
  }
  return true;
}

void Evictor::MakeRoom(Tier tier, uint32_t n, bool lose_unsaved) {
  const SlotPool& slots = *tiers_->slots(tier);
  const RankHeap& saved = directory_->saved(tier);
  while (slots.num_free() < n && saved.top() != nullptr) {
    Block* block = saved.top();
    if (lose_unsaved || !MustSaveFirst(tier, block)) Evict(tier, block);
  }
  const RankHeap& unsaved = directory_->unsaved(tier);
  while (lose_unsaved && slots.num_free() < n && unsaved.top() != nullptr) {
    Evict(tier, unsaved.top());
  }
  CA_CHECK(slots.num_free() >= n);
}

void Evictor::KeepReserve() {
  const uint32_t num_free = tiers_->dram->slots().num_free();
  if (num_free >= reserve_) return;
  // A block whose write is on its way counts: it goes when the write has landed, and a block
  // that ranks higher does not go in its place.
  uint32_t needed = reserve_ - num_free;
  const RankHeap& saved = directory_->saved(Tier::kDram);
  const std::vector<Block*> waiting =
      directory_->unsaved(Tier::kDram).Lowest(std::min(needed, kMaxAwaited));
  for (size_t i = 0; needed > 0 && saved.top() != nullptr; --needed) {
    Block* block = saved.top();
    if (i < waiting.size() && waiting[i]->rank() < block->rank()) {
      if (++i == kMaxAwaited) return;
    } else if (!MustSaveFirst(Tier::kDram, block)) {
      Evict(Tier::kDram, block);
    }
  }
}

bool Evictor::MakeSpareRoom(const Rank& rank) {
  const uint32_t num_free = tiers_->dram->slots().num_free();
  if (num_free > reserve_) return true;
  Block* victim = directory_->saved(Tier::kDram).top();
  const Block* waiting = directory_->unsaved(Tier::kDram).top();
  if (num_free < reserve_ || victim == nullptr || !(victim->rank() < rank)) return false;
  if (waiting != nullptr && waiting->rank() < victim->rank()) return false;
  if (MustSaveFirst(Tier::kDram, victim)) return false;
  Evict(Tier::kDram, victim);
  return true;
}

void Evictor::DropAll(Tier tier) {
  for (const RankHeap* heap : {&directory_->saved(tier), &directory_->unsaved(tier)}) {
    while (heap->top() != nullptr) Evict(tier, heap->top());
  }
}

}  // namespace cachedattn
