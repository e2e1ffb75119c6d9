#include "csrc/store/directory.h"

#include <algorithm>

namespace cachedattn {

void BlockPin::Release() {
  if (block_ != nullptr) directory_->Unpin(block_.get(), tier_);
  block_.reset();
}

BlockRef Directory::Find(const BlockKey& key) const {
  const auto it = blocks_.find(key);
  return it == blocks_.end() ? nullptr : it->second;
}

BlockRef Directory::Insert(const BlockKey& key, const BlockKey& parent, uint32_t num_tokens,
                           uint32_t depth) {
  CA_CHECK(num_tokens > 0 && num_tokens <= block_size_);
  auto block = std::make_shared<Block>();
  block->key = key;
  block->parent = parent;
  block->num_tokens = num_tokens;
  block->depth = depth;
  CA_CHECK(blocks_.emplace(key, block).second);
  if (num_tokens < block_size_) partials_[parent].push_back(block.get());
  return block;
}

Transfer Directory::BeginFill(const BlockRef& block, Tier tier, Slot slot) {
  CA_CHECK(slot);
  SetState(block.get(), tier, CopyState::kAbsent, CopyState::kFilling);
  block->copy(tier).slot = std::move(slot);
  return Transfer(block, tier);
}

void Directory::FinishFill(Transfer transfer) {
  transfer.block->copy(transfer.tier).fill.reset();
  SetState(transfer.block.get(), transfer.tier, CopyState::kFilling, CopyState::kReady);
}

Slot Directory::AbortFill(Transfer transfer) {
  Block* block = transfer.block.get();
  Copy& copy = block->copy(transfer.tier);
  CA_CHECK(copy.pins == 0);
  copy.fill.reset();
  SetState(block, transfer.tier, CopyState::kFilling, CopyState::kAbsent);
  return std::move(copy.slot);
}

void Directory::Drop(Block* block, Tier tier) {
  CA_CHECK(block->copy(tier).pins == 0);
  Slot slot = std::move(block->copy(tier).slot);
  SetState(block, tier, CopyState::kReady, CopyState::kAbsent);
}

void Directory::Forget(Block* block) {
  const auto it = blocks_.find(block->key);
  if (it == blocks_.end() || it->second.get() != block) return;
  std::erase_if(forgotten_, [](const auto& weak) { return weak.expired(); });
  forgotten_.push_back(it->second);
  Unlist(block);
}

void Directory::Unlist(Block* block) {
  for (uint32_t t = 0; t < kNumTiers; ++t) evictable_[t].erase({block->rank, block});
  if (block->num_tokens < block_size_) {
    const auto it = partials_.find(block->parent);
    std::erase(it->second, block);
    if (it->second.empty()) partials_.erase(it);
  }
  blocks_.erase(BlockKey(block->key));  // a copy: the block may go with its entry
}

void Directory::SetState(Block* block, Tier tier, CopyState from, CopyState to) {
  Copy& copy = block->copy(tier);
  CA_CHECK(copy.state == from);
  copy.state = to;
  UpdateEvictable(block, tier);
  if (to != CopyState::kAbsent) return;
  for (const Copy& other : block->copies) {
    if (other.state != CopyState::kAbsent) return;
  }
  if (Find(block->key).get() == block) Unlist(block);
}

void Directory::UpdateEvictable(Block* block, Tier tier) {
  std::set<Ranked>& evictable = evictable_[static_cast<int>(tier)];
  const Copy& copy = block->copy(tier);
  const bool listed = Find(block->key).get() == block;
  if (listed && copy.state == CopyState::kReady && copy.pins == 0) {
    evictable.insert({block->rank, block});
  } else {
    evictable.erase({block->rank, block});
  }
}

BlockPin Directory::Pin(const BlockRef& block, Tier tier) {
  Copy& copy = block->copy(tier);
  CA_CHECK(copy.state != CopyState::kAbsent);
  if (copy.pins++ == 0) {
    ++num_pinned_[static_cast<int>(tier)];
    UpdateEvictable(block.get(), tier);
  }
  return BlockPin(this, block, tier);
}

void Directory::Unpin(Block* block, Tier tier) {
  Copy& copy = block->copy(tier);
  CA_CHECK(copy.pins > 0);
  if (--copy.pins == 0) {
    --num_pinned_[static_cast<int>(tier)];
    UpdateEvictable(block, tier);
  }
}

void Directory::SetRank(Block* block, const Rank& rank) {
  if (block->rank == rank) return;
  for (auto& evictable : evictable_) {
    if (evictable.erase({block->rank, block}) != 0) evictable.insert({rank, block});
  }
  block->rank = rank;
}

std::span<Block* const> Directory::partials(const BlockKey& parent) const {
  const auto it = partials_.find(parent);
  if (it == partials_.end()) return {};
  return it->second;
}

void Directory::DropReplaced(Block* block) {
  for (const BlockKey& key : std::exchange(block->replaces, {})) {
    const BlockRef old = Find(key);
    if (old == nullptr) continue;
    for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
      if (old->ready(tier) && old->copy(tier).pins == 0) Drop(old.get(), tier);
    }
  }
}

void Directory::CheckInvariants(std::vector<SlotId> (*places)[kNumTiers]) const {
  uint32_t pinned[kNumTiers] = {};
  size_t num_partials = 0;
  const auto visit = [&](const Block& block, bool listed) {
    bool any = false;
    for (uint32_t t = 0; t < kNumTiers; ++t) {
      const Copy& copy = block.copies[t];
      const bool absent = copy.state == CopyState::kAbsent;
      CA_CHECK(absent == !copy.slot);
      CA_CHECK(!absent || copy.pins == 0);
      CA_CHECK(copy.fill == nullptr || copy.state == CopyState::kFilling || !listed);
      const bool evictable = listed && copy.state == CopyState::kReady && copy.pins == 0;
      CA_CHECK(evictable == evictable_[t].contains({block.rank, const_cast<Block*>(&block)}));
      pinned[t] += copy.pins > 0;
      any = any || !absent;
      if (!absent) (*places)[t].push_back(copy.slot.id());
    }
    CA_CHECK(any || !listed);
  };
  for (const auto& [key, block] : blocks_) {
    CA_CHECK(block->key == key);
    visit(*block, true);
    num_partials += block->num_tokens < block_size_;
  }
  for (const auto& weak : forgotten_) {
    if (const BlockRef block = weak.lock()) visit(*block, false);
  }
  for (const auto& [parent, list] : partials_) {
    CA_CHECK(!list.empty());
    for (const Block* block : list) CA_CHECK(block->parent == parent);
    num_partials -= list.size();
  }
  CA_CHECK(num_partials == 0);
  for (uint32_t t = 0; t < kNumTiers; ++t) CA_CHECK(pinned[t] == num_pinned_[t]);
}

}  // namespace cachedattn
