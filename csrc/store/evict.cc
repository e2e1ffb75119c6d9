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

bool Evictor::KeepQuota(Tier tier, uint32_t tenant, uint32_t more) {
  const RankHeap& own = directory_->saved(tier, tenant);
  while (!tiers_->slots(tier)->WithinQuota(tenant, more)) {
    Block* block = own.top();
    if (block == nullptr) return false;
    if (!MustSaveFirst(tier, block)) Evict(tier, block);
  }
  return true;
}

void Evictor::MakeRoom(Tier tier, uint32_t n, bool lose_unsaved, uint32_t tenant) {
  if (!KeepQuota(tier, tenant, n)) over_quota_.insert(tenant);
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
  std::erase_if(over_quota_, [this](uint32_t t) { return KeepQuota(Tier::kDram, t, 0); });
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

bool Evictor::QuotaAdmits(const Block& block) const {
  if (tiers_->dram->slots().WithinQuota(block.tenant, 1)) return true;
  const Block* own = directory_->saved(Tier::kDram, block.tenant).top();
  return own != nullptr && own->rank() < block.rank();
}

bool Evictor::MakeSpareRoom(const Block& incoming) {
  const SlotPool& slots = tiers_->dram->slots();
  const bool own = !slots.WithinQuota(incoming.tenant, 1);
  if (slots.num_free() > reserve_ && !own) return true;
  if (slots.num_free() < reserve_) return false;
  Block* victim =
      (own ? directory_->saved(Tier::kDram, incoming.tenant) : directory_->saved(Tier::kDram))
          .top();
  if (victim == nullptr || !(victim->rank() < incoming.rank())) return false;
  const Block* waiting = directory_->unsaved(Tier::kDram).top();
  if (!own && waiting != nullptr && waiting->rank() < victim->rank()) return false;
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
