// Block: what the store knows of `block_size` consecutive tokens, and of their copies in the tiers.
// There may be millions: every byte here counts (bench/native/directory_bench.cc).
#pragma once

#include <memory>

#include "csrc/base/block_key.h"
#include "csrc/policy/policy.h"
#include "csrc/tier/slot_pool.h"

namespace cachedattn {

enum class CopyState : uint8_t { kAbsent = 0, kFilling, kReady };

struct Block;

// A block's bytes in one tier.
struct Copy {
  Slot slot;          // held from begin to end, kFilling included
  uint32_t pins = 0;  // sequences and moves that need the copy to stay
  // Copies in this tier of the blocks that follow this one. A copy that is followed is not evicted:
  // a hit is a contiguous prefix. The next four fields are the directory's.
  uint32_t followers = 0;
  Block* next = nullptr;  // in the list of its conversation's last blocks, or of the leaving ones
  Block* previous = nullptr;
  CopyState state = CopyState::kAbsent;
  bool listed = false;
  bool leaving = false;  // its save or write to the next tier is queued or under way
  bool sealed = false;   // in DRAM: its header page has the seals of what was computed
};

struct Block {
  BlockKey key;
  BlockKey parent;
  uint32_t tenant = 0;                   // Directory::TenantIndex
  uint32_t num_tokens = 0;               // less than block_size: a part-filled tail
  uint32_t depth = 0;                    // index in its chain
  Conversation owner = kNoConversation;  // whose turn used it last; held
  uint64_t generation = 0;               // of the SSD copy
  Copy copies[kNumTiers];
  std::weak_ptr<Block> before;  // the block of `parent`, as long as that is listed

  bool write_failed = false;  // to SSD; not tried again
  bool listed = false;        // in the directory
  // False for the first block of a chain, and where a cut has taken those before it out of the
  // context: it follows no block then.
  bool follows = false;

  Copy& copy(Tier tier) { return copies[static_cast<int>(tier)]; }
  const Copy& copy(Tier tier) const { return copies[static_cast<int>(tier)]; }
  bool ready(Tier tier) const { return copy(tier).state == CopyState::kReady; }
  bool absent(Tier tier) const { return copy(tier).state == CopyState::kAbsent; }
  // Without `ssd`: in another tier than that.
  bool resident(bool ssd) const {
    return ready(Tier::kDevice) || ready(Tier::kDram) || (ssd && ready(Tier::kSsd));
  }
};

// A block lives while the directory lists it, or anything still uses its slots.
using BlockRef = std::shared_ptr<Block>;

}  // namespace cachedattn
