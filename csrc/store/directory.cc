#include "csrc/store/directory.h"

#include <algorithm>

namespace cachedattn {

void BlockPin::Release() {
  if (block_ != nullptr) directory_->Unpin(block_.get(), tier_);
  block_.reset();
}

Directory::Directory(uint32_t block_size, Policy* policy)
    : block_size_(block_size), policy_(policy) {}

void Directory::Reserve(uint32_t num_blocks) { blocks_.Reserve(blocks_.capacity() + num_blocks); }

BlockRef Directory::Find(const BlockKey& key) const {
  const BlockRef* block = blocks_.Find(key);
  return block == nullptr ? nullptr : *block;
}

BlockRef Directory::Insert(uint32_t tenant, const BlockKey& key, const BlockKey& parent,
                           uint32_t num_tokens, uint32_t depth, bool follows, Conversation owner) {
  CA_CHECK(num_tokens > 0 && num_tokens <= block_size_);
  CA_CHECK(tenant < tenants_.size());
  auto block = std::make_shared<Block>();
  block->key = key;
  block->parent = parent;
  block->tenant = tenant;
  block->num_tokens = num_tokens;
  block->depth = depth;
  block->listed = true;
  block->follows = follows;
  if (const auto node = orphans_.extract(key); !node.empty()) {
    for (uint32_t t = 0; t < kNumTiers; ++t) block->copies[t].followers = node.mapped()[t];
  }
  blocks_.Insert(block);
  if (part_filled(*block)) ++partials_[parent][num_tokens];
  SetOwner(block.get(), owner);
  return block;
}

void Directory::SetOwner(Block* block, Conversation owner) {
  if (!block->listed || block->owner == owner) return;
  const Conversation before = block->owner;
  policy_->Hold(owner);
  if (last_.size() <= owner) last_.resize(owner + 1);
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
    if (block->copy(tier).listed) Delist(block, tier);
  }
  block->owner = owner;
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) Enlist(block, tier, End::kBack);
  if (before != kNoConversation) policy_->Release(before);
}

void Directory::Detach(Block* block) {
  if (!block->follows) return;
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
    if (CountsAsFollower(*block, tier)) CountFollower(block, tier, -1);
  }
  block->follows = false;
}

Block* Directory::Last(Conversation conversation, Tier tier) const {
  return conversation < last_.size() ? last_[conversation][Index(tier)].first : nullptr;
}

std::vector<uint32_t> Directory::PartialLengths(const BlockKey& parent) const {
  std::vector<uint32_t> lengths;
  const auto it = partials_.find(parent);
  if (it == partials_.end()) return lengths;
  for (const auto& [length, count] : it->second) lengths.push_back(length);
  return lengths;
}

bool Directory::ends_chain(const Block& block) const {
  return std::ranges::all_of(block.copies, [](const Copy& copy) { return copy.followers == 0; });
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
          .tenant = tenants_[block.tenant],
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
  std::array<uint32_t, kNumTiers> followers;
  for (uint32_t t = 0; t < kNumTiers; ++t) {
    followers[t] = std::exchange(block->copies[t].followers, 0);
  }
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
    if (CountsAsFollower(*block, tier)) CountFollower(block, tier, -1);
    if (block->copy(tier).listed) Delist(block, tier);
    num_idle_[Index(tier)] -= IsIdle(*block, tier);
  }
  block->listed = false;
  policy_->Release(std::exchange(block->owner, kNoConversation));
  if (part_filled(*block)) {
    const auto it = partials_.find(block->parent);
    if (--it->second.at(block->num_tokens) == 0) it->second.erase(block->num_tokens);
    if (it->second.empty()) partials_.erase(it);
  }
  replaced_.erase(block);
  const BlockKey key = block->key;
  blocks_.Erase(key);  // the block may go with its entry
  if (followers != std::array<uint32_t, kNumTiers>{}) orphans_[key] = followers;
}

bool Directory::CountsAsFollower(const Block& block, Tier tier) {
  return block.listed && block.follows && !block.absent(tier) && !block.copy(tier).leaving;
}

