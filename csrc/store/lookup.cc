#include "csrc/store/lookup.h"

#include <algorithm>

namespace cachedattn {

namespace {

// The longest part-filled block `block` of the chain, of at most `limit` tokens.
BlockRef FindTail(const Directory& directory, const Chain& chain, uint32_t block, uint32_t limit,
                  bool ssd) {
  for (const uint32_t length : directory.PartialLengths(chain.parent_key(block))) {
    if (length > limit) continue;
    BlockRef tail = directory.Find(chain.PartialKey(block, length));
    if (tail != nullptr && tail->resident(ssd)) return tail;
  }
  return nullptr;
}

}  // namespace

History FindHistory(const Directory& directory, const Chain& chain, uint32_t limit, bool ssd) {
  limit = std::min(limit, chain.num_tokens());
  const uint32_t block_size = chain.block_size();
  uint32_t num_full = limit / block_size;
  std::vector<const BlockRef*> blocks(num_full);
  directory.FindEach(chain.keys().first(num_full), [&](size_t i, const BlockRef* block) {
    if (block != nullptr && (*block)->resident(ssd)) {
      blocks[i] = block;
    } else if (chain.truncation().window == 0) {  // only a window can leave one out of the context
      num_full = static_cast<uint32_t>(i);
      return false;
    }
    return true;
  });
  // The context after `num_tokens` tokens: what is kept of the head, then a run up to the end.
  const auto build = [&](uint32_t num_tokens, uint32_t full, const BlockRef* tail) {
    History history;
    std::vector<uint32_t> indices = chain.ContextBlocks(num_tokens);
    history.blocks.reserve(indices.size());
    for (uint32_t index : indices) {
      const BlockRef* block = index < full ? blocks[index] : tail;
      if (block == nullptr) return History();
      history.blocks.push_back(*block);
    }
    history.num_tokens = num_tokens;
    history.indices = std::move(indices);
    return history;
  };
  for (uint32_t full = num_full;; --full) {
    const uint32_t left = std::min(limit - full * block_size, block_size - 1);
    if (const BlockRef tail = FindTail(directory, chain, full, left, ssd)) {
      History history = build(full * block_size + tail->num_tokens, full, &tail);
      if (history.num_tokens > 0) return history;
    }
    if (full == 0) return History();
    if (blocks[full - 1] != nullptr) {
      History history = build(full * block_size, full, nullptr);
      if (history.num_tokens > 0) return history;
    }
  }
}

BlockRef FindHistoryEnd(const Directory& directory, const Chain& chain, uint32_t limit, bool ssd) {
  if (chain.truncation().window != 0) {
    const History history = FindHistory(directory, chain, limit, ssd);
    return history.blocks.empty() ? nullptr : history.blocks.back();
  }
  limit = std::min(limit, chain.num_tokens());
  const uint32_t block_size = chain.block_size();
  BlockRef end;
  uint32_t full = 0;  // so many first blocks are resident
  for (uint32_t missing = limit / block_size; full < missing;) {
    const uint32_t middle = (full + missing) / 2;
    BlockRef block = directory.Find(chain.key(middle));
    if (block != nullptr && block->resident(ssd)) {
      end = std::move(block);
      full = middle + 1;
    } else {
      missing = middle;
    }
  }
  const uint32_t left = std::min(limit - full * block_size, block_size - 1);
  BlockRef tail = FindTail(directory, chain, full, left, ssd);
  return tail != nullptr ? tail : end;
}

Tier ServingTier(const Block& block) {
  CA_CHECK(block.resident(true));
  return block.ready(Tier::kDevice) ? Tier::kDevice
         : block.ready(Tier::kDram) ? Tier::kDram
                                    : Tier::kSsd;
}

}  // namespace cachedattn
