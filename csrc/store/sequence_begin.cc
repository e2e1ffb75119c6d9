// How a sequence takes its history.
#include <algorithm>
#include <cstring>

#include "csrc/store/sequence.h"

namespace cachedattn {

Result<std::unique_ptr<Sequence>> SequenceImpl::Begin(std::shared_ptr<StoreCore> core,
                                                      std::shared_ptr<Chain> chain,
                                                      uint32_t max_history,
                                                      const ComputeCost& cost) {
  if (Status status = core->CheckUsable(); !status.ok()) return status;
  if (!core->memory.full()) return Status(Code::kExhausted, "out of memory");
  if (chain == nullptr || chain->num_tokens() == 0) {
    return Status(Code::kInvalidArgument, "chain: holds no tokens");
  }
  if (chain->block_size() != core->options.layout.block_size) {
    return Status(Code::kInvalidArgument, "chain: made for another block size");
  }
  if (Status status = cost.Validate(); !status.ok()) return status;
  const uint32_t limit = std::min(max_history, chain->num_tokens() - 1);
  const History history = FindHistory(core->directory, *chain, limit, core->tiers.ssd_on);
  std::unique_ptr<SequenceImpl> sequence(new SequenceImpl(core, chain));
  const BlockRange again = sequence->Plan(history, cost);
  if (Status status = sequence->TakeHistory(history, again); !status.ok()) return status;
  sequence->Join(history);

  const CachedTokens& cached = sequence->cached_;
  ++core->counters.turns;
  core->counters.tokens_requested += chain->num_tokens();
  core->counters.tokens_from_device += cached.by_tier[static_cast<int>(Tier::kDevice)];
  core->counters.tokens_from_dram += cached.by_tier[static_cast<int>(Tier::kDram)];
  core->counters.tokens_from_ssd += cached.by_tier[static_cast<int>(Tier::kSsd)];
  core->tokens_recomputed += cached.recomputed;
  core->preloader.Pump();
  return std::unique_ptr<Sequence>(std::move(sequence));
}

// Which blocks of the history to compute again.
BlockRange SequenceImpl::Plan(const History& history, const ComputeCost& cost) const {
  if (cost.step_tokens == 0 || history.blocks.empty()) return {};
  TurnLoad turn{.block_size = block_size_,
                .window = window_,
                .history = history.num_tokens,
                .new_tokens = chain_->num_tokens() - history.num_tokens};
  for (const BlockRef& block : history.blocks) turn.context += block->num_tokens;
  if (!core_->preloader.Estimate(history.blocks, &turn)) return {};
  return BlocksToRecompute(turn, cost);
}

// The blocks of `again` get slots of our own. When they are the last ones, they are none of the
// context yet.
Status SequenceImpl::TakeHistory(const History& history, BlockRange again) {
  Tiers& tiers = core_->tiers;
  const Tier pool = tiers.pool_tier();
  const auto num_blocks = static_cast<uint32_t>(history.blocks.size());
  const bool split = again.size() > 0 && again.last < num_blocks;
  std::vector<BlockPin> held;  // what is there must not make room for what is not
  History taken;
  taken.num_tokens = history.num_tokens;
  uint32_t pool_slots = split ? again.size() : 0, staging_slots = 0;
  for (uint32_t i = 0; i < num_blocks; ++i) {
    if (i >= again.first && i < again.last) continue;
    const BlockRef& block = history.blocks[i];
    taken.blocks.push_back(block);
    taken.indices.push_back(history.indices[i]);
    for (Tier tier : {Tier::kDevice, Tier::kDram}) {
      if (!block->absent(tier)) held.push_back(core_->directory.Pin(block, tier));
    }
    const bool needs_slot = block->num_tokens < block_size_ || block->absent(pool);
    pool_slots += needs_slot;
    staging_slots += needs_slot && pool == Tier::kDevice && block->absent(Tier::kDram);
  }
  if (!core_->MakeRoom(pool, pool_slots, tenant_) ||
      !core_->MakeRoom(Tier::kDram, staging_slots, tenant_)) {
    return Status(Code::kExhausted,
                  "no room for " + std::to_string(num_blocks) + " blocks of history now");
  }

  cached_ = core_->Count(*chain_, taken);
  for (uint32_t i = 0; i < taken.blocks.size(); ++i) {
    while (split && i == again.first && entries_.size() < again.last) AddPrivate();
    const BlockRef& block = taken.blocks[i];
    Entry entry = block->num_tokens < block_size_ ? TakeTail(block) : TakeShared(block);
    const SlotId slot = entry.pin               ? entry.pin.slot()
                        : entry.fill != nullptr ? entry.fill->private_slot.id()
                                                : entry.slot.id();
    AddEntry(taken.indices[i], std::move(entry), slot);
    context_len_ += block->num_tokens;
  }
  num_computed_ = history.num_tokens;
  if (again.size() > 0) {
    num_computed_ = context_len_ = again.first * block_size_;
    if (split) recompute_end_ = again.last * block_size_;
    cached_.recomputed = (split ? recompute_end_ : history.num_tokens) - context_len_;
    cached_.total -= cached_.recomputed;
  }
  num_dropped_ = entries_.empty() ? 0 : entries_.back().index + 1 - entries_.size();
  return Status();
}

// The turn is one of the conversation whose end it goes on from, or of a new one.
void SequenceImpl::Join(const History& history) {
  Policy* policy = core_->policy.get();
  prompt_tokens_ = chain_->num_tokens();
  conversation_ = HoldConversation(policy, core_->directory, *chain_, tenant_, history.end());
  if (conversation_ == kNoConversation) conversation_ = policy->Hold(0, tenant_);
  policy->Begin(conversation_);
  for (uint32_t i = 0; i < history.blocks.size(); ++i) {
    core_->directory.SetOwner(history.blocks[i].get(), conversation_);
    const bool follows = i > 0 && history.indices[i - 1] + 1 == history.indices[i];
    if (!follows) core_->directory.Detach(history.blocks[i].get());
  }
}

SequenceImpl::Entry SequenceImpl::TakeShared(const BlockRef& block) {
  Tiers& tiers = core_->tiers;
  const Tier pool = tiers.pool_tier();
  Entry entry;
  if (block->absent(pool)) {
    Slot slot = tiers.pool().slots().Take(tenant_);
    if (pool == Tier::kDram) {
      entry.fill = core_->preloader.StartRead(block, std::move(slot), false, id_);
    } else {
      if (block->absent(Tier::kDram)) {
        core_->preloader.StartRead(block, tiers.dram->slots().Take(tenant_), false, id_);
      }
      entry.fill = core_->preloader.StartLoad(block, std::move(slot), id_);
    }
  } else {
    entry.fill = core_->preloader.FillOf(*block, pool);  // of someone else, if it is not there yet
    if (entry.fill != nullptr) core_->preloader.MakeUrgent(entry.fill.get());
  }
  entry.pin = core_->directory.Pin(block, pool);
  return entry;
}

// A part-filled tail will be written to: its bytes go to a slot of our own.
SequenceImpl::Entry SequenceImpl::TakeTail(const BlockRef& block) {
  Tiers& tiers = core_->tiers;
  Entry entry;
  Slot slot = tiers.pool().slots().Take(tenant_);
  if (tiers.pool_tier() == Tier::kDevice) {
    if (block->absent(Tier::kDram)) {
      core_->preloader.StartRead(block, tiers.dram->slots().Take(tenant_), false, id_);
    }
    entry.fill = core_->preloader.StartPrivateLoad(block, std::move(slot), id_);
  } else if (block->ready(Tier::kDram)) {
    const SlotId source = block->copy(Tier::kDram).slot.id();
    std::memcpy(tiers.dram->payload(slot.id()), tiers.dram->payload(source),
                tiers.layout.payload_bytes());
    entry.slot = std::move(slot);
  } else {
    entry.fill = core_->preloader.StartPrivateRead(block, std::move(slot), id_);
  }
  return entry;
}

}  // namespace cachedattn
