#include "csrc/store/prefetch.h"

#include <algorithm>

namespace cachedattn {

namespace {

// Keeps a fast disk busy from one Poll to the next; a read of Begin waits behind at most this much.
constexpr uint64_t kMaxBytesInFlight = 32 << 20;

bool OnSsdOnly(const Block& block) {
  return block.ready(Tier::kSsd) && block.absent(Tier::kDram) && block.absent(Tier::kDevice);
}

}  // namespace

Prefetcher::Prefetcher(Tiers* tiers, Directory* directory, Policy* policy, Evictor* evictor,
                       Preloader* preloader)
    : tiers_(tiers),
      directory_(directory),
      policy_(policy),
      evictor_(evictor),
      preloader_(preloader),
      max_in_flight_(static_cast<uint32_t>(
          std::clamp<uint64_t>(kMaxBytesInFlight / tiers->layout.payload_bytes(), 2, 32))) {}

void Prefetcher::Clear() {
  for (const Wanted& wanted : wanted_) policy_->Release(wanted.conversation);
  wanted_.clear();
  num_wanted_.clear();
}

void Prefetcher::Want(std::span<const BlockRef> blocks, Conversation conversation) {
  const SlotPool& slots = tiers_->dram->slots();
  if (conversation == kNoConversation && !blocks.empty()) conversation = blocks.back()->owner;
  for (const BlockRef& block : blocks) {
    if (wanted_.size() >= slots.capacity()) return;
    if (!OnSsdOnly(*block)) continue;
    if (++num_wanted_[block->tenant] > slots.quota()) return;  // leave the list to other tenants
    policy_->Hold(conversation);
    wanted_.push_back({block->key, conversation});
  }
}

void Prefetcher::Pump() {
  // A failed one may be in the disk's hands for long.
  std::erase_if(running_, [](const FillRef& fill) { return fill->done || !fill->status.ok(); });
  while (!wanted_.empty() && running_.size() < max_in_flight_) {
    if (preloader_->reads_waiting() || !tiers_->ssd->can_submit()) return;
    const auto [key, conversation] = wanted_.front();
    const BlockRef block = directory_->Find(key);
    if (block != nullptr && OnSsdOnly(*block) &&
        evictor_->QuotaAdmits(block->tenant, conversation)) {
      // Tried again when something ends.
      if (!evictor_->MakeSpareRoom(block->tenant, conversation)) return;
      Slot slot = tiers_->dram->slots().Take(block->tenant);
      running_.push_back(preloader_->StartRead(block, std::move(slot), /*whole=*/true, 0));
      preloader_->Pump();
    }
    policy_->Release(conversation);
    wanted_.pop_front();
  }
}

}  // namespace cachedattn
