// The longest reusable history of a chain.
#pragma once

#include <vector>

#include "csrc/store/chain.h"
#include "csrc/store/directory.h"

namespace cachedattn {

// The context after `num_tokens` tokens of a chain, all of it resident. Its last block may be a
// part-filled tail, which a sequence extends in a slot of its own.
struct History {
  uint32_t num_tokens = 0;        // dropped ones included
  std::vector<uint32_t> indices;  // Chain::ContextBlocks(num_tokens)
  std::vector<BlockRef> blocks;   // one for each index

  const Block* end() const { return blocks.empty() ? nullptr : blocks.back().get(); }
};

// The longest history of at most `limit` tokens. Blocks that a cut has dropped from the context
// need not be resident. Without `ssd`, blocks that only SSD holds are not.
History FindHistory(const Directory& directory, const Chain& chain, uint32_t limit, bool ssd);

// The last block of that history, by bisection: for a queue of long histories. Where damage has
// taken a block out of the middle it may be one behind that, so this is for hints alone.
BlockRef FindHistoryEnd(const Directory& directory, const Chain& chain, uint32_t limit, bool ssd);

// Fastest tier that holds the bytes of `block` now. REQUIRES: block.resident().
Tier ServingTier(const Block& block);

}  // namespace cachedattn
