// Directory: which block is where, and in which state (csrc/README.md, "Block states").
//
// Only the directory changes the state of a copy; each change is one function that checks the old
// state. The rights it hands out are move-only: Transfer (may write the bytes of a copy) and
// BlockPin (the copy stays where it is). Belongs to the control thread.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <ranges>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "csrc/store/rank_heap.h"
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
  // `by_tenant`: the order in which copies go is kept for each tenant too (quotas need it).
  Directory(uint32_t block_size, bool by_tenant);

  // Memory for as many copies at once: later growth would be a pause.
  void Reserve(Tier tier, uint32_t num_copies);

  // The listed block, or nullptr.
  BlockRef Find(const BlockKey& key) const;
  // Lists a block without copies; the caller begins to fill one at once.
  BlockRef Insert(uint32_t tenant, const BlockKey& key, const BlockKey& parent, uint32_t num_tokens,
                  uint32_t depth);

  // Tenants by small numbers, given out as they come.
  uint32_t TenantIndex(const TenantId& id);
  std::optional<uint32_t> FindTenant(const TenantId& id) const;
  uint32_t num_tenants() const { return static_cast<uint32_t>(tenants_.size()); }
  const TenantId& tenant(uint32_t index) const { return tenants_[index].id; }
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

  // Copies of `tier` that are kReady and not pinned, the first to go on top: those that wait for no
  // save or write to the next tier, those of one tenant alone, and the others (Copy::unsaved).
  const RankHeap& saved(Tier tier) const { return saved_[Index(tier)]; }
  const RankHeap& saved(Tier tier, uint32_t tenant) const {
    return tenants_[tenant].saved[Index(tier)];
  }
  const RankHeap& unsaved(Tier tier) const { return unsaved_[Index(tier)]; }
  void SetUnsaved(Block* block, Tier tier, bool unsaved);
  // After what Block::rank() is made of has changed.
  void Rerank(Block* block);

  // Part-filled blocks after `parent`.
  auto partials(const BlockKey& parent) const {
    const auto [first, last] = partials_.equal_range(parent);
    return std::ranges::subrange(first, last);
  }
  bool part_filled(const Block& block) const { return block.num_tokens < block_size_; }
  // When `block` has landed, these part-filled tails are useless.
  void SetReplaced(Block* block, std::vector<BlockKey> tails);
  // Drops the part-filled tails that `block` replaces, as far as nothing uses them.
  void DropReplaced(Block* block);

  void ForEach(const auto& visit) const {
    for (const BlockRef& block : blocks_) visit(*block);
  }
  size_t num_blocks() const { return blocks_.size(); }
  uint32_t num_pinned(Tier tier) const { return num_pinned_[Index(tier)]; }

  // Aborts on a broken invariant. `places` gets every slot that a listed or forgotten block holds.
  void CheckInvariants(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  friend class BlockPin;

  // Sets of blocks that are looked up by a key of theirs, kept in the block alone.
  template <BlockKey Block::* key>
  struct By {
    using is_transparent = void;
    static const BlockKey& KeyOf(const BlockKey& k) { return k; }
    static const BlockKey& KeyOf(const auto& block) { return (*block).*key; }
    size_t operator()(const auto& a) const { return DigestHash()(KeyOf(a)); }
    bool operator()(const auto& a, const auto& b) const { return KeyOf(a) == KeyOf(b); }
  };
  using ByKey = By<&Block::key>;
  using ByParent = By<&Block::parent>;

  struct Tenant {
    explicit Tenant(const TenantId& tenant_id) : id(tenant_id) {}
    TenantId id;
    RankHeap saved[kNumTiers] = {RankHeap(3), RankHeap(4), RankHeap(5)};
  };

  static constexpr int Index(Tier tier) { return static_cast<int>(tier); }
  void Unpin(Block* block, Tier tier);
  void SetState(Block* block, Tier tier, CopyState from, CopyState to);
  void UpdateEvictable(Block* block, Tier tier);
  void Leave(Block* block, Tier tier);
  void Unlist(Block* block);

  const uint32_t block_size_;
  const bool by_tenant_;
  std::unordered_set<BlockRef, ByKey, ByKey> blocks_;
  std::unordered_multiset<Block*, ByParent, ByParent> partials_;
  std::unordered_map<const Block*, std::vector<BlockKey>> replaced_;  // by the longer block
  RankHeap saved_[kNumTiers] = {RankHeap(0), RankHeap(1), RankHeap(2)};
  RankHeap unsaved_[kNumTiers] = {RankHeap(0), RankHeap(1), RankHeap(2)};
  std::deque<Tenant> tenants_;
  std::map<TenantId, uint32_t> tenant_index_;
  uint32_t num_pinned_[kNumTiers] = {};
  std::vector<std::weak_ptr<Block>> forgotten_;  // for the invariants alone
};

}  // namespace cachedattn