bool Directory::IsIdle(const Block& block, Tier tier) {
  const Copy& copy = block.copy(tier);
  return block.listed && copy.state == CopyState::kReady && copy.pins == 0 && !copy.leaving;
}

void Directory::Change(Block* block, Tier tier, const auto& change) {
  const bool followed = CountsAsFollower(*block, tier), idle = IsIdle(*block, tier);
  const bool leaving = block->copy(tier).leaving;
  if (block->copy(tier).listed) Delist(block, tier);
  change(&block->copy(tier));
  num_idle_[Index(tier)] += IsIdle(*block, tier) - idle;
  // One that was leaving and is not any more was the first to go, and is so again.
  Enlist(block, tier, leaving ? End::kFront : End::kBack);
  const int more = CountsAsFollower(*block, tier) - followed;
  if (more != 0) CountFollower(block, tier, more);
}

void Directory::CountFollower(Block* block, Tier tier, int more) {
  BlockRef before = block->before.lock();
  if (before == nullptr || !before->listed) block->before = before = Find(block->parent);
  if (before != nullptr) {
    before->copy(tier).followers += more;
    if (before->copy(tier).listed) Delist(before.get(), tier);
    Enlist(before.get(), tier, End::kFront);  // it goes right after what has followed it
    return;
  }
  auto& followers = orphans_[block->parent];
  followers[Index(tier)] += more;
  if (followers == std::array<uint32_t, kNumTiers>{}) orphans_.erase(block->parent);
}

Directory::List* Directory::ListOf(const Block& block, Tier tier) {
  return block.copy(tier).leaving ? &leaving_[Index(tier)] : &last_[block.owner][Index(tier)];
}

// Puts a copy that may go into its list.
void Directory::Enlist(Block* block, Tier tier, End end) {
  Copy& copy = block->copy(tier);
  if (!block->listed || copy.state != CopyState::kReady || copy.pins > 0) return;
  if (copy.followers > 0 && !copy.leaving) return;
  List* list = ListOf(*block, tier);
  copy.listed = true;
  copy.previous = end == End::kFront ? nullptr : list->last;
  copy.next = end == End::kFront ? list->first : nullptr;
  (copy.previous ? copy.previous->copy(tier).next : list->first) = block;
  (copy.next ? copy.next->copy(tier).previous : list->last) = block;
  if (list->size++ == 0 && !copy.leaving) policy_->SetEvictable(block->owner, tier, true);
}

void Directory::Delist(Block* block, Tier tier) {
  Copy& copy = block->copy(tier);
  List* list = ListOf(*block, tier);
  copy.listed = false;
  (copy.previous ? copy.previous->copy(tier).next : list->first) = copy.next;
  (copy.next ? copy.next->copy(tier).previous : list->last) = copy.previous;
  if (--list->size == 0 && !copy.leaving) policy_->SetEvictable(block->owner, tier, false);
}

void Directory::SetState(Block* block, Tier tier, CopyState from, CopyState to) {
  CA_CHECK(block->copy(tier).state == from);
  Change(block, tier, [to](Copy* copy) {
    copy->state = to;
    if (to == CopyState::kAbsent) copy->leaving = copy->sealed = false;
  });
  if (to != CopyState::kAbsent) return;
  for (const Copy& other : block->copies) {
    if (other.state != CopyState::kAbsent) return;
  }
  if (block->listed) Unlist(block);
}

void Directory::SetLeaving(Block* block, Tier tier, bool leaving) {
  if (block->copy(tier).leaving == leaving) return;
  CA_CHECK(!block->absent(tier));
  Change(block, tier, [leaving](Copy* copy) { copy->leaving = leaving; });
}

BlockPin Directory::Pin(const BlockRef& block, Tier tier) {
  Copy& copy = block->copy(tier);
  CA_CHECK(copy.state != CopyState::kAbsent);
  if (copy.pins > 0) {
    ++copy.pins;
  } else {
    ++num_pinned_[Index(tier)];
    Change(block.get(), tier, [](Copy* c) { c->pins = 1; });
  }
  return BlockPin(this, block, tier);
}

void Directory::Unpin(Block* block, Tier tier) {
  Copy& copy = block->copy(tier);
  CA_CHECK(copy.pins > 0);
  if (copy.pins > 1) {
    --copy.pins;
  } else {
    --num_pinned_[Index(tier)];
    Change(block, tier, [](Copy* c) { c->pins = 0; });
  }
}

