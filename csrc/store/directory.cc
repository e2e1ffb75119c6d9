#include "csrc/store/directory.h"

#include <algorithm>

namespace cachedattn {

void BlockPin::Release() {
  if (block_ != nullptr) directory_->Unpin(block_.get(), tier_);
  block_.reset();
}

Directory::Directory(uint32_t block_size, bool by_tenant)
    : block_size_(block_size), by_tenant_(by_tenant) {}

void Directory::Reserve(Tier tier, uint32_t num_copies) {
  blocks_.reserve(blocks_.bucket_count() + num_copies);
  saved_[Index(tier)].Reserve(num_copies);
}

BlockRef Directory::Find(const BlockKey& key) const {
  const auto it = blocks_.find(key);
  return it == blocks_.end() ? nullptr : *it;
}

BlockRef Directory::Insert(uint32_t tenant, const BlockKey& key, const BlockKey& parent,
                           uint32_t num_tokens, uint32_t depth) {
  CA_CHECK(num_tokens > 0 && num_tokens <= block_size_);
  CA_CHECK(tenant < tenants_.size());
  auto block = std::make_shared<Block>();
  block->key = key;
  block->parent = parent;
  block->tenant = tenant;
  block->num_tokens = num_tokens;
  block->depth = depth;
  block->listed = true;
  CA_CHECK(blocks_.insert(block).second);
  if (part_filled(*block)) partials_.insert(block.get());
  return block;
}

uint32_t Directory::TenantIndex(const TenantId& id) {
  const auto [it, added] = tenant_index_.try_emplace(id, static_cast<uint32_t>(tenants_.size()));
  if (added) tenants_.emplace_back(id);
  return it->second;
}

std::optional<uint32_t> Directory::FindTenant(const TenantId& id) const {
  const auto it = tenant_index_.find(id);
  return it == tenant_index_.end() ? std::nullopt : std::optional(it->second);
}

BlockHeader Directory::HeaderOf(const Block& block) const {
  return {.key = block.key,
          .parent = block.parent,
          .tenant = tenants_[block.tenant].id,
          .num_tokens = block.num_tokens,
          .depth = block.depth,
          .generation = block.generation};
}

Transfer Directory::BeginFill(const BlockRef& block, Tier tier, Slot slot) {
  CA_CHECK(slot);
  SetState(block.get(), tier, CopyState::kAbsent, CopyState::kFilling);
  block->copy(tier).slot = std::move(slot);
  return Transfer(block, tier);
}

void Directory::FinishFill(Transfer transfer) {
  SetState(transfer.block.get(), transfer.tier, CopyState::kFilling, CopyState::kReady);
}

Slot Directory::AbortFill(Transfer transfer) {
  Block* block = transfer.block.get();
  Copy& copy = block->copy(transfer.tier);
  CA_CHECK(copy.pins == 0);
  SetState(block, transfer.tier, CopyState::kFilling, CopyState::kAbsent);
  return std::move(copy.slot);
}

void Directory::Drop(Block* block, Tier tier) {
  CA_CHECK(block->copy(tier).pins == 0);
  Slot slot = std::move(block->copy(tier).slot);
  SetState(block, tier, CopyState::kReady, CopyState::kAbsent);
}

void Directory::Forget(Block* block) {
  if (!block->listed) return;
  std::erase_if(forgotten_, [](const auto& weak) { return weak.expired(); });
  forgotten_.push_back(Find(block->key));
  Unlist(block);
}

void Directory::Unlist(Block* block) {
  block->listed = false;
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) UpdateEvictable(block, tier);
  if (part_filled(*block)) {
    const auto [first, last] = partials_.equal_range(block->parent);
    partials_.erase(std::find(first, last, block));
  }
  replaced_.erase(block);
  blocks_.erase(blocks_.find(block->key));  // the block may go with its entry
}

void Directory::SetState(Block* block, Tier tier, CopyState from, CopyState to) {
  Copy& copy = block->copy(tier);
  CA_CHECK(copy.state == from);
  copy.state = to;
  UpdateEvictable(block, tier);
  if (to != CopyState::kAbsent) return;
  copy.unsaved = false;
  for (const Copy& other : block->copies) {
    if (other.state != CopyState::kAbsent) return;
  }
  if (block->listed) Unlist(block);
}

