#include "csrc/store/policy.h"

#include <algorithm>
#include <ranges>

namespace cachedattn {

void BlockPolicy::SetStamp(Block* block, uint64_t stamp) {
  block->stamp = stamp;
  directory_->Rerank(block);
}

void BlockPolicy::Inserted(Block* block) {
  const BlockRef parent = kind_ == PolicyKind::kFifo ? directory_->Find(block->parent) : nullptr;
  // Without a parent, or as its second child, it begins a new conversation.
  SetStamp(block, parent != nullptr && !parent->extended ? parent->stamp : ++clock_);
  // A part-filled tail will be replaced by the full block that extends its parent for good.
  if (parent != nullptr && !directory_->part_filled(*block)) parent->extended = true;
}

void BlockPolicy::Touch(std::span<const BlockRef> blocks) {
  if (kind_ == PolicyKind::kFifo) return;
  ++clock_;
  for (const BlockRef& block : blocks) SetStamp(block.get(), clock_);
}

void BlockPolicy::StartQueue() {
  ++epoch_;
  next_position_ = 0;
}

void BlockPolicy::Protect(std::span<const BlockRef> blocks) {
  if (blocks.empty()) return;
  // Only the order of positions counts. A request keeps the one that it had, which its last block
  // tells, as long as that is above those before it: so a queue that moves up changes nothing.
  const uint32_t had = blocks.back()->queue_position;
  const uint32_t position = had < kNotQueued / 2 ? std::max(had, next_position_) : next_position_;
  next_position_ = position + 1;
  for (const BlockRef& block : blocks) {
    if (block->queue_epoch == epoch_) continue;  // an earlier request needs it
    block->queue_epoch = epoch_;
    if (block->queue_position == position) continue;
    if (block->queue_position == kNotQueued) protected_.push_back(block);
    block->queue_position = position;
    directory_->Rerank(block.get());
  }
}

void BlockPolicy::EndQueue() {
  std::erase_if(protected_, [this](const std::weak_ptr<Block>& weak) {
    const BlockRef block = weak.lock();
    if (block == nullptr) return true;
    if (block->queue_epoch == epoch_) return false;
    block->queue_position = kNotQueued;
    directory_->Rerank(block.get());
    return true;
  });
}

void BlockPolicy::Restore(std::span<const BlockRef> blocks) {
  struct Found {
    uint32_t depth;
    uint64_t generation;
    Block* block;
  };
  std::vector<Found> order;
  order.reserve(blocks.size());
  for (const BlockRef& block : blocks) {
    order.push_back({block->depth, block->generation, block.get()});
    clock_ = std::max(clock_, block->generation);
  }
  std::ranges::sort(order, {}, [](const Found& f) { return std::pair(f.depth, f.generation); });
  if (kind_ == PolicyKind::kFifo) {
    for (const Found& found : order) Inserted(found.block);
    return;
  }
  // A chain's head is at least as recent as its tail.
  for (const auto& [depth, generation, block] : std::views::reverse(order)) {
    block->stamp = std::max(block->stamp, generation);
    const BlockRef parent = directory_->Find(block->parent);
    if (parent != nullptr) parent->stamp = std::max(parent->stamp, block->stamp);
  }
}

Windows ComputeWindows(uint64_t dram_bytes, uint64_t ssd_bytes, uint64_t conversation_bytes) {
  const auto requests = [&](uint64_t bytes) {
    return static_cast<uint32_t>(
        std::clamp<uint64_t>(bytes / std::max<uint64_t>(conversation_bytes, 1), 1, UINT32_MAX - 1));
  };
  return {requests(dram_bytes), requests(dram_bytes + ssd_bytes)};
}

}  // namespace cachedattn
