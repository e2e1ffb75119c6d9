#include "csrc/store/rank_heap.h"

#include <queue>

namespace cachedattn {

void RankHeap::Push(Block* block) {
  const Entry entry{block->rank(), block};
  entries_.push_back(entry);
  Sift(entries_.size() - 1, entry);
}

void RankHeap::Erase(Block* block) {
  const uint32_t hole = std::exchange(block->heap_positions[which_], kNotInHeap);
  CA_CHECK(hole < entries_.size() && entries_[hole].block == block);
  const Entry last = entries_.back();
  entries_.pop_back();
  if (last.block != block) Sift(hole, last);
}

void RankHeap::Rerank(Block* block) {
  Sift(block->heap_positions[which_], Entry{block->rank(), block});
}

// Puts `entry` where it belongs, beginning at `position`, whose own entry is void.
void RankHeap::Sift(size_t position, const Entry& entry) {
  while (position > 0) {
    const size_t parent = (position - 1) / kChildren;
    if (entries_[parent].rank <= entry.rank) break;
    Place(position, entries_[parent]);
    position = parent;
  }
  for (size_t first; (first = kChildren * position + 1) < entries_.size();) {
    const size_t end = std::min(first + kChildren, entries_.size());
    size_t lowest = first;
    for (size_t child = first + 1; child < end; ++child) {
      if (entries_[child].rank < entries_[lowest].rank) lowest = child;
    }
    if (entry.rank <= entries_[lowest].rank) break;
    Place(position, entries_[lowest]);
    position = lowest;
  }
  Place(position, entry);
}

std::vector<Block*> RankHeap::Lowest(size_t n) const {
  const auto later = [this](size_t a, size_t b) { return entries_[a].rank > entries_[b].rank; };
  std::priority_queue<size_t, std::vector<size_t>, decltype(later)> frontier(later);
  if (!entries_.empty()) frontier.push(0);
  std::vector<Block*> blocks;
  while (blocks.size() < n && !frontier.empty()) {
    const size_t position = frontier.top();
    frontier.pop();
    blocks.push_back(entries_[position].block);
    const size_t first = kChildren * position + 1;
    for (size_t child = first; child < std::min(first + kChildren, entries_.size()); ++child) {
      frontier.push(child);
    }
  }
  return blocks;
}

void RankHeap::CheckInvariants() const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const auto& [rank, block] = entries_[i];
    CA_CHECK(block->heap_positions[which_] == i);
    CA_CHECK(block->rank() == rank);
    CA_CHECK(i == 0 || entries_[(i - 1) / kChildren].rank <= rank);
  }
}

}  // namespace cachedattn
