// RankHeap: blocks by rank, the lowest on top. Each block knows its place in the array, so that any
// of them can leave or change its rank in O(log n).
#pragma once

#include <span>
#include <vector>

#include "csrc/store/block.h"

namespace cachedattn {

class RankHeap {
 public:
  // Places are kept in Block::heap_positions[which].
  explicit RankHeap(uint32_t which) : which_(which) {}

  void Reserve(size_t num_blocks) { entries_.reserve(num_blocks); }
  size_t size() const { return entries_.size(); }

  Block* top() const { return entries_.empty() ? nullptr : entries_[0].block; }
  // The `n` lowest, in order; fewer if there are no more.
  std::vector<Block*> Lowest(size_t n) const;

  void Push(Block* block);
  void Erase(Block* block);
  void Rerank(Block* block);  // after its rank has changed

  void CheckInvariants() const;

 private:
  static constexpr size_t kChildren = 4;  // one or two cache lines of entries

  // Ranks lie here too: comparing them must not touch the blocks.
  struct Entry {
    Rank rank;
    Block* block;
  };

  void Place(size_t position, const Entry& entry) {
    entries_[position] = entry;
    entry.block->heap_positions[which_] = static_cast<uint32_t>(position);
  }
  void Sift(size_t position, const Entry& entry);

  const uint32_t which_;
  std::vector<Entry> entries_;
};

}  // namespace cachedattn
