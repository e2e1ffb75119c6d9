// Directory: which block is where, and in which state (csrc/README.md, "Block states").
//
// Only the directory changes the state of a copy; each change is one function that checks the old
// state. The rights it hands out are move-only: Transfer (may write the bytes of a copy) and
// BlockPin (the copy stays where it is). Belongs to the control thread.
#pragma once

#include <compare>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/base/block_key.h"
#include "csrc/tier/slot_pool.h"

namespace cachedattn {

enum class CopyState : uint8_t { kAbsent = 0, kFilling, kReady };

// What a tier keeps longest has the highest rank (policy.h).
struct Rank {
  uint64_t major = 0;
  uint64_t minor = 0;
  auto operator<=>(const Rank&) const = default;
};

struct Fill;  // preload.h

// A block's bytes in one tier.
struct Copy {
  CopyState state = CopyState::kAbsent;
  uint32_t pins = 0;           // sequences and moves that need the copy to stay
  Slot slot;                   // held from begin to end, kFilling included
  std::shared_ptr<Fill> fill;  // the load that is filling it; empty for saves and writes
};

constexpr uint32_t kNotQueued = UINT32_MAX;

struct Block {
  BlockKey key;
  BlockKey parent;
  uint32_t num_tokens = 0;  // less than block_size: a part-filled tail
  uint32_t depth = 0;       // index in its chain
  uint64_t generation = 0;  // of the SSD copy
  Copy copies[kNumTiers];

  // Of the policy.
  Rank rank;
  uint64_t last_used = 0;
  uint64_t arrival = 0;                  // of the conversation that brought it
  uint32_t queue_position = kNotQueued;  // first waiting request that needs it
  bool extended = false;                 // a full block follows it

  // Of the saver and of the writer to SSD.
  bool save_queued = false;
  bool write_queued = false;
  bool write_failed = false;       // not tried again
  std::vector<BlockKey> replaces;  // part-filled tails that this block makes useless

  Copy& copy(Tier tier) { return copies[static_cast<int>(tier)]; }
  const Copy& copy(Tier tier) const { return copies[static_cast<int>(tier)]; }
  bool ready(Tier tier) const { return copy(tier).state == CopyState::kReady; }
  bool absent(Tier tier) const { return copy(tier).state == CopyState::kAbsent; }
  bool resident() const { return ready(Tier::kDevice) || ready(Tier::kDram) || ready(Tier::kSsd); }
};

// A block lives while the directory lists it, or anything still uses its slots.
using BlockRef = std::shared_ptr<Block>;

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
  struct Ranked {
    Rank rank;
    Block* block;
    auto operator<=>(const Ranked&) const = default;
  };

  explicit Directory(uint32_t block_size) : block_size_(block_size) {}

  // The listed block, or nullptr.
  BlockRef Find(const BlockKey& key) const;
  // Lists a block without copies; the caller begins to fill one at once.
  BlockRef Insert(const BlockKey& key, const BlockKey& parent, uint32_t num_tokens, uint32_t depth);

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

  // Copies of `tier` that are kReady and not pinned, the first to go first.
  const std::set<Ranked>& evictable(Tier tier) const { return evictable_[static_cast<int>(tier)]; }
  void SetRank(Block* block, const Rank& rank);

  // Part-filled blocks after `parent`.
  std::span<Block* const> partials(const BlockKey& parent) const;
  // Drops the part-filled tails that `block` replaces, as far as nothing uses them.
  void DropReplaced(Block* block);

  size_t num_blocks() const { return blocks_.size(); }
  uint32_t num_pinned(Tier tier) const { return num_pinned_[static_cast<int>(tier)]; }

  // Aborts on a broken invariant. `places` gets every slot that a listed or forgotten block holds.
  void CheckInvariants(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  friend class BlockPin;
  void Unpin(Block* block, Tier tier);
  void SetState(Block* block, Tier tier, CopyState from, CopyState to);
  void UpdateEvictable(Block* block, Tier tier);
  void Unlist(Block* block);

  const uint32_t block_size_;
  std::unordered_map<BlockKey, BlockRef, DigestHash> blocks_;
  std::unordered_map<BlockKey, std::vector<Block*>, DigestHash> partials_;  // by parent
  std::set<Ranked> evictable_[kNumTiers];
  uint32_t num_pinned_[kNumTiers] = {};
  std::vector<std::weak_ptr<Block>> forgotten_;  // for the invariants alone
};

}  // namespace cachedattn
