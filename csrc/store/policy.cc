#include "csrc/store/policy.h"

#include <algorithm>
#include <numeric>

namespace cachedattn {

Rank Policy::RankOf(const Block& block) const {
  const uint64_t head_last = UINT32_MAX - block.depth;
  if (kind_ == PolicyKind::kFifo) return {block.arrival, head_last};
  if (kind_ == PolicyKind::kLookahead && block.queue_position != kNotQueued) {
    return {(uint64_t{1} << 63) + (kNotQueued - block.queue_position), head_last};
  }
  return {block.last_used, head_last};
}

void Policy::Inserted(Block* block) {
  const BlockRef parent = directory_->Find(block->parent);
  if (parent != nullptr && !parent->extended) {
    block->arrival = parent->arrival;
  } else {
    block->arrival = ++clock_;  // a new conversation, or one that branches off
  }
  // A part-filled tail will be replaced by the full block that extends its parent for good.
  const bool part_filled = std::ranges::any_of(directory_->partials(block->parent),
                                               [&](const Block* b) { return b == block; });
  if (parent != nullptr && !part_filled) parent->extended = true;
  block->last_used = ++clock_;
  Update(block);
}

void Policy::Touch(std::span<const BlockRef> blocks) {
  ++clock_;
  for (const BlockRef& block : blocks) {
    block->last_used = clock_;
    Update(block.get());
  }
}

void Policy::Protect(std::span<const BlockRef> blocks, uint32_t position) {
  for (const BlockRef& block : blocks) {
    if (block->queue_position <= position) continue;
    if (block->queue_position == kNotQueued) protected_.push_back(block->key);
    block->queue_position = position;
    Update(block.get());
  }
}

void Policy::ClearProtection() {
  for (const BlockKey& key : protected_) {
    const BlockRef block = directory_->Find(key);
    if (block == nullptr) continue;
    block->queue_position = kNotQueued;
    Update(block.get());
  }
  protected_.clear();
}

void Policy::Restore(std::span<const BlockRef> blocks, std::span<const uint64_t> generations) {
  std::vector<size_t> order(blocks.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {},
                    [&](size_t i) { return std::pair(blocks[i]->depth, generations[i]); });
  for (size_t i : order) {
    Inserted(blocks[i].get());
    blocks[i]->last_used = generations[i];
    clock_ = std::max(clock_, generations[i]);
  }
  // A chain's head is at least as recent as its tail.
  for (auto it = order.rbegin(); it != order.rend(); ++it) {
    Block* block = blocks[*it].get();
    if (const BlockRef parent = directory_->Find(block->parent)) {
      parent->last_used = std::max(parent->last_used, block->last_used);
    }
  }
  for (const BlockRef& block : blocks) Update(block.get());
}

Windows ComputeWindows(uint64_t dram_bytes, uint64_t ssd_bytes, uint64_t conversation_bytes) {
  const auto requests = [&](uint64_t bytes) {
    return static_cast<uint32_t>(
        std::clamp<uint64_t>(bytes / std::max<uint64_t>(conversation_bytes, 1), 1, UINT32_MAX - 1));
  };
  return {requests(dram_bytes), requests(dram_bytes + ssd_bytes)};
}

}  // namespace cachedattn
