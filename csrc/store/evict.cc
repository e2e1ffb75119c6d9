#include "csrc/store/evict.h"

#include <algorithm>

namespace cachedattn {

namespace {

// Writes that make room for prefetches are started so many at a time.
constexpr uint32_t kMaxAwaited = 16;

}  // namespace

Evictor::Evictor(Tiers* tiers, Directory* directory, Policy* policy, WriteBehind* writes,
                 Trace* trace, uint32_t reserve)
    : tiers_(tiers),
      directory_(directory),
      policy_(policy),
      writes_(writes),
      trace_(trace),
      reserve_(reserve) {}

Block* Evictor::Next(Tier tier) const { return directory_->Last(policy_->Victim(tier), tier); }

Block* Evictor::Next(Tier tier, uint32_t tenant) const {
  return directory_->Last(policy_->Victim(tier, tenant), tier);
}

bool Evictor::TryEvict(Tier tier, Block* block) {
  if (tier == Tier::kDram && writes_->MustDemote(block)) return false;
  Evict(tier, block);
  return true;
}

void Evictor::Evict(Tier tier, Block* block) {
  trace_->AddEvict(*block, tier);
  ++num_evicted_[static_cast<int>(tier)];
  if (policy_->waiting(block->owner)) waiting_evicted_.insert(block->owner);
  directory_->Drop(block, tier);
}

bool Evictor::KeepQuota(Tier tier, uint32_t tenant, uint32_t more) {
  const SlotPool& slots = *tiers_->slots(tier);
  for (uint32_t num_queued = 0; !slots.WithinQuota(tenant, more);) {
    // Writes that make the room are queued for no more copies than are too many.
    const uint64_t excess = uint64_t{slots.num_used(tenant)} + more - slots.quota();
    Block* block = num_queued < excess ? Next(tier, tenant) : nullptr;
    if (block == nullptr) return false;
    if (!TryEvict(tier, block)) ++num_queued;
  }
  return true;
}

bool Evictor::MakeRoom(Tier tier, uint32_t n, bool lose_unsaved, uint32_t tenant) {
  if (n == 0) return true;
  const SlotPool& slots = *tiers_->slots(tier);
  const uint32_t most = slots.num_free() + directory_->num_idle(tier) +
                        (lose_unsaved ? directory_->num_leaving(tier) : 0);
  if (most < n) return false;
  if (!KeepQuota(tier, tenant, n)) over_quota_.insert(tenant);
  while (slots.num_free() < n) {
    // A device copy that is being saved may take long to go, and one that is saved goes at once.
    const uint32_t on_the_way = tier == Tier::kDram ? writes_->num_on_the_way() : 0;
    if (!lose_unsaved && slots.num_free() + on_the_way >= n) return false;
    Block* block = Next(tier);
    if (block == nullptr) break;
    lose_unsaved ? Evict(tier, block) : (void)TryEvict(tier, block);
  }
  while (lose_unsaved && slots.num_free() < n && directory_->num_leaving(tier) > 0) {
    Evict(tier, directory_->FirstLeaving(tier));
  }
  return slots.num_free() >= n;
}

void Evictor::KeepReserve() {
  std::erase_if(over_quota_, [this](uint32_t t) { return KeepQuota(Tier::kDram, t, 0); });
  const SlotPool& slots = tiers_->dram->slots();
  for (;;) {
    const uint32_t to_come = slots.num_free() + writes_->num_on_the_way();
    Block* block = to_come < reserve_ ? Next(Tier::kDram) : nullptr;
    if (block == nullptr) return;
    // Turns that end take from the reserve and soon give back: what was just brought for one that
    // waits is not given up, to be read again, before half of the reserve is gone.
    if (policy_->waiting(block->owner) && to_come >= reserve_ / 2) return;
    TryEvict(Tier::kDram, block);
  }
}

bool Evictor::QuotaAdmits(uint32_t tenant, Conversation incoming) const {
  if (tiers_->dram->slots().WithinQuota(tenant, 1)) return true;
  const Conversation own = policy_->Victim(Tier::kDram, tenant);
  return own != kNoConversation && policy_->GoesBefore(Tier::kDram, own, incoming);
}

bool Evictor::MakeSpareRoom(uint32_t tenant, Conversation incoming) {
  const SlotPool& slots = tiers_->dram->slots();
  const bool own = !slots.WithinQuota(tenant, 1);
  if (slots.num_free() > reserve_ && !own) return true;
  // A place for a place: what the reserve lacks is on the way.
  while (writes_->num_on_the_way() < kMaxAwaited) {
    const Conversation victim =
        own ? policy_->Victim(Tier::kDram, tenant) : policy_->Victim(Tier::kDram);
    if (victim == kNoConversation || !policy_->GoesBefore(Tier::kDram, victim, incoming)) break;
    if (TryEvict(Tier::kDram, directory_->Last(victim, Tier::kDram))) return true;
  }
  return false;
}

void Evictor::DropAll(Tier tier) {
  while (Block* block = Next(tier)) Evict(tier, block);
  while (directory_->num_leaving(tier) > 0) Evict(tier, directory_->FirstLeaving(tier));
}

}  // namespace cachedattn
