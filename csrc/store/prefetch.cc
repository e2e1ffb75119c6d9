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
  next_ = 0;
}

void Prefetcher::SetQueue(std::span<const std::shared_ptr<Chain>> waiting) {
  Clear();
  waiting_.assign(waiting.begin(), waiting.end());
  const auto lost = evictor_->TakeWaitingEvicted();
  decltype(there_) there;
  for (const auto& chain : waiting_) {
    const auto it = there_.find(chain.get());
    if (it == there_.end()) continue;
    if (std::ranges::any_of(it->second, [&](Conversation c) { return lost.contains(c); })) continue;
    there.insert(there_.extract(it));
  }
  there_ = std::move(there);
}

// False: nothing that waits is on SSD alone.
bool Prefetcher::WantMore() {
  while (wanted_.empty() && next_ < waiting_.size()) {
    const Chain& chain = *waiting_[next_++];
    if (there_.contains(&chain)) continue;
    const History history = FindHistory(*directory_, chain, chain.num_tokens() - 1, true);
    Conversation conversation = HoldConversation(
        policy_, *directory_, chain, directory_->TenantIndex(chain.tenant()), history.end());
    const bool own = conversation != kNoConversation;
    if (!own && history.end() != nullptr) conversation = history.end()->owner;
    bool there = true;
    std::vector<Conversation> owners;
    for (const BlockRef& block : history.blocks) {
      if (owners.empty() || owners.back() != block->owner) owners.push_back(block->owner);
      there = there && (block->ready(Tier::kDram) || block->ready(Tier::kDevice));
      if (!OnSsdOnly(*block)) continue;
      policy_->Hold(conversation);
      wanted_.push_back({block->key, conversation});
    }
    if (own) policy_->Release(conversation);
    if (there) there_.emplace(&chain, std::move(owners));
  }
  return !wanted_.empty();
}

void Prefetcher::Pump() {
  // A failed one may be in the disk's hands for long.
  std::erase_if(running_, [](const FillRef& fill) { return fill->done || !fill->status.ok(); });
  while (running_.size() < max_in_flight_ && WantMore()) {
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
