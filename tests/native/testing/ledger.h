// Ledger: conversations that go on over many runs of a store, and what every block that was ever
// played must hold; so that what is found after a crash can be told right from wrong.
#pragma once

#include <chrono>
#include <random>
#include <thread>
#include <unordered_map>
#include <vector>

#include "tests/native/testing/store_fixture.h"

namespace cachedattn {

// One turn: all that is needed to play it again.
struct Play {
  uint32_t conversation = 0;
  uint32_t restart = 0;  // 1: the conversation begins anew
  uint32_t count = 0;    // tokens added
  uint32_t seed = 0;     // of these tokens
};

class Ledger {
 public:
  static constexpr uint32_t kConversations = 8;
  static constexpr const char* kTenant = "t";

  struct Block {
    BlockKey parent;
    uint32_t depth = 0;
    std::vector<uint64_t> hashes;  // of its tokens
  };

  explicit Ledger(const Digest& identity) : identity_(identity) {}

  // Every second conversation overflows.
  static Truncation TruncationOf(uint32_t conversation) {
    return conversation % 2 ? Truncation{6 * kBlock, 0.5, 4} : Truncation{};
  }

  Play Next(std::mt19937* random) const {
    const uint32_t conversation = (*random)() % kConversations;
    const bool restart =
        histories_[conversation].empty() || histories_[conversation].size() > 12 * kBlock;
    return {conversation, restart, 1 + static_cast<uint32_t>((*random)() % 40),
            1000 + static_cast<uint32_t>((*random)() % 1000000)};
  }

  // Notes every block that playing `play` may write. Returns the conversation's tokens.
  const Tokens& Apply(const Play& play) {
    Tokens& history = histories_[play.conversation];
    if (play.restart != 0) history = MakeTokens(2 * kBlock, 1);  // a shared beginning
    history = history + MakeTokens(play.count, play.seed);
    const Truncation truncation = TruncationOf(play.conversation);
    Chain chain(TenantIdOf(kTenant), RootKey(identity_, kTenant), kBlock, truncation);
    chain.Append(history);
    ReferenceContext reference(truncation, kBlock);
    for (TokenId token : history) reference.Push(token);
    const auto note = [&](const BlockKey& key, uint32_t block, uint32_t num_tokens) {
      Block& out = blocks_[key];
      out = {chain.parent_key(block), block, {}};
      for (uint32_t i = 0; i < num_tokens; ++i) {
        out.hashes.push_back(reference.hash(block * kBlock + i));
      }
    };
    const uint32_t full = chain.num_full_blocks();
    for (uint32_t block = 0; block < full; ++block) note(chain.key(block), block, kBlock);
    const uint32_t tail = chain.num_tokens() % kBlock;
    if (tail != 0) note(chain.PartialKey(full, tail), full, tail);
    return history;
  }

  const Tokens& history(uint32_t conversation) const { return histories_[conversation]; }

  // nullptr: no turn that was ever played has this block.
  const Block* Find(const BlockKey& key) const {
    const auto it = blocks_.find(key);
    return it == blocks_.end() ? nullptr : &it->second;
  }

  // Elements of a block, with its header page at `host_slot`, that are not what they must be.
  static uint32_t CountWrong(const Block& block, std::byte* host_slot) {
    const KvLayout layout = TinyLayout();
    uint32_t wrong = 0;
    for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
      std::byte* slice = host_slot + layout.host_slice_offset(layer);
      for (uint32_t token = 0; token < block.hashes.size(); ++token) {
        ForTokenIn(layout, slice, token, layer, block.hashes[token],
                   [&](const uint16_t* element, uint16_t value) { wrong += *element != value; });
      }
    }
    return wrong;
  }

 private:
  Digest identity_;
  Tokens histories_[kConversations];
  std::unordered_map<BlockKey, Block, DigestHash> blocks_;
};

// Plays one turn to its end, whatever the disk does: a history that fails to load is computed
// again. Returns the tokens that were reused; a failed expectation is a wrong byte.
inline uint32_t PlayThrough(AttentionStore* store, const Tokens& tokens,
                            const Truncation& truncation) {
  Status status;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (int tries = 0; tries < 200 || std::chrono::steady_clock::now() < end; ++tries) {
    Turn turn(store, tokens, truncation, Ledger::kTenant);
    if (!turn.Begin()) {
      status = Status(Code::kExhausted, "no room to begin");
      store->Flush();  // and reads of turns that were given up may be slow
      store->Poll();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      continue;
    }
    const uint32_t found = turn.cached().total;
    status = Status();
    while (status.ok() && turn.sequence()->num_computed_tokens() < tokens.size()) {
      status = turn.Step(24);
      if (status.code() == Code::kExhausted) {  // slots may be held by saves under way
        store->Flush();
        status = turn.Step(24);
      }
      store->Poll();
    }
    if (!status.ok()) continue;
    turn.Commit();
    return found;
  }
  const StoreStats stats = store->stats();
  ADD_FAILURE() << "a turn of " << tokens.size()
                << " tokens does not come to its end: " << status.message() << "; SSD tier "
                << stats.ssd_report << ", " << stats.quarantined_slots << " slots in quarantine";
  return 0;
}

}  // namespace cachedattn
