// Block: what the store knows of `block_size` consecutive tokens, and of their copies in the tiers.
// There may be millions: every byte here counts (bench/native/directory_bench.cc).
#pragma once

#include <algorithm>
#include <compare>
#include <memory>

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

// A block's bytes in one tier.
struct Copy {
  Slot slot;          // held from begin to end, kFilling included
  uint32_t pins = 0;  // sequences and moves that need the copy to stay
  CopyState state = CopyState::kAbsent;
  bool unsaved = false;  // its save or write to the next tier is queued: it goes after all others
};

constexpr uint32_t kNotQueued = UINT32_MAX;
constexpr uint32_t kNotInHeap = UINT32_MAX;

struct Block {
  BlockKey key;
  BlockKey parent;
  uint32_t tenant = 0;      // Directory::TenantIndex
  uint32_t num_tokens = 0;  // less than block_size: a part-filled tail
  uint32_t depth = 0;       // index in its chain
  uint64_t generation = 0;  // of the SSD copy
  Copy copies[kNumTiers];

  // Of the policy.
  uint64_t stamp = 0;  // last turn that used it; kFifo: when its conversation came
  uint32_t queue_position = kNotQueued;  // grows with the first waiting request that needs it
  uint32_t queue_epoch = 0;              // of the queue that gave it the position
  bool extended = false;                 // kFifo: a full block follows it

  bool write_failed = false;  // to SSD; not tried again

  // Of the directory.
  bool listed = false;
  uint32_t heap_positions[2 * kNumTiers];  // by tier: among all copies, among its tenant's

  Block() { std::ranges::fill(heap_positions, kNotInHeap); }

  Copy& copy(Tier tier) { return copies[static_cast<int>(tier)]; }
  const Copy& copy(Tier tier) const { return copies[static_cast<int>(tier)]; }
  bool ready(Tier tier) const { return copy(tier).state == CopyState::kReady; }
  bool absent(Tier tier) const { return copy(tier).state == CopyState::kAbsent; }
  // Without `ssd`: in another tier than that.
  bool resident(bool ssd) const {
    return ready(Tier::kDevice) || ready(Tier::kDram) || (ssd && ready(Tier::kSsd));
  }

  // What waiting requests need goes last, the head of the queue very last. Else the oldest stamp
  // goes first, and of one stamp the deepest.
  Rank rank() const {
    const uint64_t major =
        queue_position == kNotQueued ? stamp : (uint64_t{1} << 63) + (kNotQueued - queue_position);
    return {major, UINT32_MAX - depth};
  }
};

// A block lives while the directory lists it, or anything still uses its slots.
using BlockRef = std::shared_ptr<Block>;

}  // namespace cachedattn
