#include "csrc/store/conversations.h"

#include <algorithm>
#include <ranges>
#include <unordered_set>

namespace cachedattn {

Conversation HoldConversation(Policy* policy, const Directory& directory, const Chain& chain,
                              uint32_t tenant, const Block* history_end) {
  if (chain.conversation() != 0) return policy->Hold(chain.conversation(), tenant);
  if (history_end == nullptr || !directory.ends_chain(*history_end)) return kNoConversation;
  policy->Hold(history_end->owner);
  return history_end->owner;
}

Conversation HoldWaiting(Policy* policy, Directory* directory, const Chain& chain, bool ssd) {
  BlockRef end;
  if (chain.conversation() == 0) {
    end = FindHistoryEnd(*directory, chain, chain.num_tokens() - 1, ssd);
  }
  return HoldConversation(policy, *directory, chain, directory->TenantIndex(chain.tenant()),
                          end.get());
}

void RestoreConversations(Policy* policy, Directory* directory, std::span<const BlockRef> blocks) {
  std::unordered_set<BlockKey, DigestHash> parents;
  parents.reserve(blocks.size());
  for (const BlockRef& block : blocks) parents.insert(block->parent);
  std::vector<Block*> ends;
  for (const BlockRef& block : blocks) {
    if (!parents.contains(block->key)) ends.push_back(block.get());
  }
  std::ranges::sort(ends, std::ranges::greater(), &Block::generation);
  std::vector<Conversation> conversations;
  for (Block* end : ends) {
    const Conversation conversation = policy->Hold(0, end->tenant);
    conversations.push_back(conversation);
    for (BlockRef block = directory->Find(end->key); block && block->owner == kNoConversation;) {
      directory->SetOwner(block.get(), conversation);
      block = block->depth > 0 ? directory->Find(block->parent) : nullptr;
    }
  }
  for (const Conversation conversation : std::views::reverse(conversations)) {
    policy->Restored(conversation);
    policy->Release(conversation);
  }
}

uint32_t PrefetchWindow(uint64_t dram_bytes, uint64_t conversation_bytes) {
  const uint64_t window = dram_bytes / std::max<uint64_t>(conversation_bytes, 1);
  return static_cast<uint32_t>(std::clamp<uint64_t>(window, 1, UINT32_MAX));
}

}  // namespace cachedattn