void Directory::SetReplaced(Block* block, std::vector<BlockKey> tails) {
  if (!tails.empty()) replaced_[block] = std::move(tails);
}

void Directory::DropReplaced(Block* block, bool on_ssd) {
  const auto it = replaced_.find(block);
  if (it == replaced_.end()) return;
  std::erase_if(it->second, [&](const BlockKey& key) {
    const BlockRef old = Find(key);
    if (old == nullptr) return true;
    for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
      if (tier == Tier::kSsd && !on_ssd) continue;
      if (old->ready(tier) && old->copy(tier).pins == 0) Drop(old.get(), tier);
    }
    return !old->listed || on_ssd;
  });
  if (it->second.empty()) replaced_.erase(it);
}

void Directory::CheckInvariants(std::vector<SlotId> (*places)[kNumTiers]) const {
  uint32_t pinned[kNumTiers] = {}, idle[kNumTiers] = {}, enlisted[kNumTiers] = {};
  size_t num_partials = 0;
  std::unordered_map<BlockKey, std::array<uint32_t, kNumTiers>, DigestHash> followers;
  const auto visit = [&](const Block& block, bool listed) {
    bool any = false;
    CA_CHECK(block.listed == listed && listed == (block.owner != kNoConversation));
    for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
      const Copy& copy = block.copy(tier);
      const bool absent = copy.state == CopyState::kAbsent;
      CA_CHECK(absent == !copy.slot);
      CA_CHECK(!absent || (copy.pins == 0 && !copy.leaving));
      const bool may_go = listed && copy.state == CopyState::kReady && copy.pins == 0;
      CA_CHECK(copy.listed == (may_go && (copy.leaving || copy.followers == 0)));
      idle[Index(tier)] += may_go && !copy.leaving;
      enlisted[Index(tier)] += copy.listed;
      pinned[Index(tier)] += copy.pins > 0;
      any = any || !absent;
      if (!absent) (*places)[Index(tier)].push_back(copy.slot.id());
      if (CountsAsFollower(block, tier)) ++followers[block.parent][Index(tier)];
    }
    CA_CHECK(any || !listed);
  };
  ForEach([&](const Block& block) {
    visit(block, true);
    num_partials += part_filled(block);
  });
  for (const auto& weak : forgotten_) {
    if (const BlockRef block = weak.lock()) visit(*block, false);
  }
  size_t num_orphaned = 0;
  for (const auto& [key, counts] : followers) {
    const BlockRef parent = Find(key);
    num_orphaned += parent == nullptr;
    for (uint32_t t = 0; t < kNumTiers; ++t) {
      CA_CHECK(counts[t] == (parent ? parent->copies[t].followers : orphans_.at(key)[t]));
    }
  }
  CA_CHECK(num_orphaned == orphans_.size());
  for (const auto& [parent, lengths] : partials_) {
    CA_CHECK(!lengths.empty());
    for (const auto& [length, count] : lengths) {
      CA_CHECK(count > 0);
      num_partials -= count;
    }
  }
  CA_CHECK(num_partials == 0);
  for (const auto& [block, tails] : replaced_) CA_CHECK(block->listed && !tails.empty());
  for (uint32_t t = 0; t < kNumTiers; ++t) {
    CA_CHECK(pinned[t] == num_pinned_[t] && idle[t] == num_idle_[t]);
    uint32_t in_lists = CheckList(leaving_[t], t);
    for (const auto& lists : last_) in_lists += CheckList(lists[t], t);
    CA_CHECK(in_lists == enlisted[t]);
  }
}

uint32_t Directory::CheckList(const List& list, uint32_t tier) {
  uint32_t size = 0;
  const Block* previous = nullptr;
  for (const Block* block = list.first; block != nullptr; block = block->copies[tier].next) {
    CA_CHECK(block->copies[tier].listed && block->copies[tier].previous == previous);
    previous = block;
    ++size;
  }
  CA_CHECK(list.last == previous && list.size == size);
  return size;
}

}  // namespace cachedattn
