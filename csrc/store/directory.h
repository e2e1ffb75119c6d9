// Directory: which block is where, and in which state (csrc/README.md, "Block states").
//
// Only the directory changes the state of a copy; each change is one function that checks the old
// state. The rights it hands out are move-only: Transfer (may write the bytes of a copy) and
// BlockPin (the copy stays where it is). Belongs to the control thread.
//
// It also keeps, for each conversation and tier, the copies that may go: a conversation loses its
// last blocks first, since a hit is a contiguous prefix, and a block that several conversations
// share goes when the last of those that follow it has gone. Which conversation loses one is the
// policy's.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/store/block_table.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

// The right to write the bytes of a copy that is kFilling.
struct Transfer {
  BlockRef block;
  Tier tier = Tier::kDram;

  Transfer() = default;
  Transfer(BlockRef b, Tier t) : block(std::move(b)), tier(t) {}
  Transfer(Transfer&&) = default;
  Transfer& operator=(Transfer&&) = default;
};

class Directory;

// The right to find a copy where it is. Taken on a kFilling copy it counts once that is kReady.
class BlockPin {
 public:
  BlockPin() = default;
  BlockPin(BlockPin&& other) noexcept = default;
  BlockPin& operator=(BlockPin&& other) noexcept {
    if (this != &other) {
      Release();
      block_ = std::move(other.block_);
      directory_ = other.directory_;
      tier_ = other.tier_;
    }
    return *this;
  }
  ~BlockPin() { Release(); }

  explicit operator bool() const { return block_ != nullptr; }
  const BlockRef& block() const { return block_; }
  SlotId slot() const { return block_->copy(tier_).slot.id(); }
  void Release();

 private:
  friend class Directory;
  BlockPin(Directory* directory, BlockRef block, Tier tier)
      : directory_(directory), block_(std::move(block)), tier_(tier) {}

  Directory* directory_ = nullptr;
  BlockRef block_;
  Tier tier_ = Tier::kDram;
};

class Directory {
 public:
  // `policy` outlives the directory, which tells it what may go.
  Directory(uint32_t block_size, Policy* policy);

  // Memory for as many more blocks at once: later growth would be a pause.
  void Reserve(uint32_t num_blocks);

  // The listed block, or nullptr.
  BlockRef Find(const BlockKey& key) const;
  // The same for one key after the other until visit(index, block) is false, `block` valid until
  // the directory changes.
  void FindEach(std::span<const BlockKey> keys, const auto& visit) const {
    blocks_.FindEach(keys, visit);
  }
  // Lists a block without copies; the caller begins to fill one at once. `follows`: the block of
  // `parent` comes before it in the context too.
  BlockRef Insert(uint32_t tenant, const BlockKey& key, const BlockKey& parent, uint32_t num_tokens,
                  uint32_t depth, bool follows, Conversation owner);
  // A turn of `owner` uses the block, which holds its owner.
  void SetOwner(Block* block, Conversation owner);
  // A cut has taken the blocks before this one out of the context.
  void Detach(Block* block);

  // Tenants by small numbers, given out as they come.
  uint32_t TenantIndex(const TenantId& id);
  std::optional<uint32_t> FindTenant(const TenantId& id) const;
  uint32_t num_tenants() const { return static_cast<uint32_t>(tenants_.size()); }
  const TenantId& tenant(uint32_t index) const { return tenants_[index]; }
  // What the slot of its SSD copy says.
  BlockHeader HeaderOf(const Block& block) const;

  // kAbsent -> kFilling.
  Transfer BeginFill(const BlockRef& block, Tier tier, Slot slot);
  // kFilling -> kReady.
  void FinishFill(Transfer transfer);
  // kFilling -> kAbsent; the slot comes back to the caller. REQUIRES: no pins.
  Slot AbortFill(Transfer transfer);
  // kReady -> kAbsent. REQUIRES: no pins.
  void Drop(Block* block, Tier tier);
  // The block is no longer findable; its slots are free when nothing uses them any more.
  void Forget(Block* block);

