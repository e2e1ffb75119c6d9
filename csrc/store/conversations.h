// Which conversation a turn and a block belong to, and how far into the queue the store plans.
#pragma once

#include <span>

#include "csrc/store/directory.h"
#include "csrc/store/lookup.h"

namespace cachedattn {

// The conversation of a turn over `chain` after `history_end` (nullptr: there is no history), held:
// by its name, else the one whose end the turn goes on from. kNoConversation when there is neither.
Conversation HoldConversation(Policy* policy, const Directory& directory, const Chain& chain,
                              uint32_t tenant, const Block* history_end);

// The same of a chain that waits.
Conversation HoldWaiting(Policy* policy, Directory* directory, const Chain& chain, bool ssd);

// Gives blocks that were found on disk at open to conversations, one for each end of a chain, in
// the order in which these were written. A block that several share belongs to the latest.
void RestoreConversations(Policy* policy, Directory* directory, std::span<const BlockRef> blocks);

// How far into the waiting queue it is worth prefetching, in requests: as many as DRAM holds
// conversations of the mean size (CachedAttention, section 3.3).
uint32_t PrefetchWindow(uint64_t dram_bytes, uint64_t conversation_bytes);

}  // namespace cachedattn
