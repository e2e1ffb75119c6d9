#include "csrc/store/chain.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace cachedattn {

namespace {

uint32_t KeptBlocks(const Truncation& truncation, uint32_t block_size) {
  const uint64_t kept = (uint64_t{truncation.keep_first} + block_size - 1) / block_size;
  return static_cast<uint32_t>(kept);
}

}  // namespace

Status Truncation::Validate(uint32_t block_size) const {
  if (!(ratio > 0 && ratio <= 1)) {
    return Status(Code::kInvalidArgument,
                  "ratio: must be above 0 and at most 1, got " + std::to_string(ratio));
  }
  if (window != 0 && window / block_size <= KeptBlocks(*this, block_size)) {
    return Status(Code::kInvalidArgument,
                  "window: " + std::to_string(window) + " tokens hold no block of " +
                      std::to_string(block_size) + " tokens that may leave after the first " +
                      std::to_string(keep_first) + " (keep_first)");
  }
  return Status();
}

uint64_t ConversationName(std::string_view name) {
  if (name.empty()) return 0;
  const TenantId id = TenantIdOf(name);  // a hash of the name
  uint64_t number = 0;
  std::memcpy(&number, &id, sizeof number);
  return number | 1;
}

Chain::Chain(const TenantId& tenant, const BlockKey& root, uint32_t block_size,
             const Truncation& truncation, uint64_t conversation)
    : tenant_(tenant),
      root_(root),
      block_size_(block_size),
      truncation_(truncation),
      conversation_(conversation) {
  if (truncation.window == 0) return;
  CA_CHECK(truncation.Validate(block_size).ok());
  window_blocks_ = truncation.window / block_size;
  cut_.first_block = KeptBlocks(truncation, block_size);
  const uint32_t droppable = window_blocks_ - cut_.first_block;
  // The small addend keeps a product such as 0.29 * 100 from falling below the whole number.
  const auto share = static_cast<uint32_t>(truncation.ratio * droppable + 1e-9);
  cut_.num_blocks = std::clamp<uint32_t>(share, 1, droppable);
}

void Chain::Append(std::span<const TokenId> tokens) {
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  ExtendKeys();
}

void Chain::ExtendKeys() {
  while ((keys_.size() + 1) * block_size_ <= tokens_.size()) {
    keys_.push_back(PartialKey(num_full_blocks(), block_size_));
  }
}

BlockKey Chain::PartialKey(uint32_t block, uint32_t num_tokens) const {
  const size_t first = size_t{block} * block_size_;
  CA_CHECK(num_tokens > 0 && num_tokens <= block_size_);
  CA_CHECK(first + num_tokens <= tokens_.size());
  const Cut* cut = CutBefore(block);
  return ChildKey(parent_key(block), std::span(cut, cut ? 1 : 0),
                  std::span(tokens_).subspan(first, num_tokens));
}

const Cut* Chain::CutBefore(uint32_t block) const {
  if (window_blocks_ == 0 || block < window_blocks_) return nullptr;
  return (block - window_blocks_) % cut_.num_blocks == 0 ? &cut_ : nullptr;
}

std::vector<uint32_t> Chain::ContextBlocks(uint32_t num_tokens) const {
  const uint32_t end = (num_tokens + block_size_ - 1) / block_size_;
  uint32_t kept = end, dropped = 0;
  if (window_blocks_ != 0 && end > window_blocks_) {
    const uint32_t cuts = 1 + (end - 1 - window_blocks_) / cut_.num_blocks;
    kept = cut_.first_block;
    dropped = cuts * cut_.num_blocks;
  }
  std::vector<uint32_t> blocks(end - dropped);
  std::iota(blocks.begin(), blocks.begin() + kept, 0);
  std::iota(blocks.begin() + kept, blocks.end(), kept + dropped);
  return blocks;
}

}  // namespace cachedattn