  BlockPin Pin(const BlockRef& block, Tier tier);

  // The copy of `conversation` in `tier` that goes next: kReady, not pinned, not leaving, followed
  // by none. nullptr: none may go now.
  Block* Last(Conversation conversation, Tier tier) const;
  // Copies in `tier` that are kReady, not pinned and not leaving, followed or not.
  uint32_t num_idle(Tier tier) const { return num_idle_[Index(tier)]; }
  // The same of those that are leaving, and the one that has been for longest.
  uint32_t num_leaving(Tier tier) const { return leaving_[Index(tier)].size; }
  Block* FirstLeaving(Tier tier) const { return leaving_[Index(tier)].first; }
  // Copy::leaving. Those before it may go meanwhile.
  void SetLeaving(Block* block, Tier tier, bool leaving);
  // Nothing follows the block, in any tier.
  bool ends_chain(const Block& block) const;

  // Tokens of the part-filled blocks after `parent`, longest first. Very many may have few lengths:
  // the first tails of all who share a prompt.
  std::vector<uint32_t> PartialLengths(const BlockKey& parent) const;
  bool part_filled(const Block& block) const { return block.num_tokens < block_size_; }
  // When `block` has landed, these part-filled tails are useless.
  void SetReplaced(Block* block, std::vector<BlockKey> tails);
  // Drops the part-filled tails that `block` replaces, as far as nothing uses them: on SSD too once
  // it is `on_ssd` itself, or there is no SSD tier.
  void DropReplaced(Block* block, bool on_ssd);

  void ForEach(const auto& visit) const { blocks_.ForEach(visit); }
  size_t num_blocks() const { return blocks_.size(); }
  uint32_t num_pinned(Tier tier) const { return num_pinned_[Index(tier)]; }

  // Aborts on a broken invariant. `places` gets every slot that a listed or forgotten block holds.
  void CheckInvariants(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  friend class BlockPin;

  // Linked by Copy::next and Copy::previous.
  struct List {
    Block* first = nullptr;
    Block* last = nullptr;
    uint32_t size = 0;
  };
  enum class End : uint8_t { kFront, kBack };

  static constexpr int Index(Tier tier) { return static_cast<int>(tier); }
  void Unpin(Block* block, Tier tier);
  void SetState(Block* block, Tier tier, CopyState from, CopyState to);
  void Unlist(Block* block);

  // Changes a copy or its block by `change`, and then what follows from that: whether it is one
  // more copy that follows another, and in which list it is.
  void Change(Block* block, Tier tier, const auto& change);
  static bool CountsAsFollower(const Block& block, Tier tier);
  static bool IsIdle(const Block& block, Tier tier);
  void CountFollower(Block* block, Tier tier, int more);
  List* ListOf(const Block& block, Tier tier);
  void Enlist(Block* block, Tier tier, End end);
  void Delist(Block* block, Tier tier);
  static uint32_t CheckList(const List& list, uint32_t tier);  // its size

  const uint32_t block_size_;
  Policy* const policy_;
  BlockTable blocks_;
  // By parent and number of tokens: how many part-filled blocks there are.
  std::unordered_map<BlockKey, std::map<uint32_t, uint32_t, std::greater<>>, DigestHash> partials_;
  std::unordered_map<const Block*, std::vector<BlockKey>> replaced_;  // by the longer block
  std::vector<std::array<List, kNumTiers>> last_;                     // by conversation
  List leaving_[kNumTiers];
  uint32_t num_idle_[kNumTiers] = {};
  // Followers, by tier, of blocks that are not listed (any more).
  std::unordered_map<BlockKey, std::array<uint32_t, kNumTiers>, DigestHash> orphans_;
  std::vector<TenantId> tenants_;
  std::map<TenantId, uint32_t> tenant_index_;
  uint32_t num_pinned_[kNumTiers] = {};
  std::vector<std::weak_ptr<Block>> forgotten_;  // for the invariants alone
};

}  // namespace cachedattn
