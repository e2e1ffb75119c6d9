// BlockPolicy: which copies a tier keeps longest (design D6).
//
//   kLookahead  blocks that waiting requests need go last, and from the queue's tail first; the
//               others as kLru. The queue is an oracle.
//   kLru        least recently used turn first.
//   kFifo       the conversation that came first goes first.
//
// Within a turn or a conversation the deepest block goes first, since a hit is a contiguous
// prefix. DRAM and SSD share one ranking.
#pragma once

#include <span>
#include <vector>

#include "csrc/store/attention_store.h"
#include "csrc/store/directory.h"

namespace cachedattn {

class BlockPolicy {
 public:
  BlockPolicy(PolicyKind kind, Directory* directory) : kind_(kind), directory_(directory) {}

  PolicyKind kind() const { return kind_; }

  // A new block: its conversation is that of the block it extends.
  void Inserted(Block* block);
  // These blocks, or some tail of their chain, were used by a turn.
  void Touch(std::span<const BlockRef> blocks);

  // The waiting queue: from StartQueue to EndQueue, the blocks that each request needs, next to run
  // first. Costs one visit of each block; only those that come, go or change places are ranked.
  void StartQueue();
  void Protect(std::span<const BlockRef> blocks);
  void EndQueue();

  // Ranks blocks that were found on disk at open, before their copies are listed. Generations grow
  // with the time of writing.
  void Restore(std::span<const BlockRef> blocks);

 private:
  void SetStamp(Block* block, uint64_t stamp);

  const PolicyKind kind_;
  Directory* const directory_;
  uint64_t clock_ = 0;  // grows with every turn and every new conversation
  uint32_t epoch_ = 0;  // number of the queue
  uint32_t next_position_ = 0;
  std::vector<std::weak_ptr<Block>> protected_;
};

// How far into the waiting queue the store plans, in requests: what fits into DRAM is worth
// prefetching, what fits into DRAM and SSD is worth keeping.
struct Windows {
  uint32_t prefetch = 0;
  uint32_t eviction = 0;
};
Windows ComputeWindows(uint64_t dram_bytes, uint64_t ssd_bytes, uint64_t conversation_bytes);

}  // namespace cachedattn
