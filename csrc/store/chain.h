// Chain: a request's tokens as block keys, and the context they leave after overflow cuts.
//
// A Chain is append-only. Block i covers tokens [i * block_size, (i + 1) * block_size) of the full
// history, dropped tokens included; its key chains to the key of block i - 1 and to the cuts made
// in between (design D3, D4). The cuts follow from the length alone: whenever the context holds
// `window` tokens (rounded down to whole blocks) and one more is to come, the oldest `ratio` of
// the blocks after the first `keep_first` tokens (rounded up to whole blocks) leaves. So a client
// that resends its whole history finds the same blocks.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/base/block_key.h"
#include "csrc/base/kv_layout.h"

namespace cachedattn {

struct Truncation {
  uint32_t window = 0;      // tokens; 0: the context never overflows
  double ratio = 0.5;       // share of the droppable blocks that leaves, at least one block
  uint32_t keep_first = 4;  // tokens, rounded up to whole blocks; 0: the paper's mode

  // kInvalidArgument when ratio is not in (0, 1] or the window holds no block to drop.
  CA_API Status Validate(uint32_t block_size) const;
};

// The number that stands for a conversation's name; 0 for ''.
CA_API uint64_t ConversationName(std::string_view name);

class CA_API Chain {
 public:
  // `root` is the root key of `tenant`; `conversation` as in AttentionStore::NewChain.
  Chain(const TenantId& tenant, const BlockKey& root, uint32_t block_size,
        const Truncation& truncation, uint64_t conversation = 0);

  void Append(std::span<const TokenId> tokens);

  uint32_t num_tokens() const { return static_cast<uint32_t>(tokens_.size()); }
  std::span<const TokenId> tokens() const { return tokens_; }
  uint32_t num_full_blocks() const { return static_cast<uint32_t>(keys_.size()); }
  const TenantId& tenant() const { return tenant_; }
  uint64_t conversation() const { return conversation_; }
  uint32_t block_size() const { return block_size_; }
  const Truncation& truncation() const { return truncation_; }

  std::span<const BlockKey> keys() const { return keys_; }  // of full blocks
  const BlockKey& key(uint32_t block) const { return keys_[block]; }
  // The key before `block`: the root for block 0.
  const BlockKey& parent_key(uint32_t block) const { return block ? keys_[block - 1] : root_; }
  // Key of the first `num_tokens` tokens of `block` (a part-filled tail).
  BlockKey PartialKey(uint32_t block, uint32_t num_tokens) const;

  // The cut that is made just before `block` joins the context. nullptr: none there.
  const Cut* CutBefore(uint32_t block) const;

  // Indices of the blocks that make up the context once `num_tokens` tokens are in it and no
  // further one is to come (a cut due at exactly this length has not been made yet).
  std::vector<uint32_t> ContextBlocks(uint32_t num_tokens) const;

 private:
  void ExtendKeys();

  TenantId tenant_;
  BlockKey root_;
  uint32_t block_size_;
  Truncation truncation_;
  uint64_t conversation_;
  uint32_t window_blocks_ = 0;  // blocks that the context holds before a cut; 0: no window
  Cut cut_;                     // every cut takes the same places of the block list
  std::vector<TokenId> tokens_;
  std::vector<BlockKey> keys_;  // of full blocks
};

}  // namespace cachedattn