// Puts a copy into the order of those that may go, or takes it out.
void Directory::UpdateEvictable(Block* block, Tier tier) {
  const Copy& copy = block->copy(tier);
  const bool listed = block->heap_positions[Index(tier)] != kNotInHeap;
  if (!block->listed || copy.state != CopyState::kReady || copy.pins > 0) {
    if (listed) Leave(block, tier);
  } else if (!listed) {
    (copy.unsaved ? unsaved_ : saved_)[Index(tier)].Push(block);
    if (by_tenant_ && !copy.unsaved) tenants_[block->tenant].saved[Index(tier)].Push(block);
  }
}

void Directory::Leave(Block* block, Tier tier) {
  const bool unsaved = block->copy(tier).unsaved;
  (unsaved ? unsaved_ : saved_)[Index(tier)].Erase(block);
  if (by_tenant_ && !unsaved) tenants_[block->tenant].saved[Index(tier)].Erase(block);
}

void Directory::SetUnsaved(Block* block, Tier tier, bool unsaved) {
  Copy& copy = block->copy(tier);
  if (copy.unsaved == unsaved) return;
  CA_CHECK(copy.state != CopyState::kAbsent);
  if (block->heap_positions[Index(tier)] != kNotInHeap) Leave(block, tier);
  copy.unsaved = unsaved;
  UpdateEvictable(block, tier);
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

void Directory::Rerank(Block* block) {
  for (uint32_t t = 0; t < kNumTiers; ++t) {
    if (block->heap_positions[t] == kNotInHeap) continue;
    (block->copies[t].unsaved ? unsaved_ : saved_)[t].Rerank(block);
    if (block->heap_positions[kNumTiers + t] == kNotInHeap) continue;
    tenants_[block->tenant].saved[t].Rerank(block);
  }
}

void Directory::SetReplaced(Block* block, std::vector<BlockKey> tails) {
  if (!tails.empty()) replaced_[block] = std::move(tails);
}

void Directory::DropReplaced(Block* block) {
  const auto node = replaced_.extract(block);
  if (node.empty()) return;
  for (const BlockKey& key : node.mapped()) {
    const BlockRef old = Find(key);
    if (old == nullptr) continue;
    for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
      if (old->ready(tier) && old->copy(tier).pins == 0) Drop(old.get(), tier);
    }
  }
}

void Directory::CheckInvariants(std::vector<SlotId> (*places)[kNumTiers]) const {
  uint32_t pinned[kNumTiers] = {};
  size_t evictable[kNumTiers] = {};
  size_t num_partials = 0;
  const auto visit = [&](const Block& block, bool listed) {
    bool any = false;
    CA_CHECK(block.listed == listed);
    for (uint32_t t = 0; t < kNumTiers; ++t) {
      const Copy& copy = block.copies[t];
      const bool absent = copy.state == CopyState::kAbsent;
      CA_CHECK(absent == !copy.slot);
      CA_CHECK(!absent || (copy.pins == 0 && !copy.unsaved));
      const bool may_go = listed && copy.state == CopyState::kReady && copy.pins == 0;
      CA_CHECK(may_go == (block.heap_positions[t] != kNotInHeap));
      const bool own = may_go && by_tenant_ && !copy.unsaved;
      CA_CHECK(own == (block.heap_positions[kNumTiers + t] != kNotInHeap));
      evictable[t] += may_go;
      pinned[t] += copy.pins > 0;
      any = any || !absent;
      if (!absent) (*places)[t].push_back(copy.slot.id());
    }
    CA_CHECK(any || !listed);
  };
  for (const BlockRef& block : blocks_) {
    visit(*block, true);
    num_partials += part_filled(*block);
  }
  for (const auto& weak : forgotten_) {
    if (const BlockRef block = weak.lock()) visit(*block, false);
  }
  for (const Block* block : partials_) CA_CHECK(block->listed && part_filled(*block));
  CA_CHECK(num_partials == partials_.size());
  for (const auto& [block, tails] : replaced_) CA_CHECK(block->listed && !tails.empty());
  for (uint32_t t = 0; t < kNumTiers; ++t) {
    CA_CHECK(pinned[t] == num_pinned_[t]);
    CA_CHECK(evictable[t] == saved_[t].size() + unsaved_[t].size());
    saved_[t].CheckInvariants();
    unsaved_[t].CheckInvariants();
    size_t own = 0;
    for (const Tenant& tenant : tenants_) {
      tenant.saved[t].CheckInvariants();
      own += tenant.saved[t].size();
    }
    CA_CHECK(own == (by_tenant_ ? saved_[t].size() : 0));
  }
}

}  // namespace cachedattn
