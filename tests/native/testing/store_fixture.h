// A small store and a "model" whose K and V are a function of everything they may depend on, so
// that a test can tell for every byte of the context whether it is the right one.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "csrc/store/attention_store.h"
#include "csrc/store/open_store.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {

using Tokens = std::vector<TokenId>;

constexpr uint32_t kBlock = 16;

// Four layers of 2048 bytes in slices of 4096, so that there is padding.
inline KvLayout TinyLayout() { return {4, 2, 16, kBlock, DType::kBFloat16}; }

// Slots per tier; 0: no such tier.
struct Sizes {
  uint32_t dram = 16;
  uint32_t ssd = 0;
  uint32_t device = 0;
};

inline StoreOptions TinyOptions(const Sizes& sizes, const std::string& path = "") {
  StoreOptions options;
  options.layout = TinyLayout();
  options.identity.bytes[3] = 9;
  options.model_name = "tiny";
  options.dram_bytes = sizes.dram * options.layout.host_slot_bytes();
  options.device_bytes = sizes.device * options.layout.payload_bytes();
  if (sizes.ssd != 0) {
    options.ssd_bytes = SsdFileBytes(options.layout, sizes.ssd);
    options.path = path;
  }
  options.dram_reserve = 0;
  options.io_depth = 16;
  options.poison = true;
  return options;
}

// What AttentionStore::Open passes on, for tests that change it.
inline SsdOptions SsdOptionsOf(const StoreOptions& options) {
  SsdOptions ssd;
  ssd.directory = options.path;
  ssd.layout = options.layout;
  ssd.identity = options.identity;
  ssd.model_name = options.model_name;
  ssd.max_bytes = options.ssd_bytes;
  ssd.io.depth = options.io_depth;
  return ssd;
}

inline std::unique_ptr<AttentionStore> MustOpenStore(const StoreOptions& options) {
  auto store = AttentionStore::Open(options);
  if (!store.ok()) {
    ADD_FAILURE() << store.status().message();
    std::abort();
  }
  return std::move(store.value());
}

// `count` tokens that differ by seed from the first on.
inline Tokens MakeTokens(uint32_t count, uint32_t seed) {
  Tokens tokens(count);
  for (uint32_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<TokenId>((seed * 7919u + i * 104729u) % 32000);
  }
  return tokens;
}

inline Tokens operator+(Tokens left, const Tokens& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

// The context after each token, by the rule of design D4 played one token at a time.
class ReferenceContext {
 public:
  explicit ReferenceContext(const Truncation& truncation) : truncation_(truncation) {}

  // One more token. Returns the hash that its K and V are made of: all tokens and cuts so far.
  void Push(TokenId token) {
    const uint32_t blocks = truncation_.window / kBlock;
    if (blocks != 0 && positions_.size() == blocks * kBlock) {
      const uint32_t keep = (truncation_.keep_first + kBlock - 1) / kBlock;
      const auto leave = static_cast<uint32_t>((blocks - keep) * truncation_.ratio);
      const auto first = positions_.begin() + keep * kBlock;
      positions_.erase(first, first + std::max(leave, 1u) * kBlock);
      hash_ = Mix(hash_, 0xC07 + leave);
    }
    hash_ = Mix(hash_, static_cast<uint64_t>(token) + 1);
    positions_.push_back(static_cast<uint32_t>(hashes_.size()));
    hashes_.push_back(hash_);
  }

  // Absolute positions of the context's tokens.
  const std::vector<uint32_t>& positions() const { return positions_; }
  uint64_t hash(uint32_t position) const { return hashes_[position]; }

  static uint64_t Mix(uint64_t a, uint64_t b) {
    a = (a ^ b) * 0x9E3779B97F4A7C15ull;
    return a ^ (a >> 29);
  }

 private:
  const Truncation truncation_;
  uint64_t hash_ = 1;
  std::vector<uint64_t> hashes_;
  std::vector<uint32_t> positions_;
};

// Where the K (kv 0) or V (kv 1) of one token and head lies.
inline uint16_t* At(AttentionStore* store, std::span<const int32_t> table, uint32_t place,
                    uint32_t layer, uint32_t kv, uint32_t head) {
  const KvLayout& layout = store->layout();
  const AttentionStore::PoolView pool = store->pool();
  const auto slot = static_cast<uint64_t>(table[place / layout.block_size]);
  std::byte* slice = pool.base + slot * pool.slot_stride + layer * pool.layer_stride;
  const uint64_t row =
      (kv * layout.num_kv_heads + head) * layout.block_size + place % layout.block_size;
  return reinterpret_cast<uint16_t*>(slice) + row * layout.head_dim;
}

// Calls `visit(element, value)` for every element of token `token` of a block in one layer, whose
// bytes begin at `slice`.
template <typename Visit>
void ForTokenIn(const KvLayout& layout, std::byte* slice, uint32_t token, uint32_t layer,
                uint64_t hash, const Visit& visit) {
  for (uint32_t row = 0; row < 2 * layout.num_kv_heads; ++row) {
    const uint64_t first = (uint64_t{row} * layout.block_size + token) * layout.head_dim;
    uint16_t* data = reinterpret_cast<uint16_t*>(slice) + first;
    uint64_t value = ReferenceContext::Mix(hash, layer * 64 + row + 1);
    for (uint32_t d = 0; d < layout.head_dim; ++d, value = value * 5 + 1) {
      visit(data + d, static_cast<uint16_t>(value >> 20));
    }
  }
}

// The same for the token at place `place` of a context.
template <typename Visit>
void ForToken(AttentionStore* store, std::span<const int32_t> table, uint32_t place, uint32_t layer,
              uint64_t hash, const Visit& visit) {
  const KvLayout& layout = store->layout();
  const AttentionStore::PoolView pool = store->pool();
  const auto slot = static_cast<uint64_t>(table[place / layout.block_size]);
  std::byte* slice = pool.base + slot * pool.slot_stride + layer * pool.layer_stride;
  ForTokenIn(layout, slice, place % layout.block_size, layer, hash, visit);
}

// Plays one turn over `tokens` as an engine would, and checks every byte of the context in every
// layer of every step.
class Turn {
 public:
  Turn(AttentionStore* store, Tokens tokens, const Truncation& truncation = {},
       const std::string& tenant = "t")
      : store_(store), tokens_(std::move(tokens)), reference_(truncation) {
    chain_ = store->NewChain(tenant, truncation);
    chain_->Append(tokens_);
  }

  // False: no room.
  bool Begin(uint32_t max_history = UINT32_MAX) {
    auto begun = store_->Begin(chain_, max_history);
    if (!begun.ok()) {
      EXPECT_EQ(begun.status().code(), Code::kExhausted) << begun.status().message();
      return false;
    }
    sequence_ = std::move(begun.value());
    // Tokens of the history; the cut that is due before the next one is still to come.
    for (uint32_t i = 0; i < sequence_->num_computed_tokens(); ++i) reference_.Push(tokens_[i]);
    EXPECT_EQ(sequence_->context_len(), reference_.positions().size());
    return true;
  }

  // One step of at most `most` tokens. The status of a failed wait; kExhausted: no slots.
  Status Step(uint32_t most) {
    if (sequence_->room() == 0) sequence_->Truncate();
    const uint32_t done = sequence_->num_computed_tokens();
    const uint32_t count =
        std::min({most, static_cast<uint32_t>(tokens_.size()) - done, sequence_->room()});
    if (Status status = sequence_->Reserve(count); !status.ok()) return status;
    const uint32_t context = sequence_->context_len();
    for (uint32_t i = 0; i < count; ++i) reference_.Push(tokens_[done + i]);
    EXPECT_EQ(context + count, reference_.positions().size());
    for (uint32_t layer = 0; layer < store_->layout().num_layers; ++layer) {
      if (sequence_->loading()) {
        if (Status status = sequence_->WaitLayer(layer); !status.ok()) return status;
      }
      CheckLayer(layer, context);
      WriteLayer(layer, context, count);
      sequence_->LayerDone(layer, count);
    }
    sequence_->Append(std::span(tokens_).subspan(done, count));
    EXPECT_EQ(sequence_->num_computed_tokens(), done + count);
    return Status();
  }

  // All steps, then Commit.
  void Finish(uint32_t chunk = 24) {
    while (sequence_->num_computed_tokens() < tokens_.size()) {
      Status status = Step(chunk);
      if (status.code() == Code::kExhausted) {  // slots may be held by saves under way
        store_->Flush();
        status = Step(chunk);
      }
      ASSERT_TRUE(status.ok()) << status.message();
      store_->Poll();
    }
    Commit();
  }
  void Commit() {
    sequence_->Commit();
    sequence_.reset();
  }
  void Drop() { sequence_.reset(); }

  void CheckLayer(uint32_t layer, uint32_t context) {
    const auto table = sequence_->block_table();
    uint32_t wrong = 0;
    for (uint32_t place = 0; place < context; ++place) {
      const uint64_t hash = reference_.hash(reference_.positions()[place]);
      ForToken(store_, table, place, layer, hash,
               [&](const uint16_t* element, uint16_t value) { wrong += *element != value; });
    }
    EXPECT_EQ(wrong, 0u) << "layer " << layer << " of a context of " << context;
  }

  Sequence* sequence() { return sequence_.get(); }
  const CachedTokens& cached() const { return sequence_->cached(); }
  uint32_t cached_from(Tier tier) const { return cached().by_tier[static_cast<int>(tier)]; }
  const std::shared_ptr<Chain>& chain() const { return chain_; }
  const Tokens& tokens() const { return tokens_; }

 private:
  void WriteLayer(uint32_t layer, uint32_t context, uint32_t count) {
    const auto table = sequence_->block_table();
    for (uint32_t place = context; place < context + count; ++place) {
      const uint64_t hash = reference_.hash(reference_.positions()[place]);
      ForToken(store_, table, place, layer, hash,
               [](uint16_t* element, uint16_t value) { *element = value; });
    }
  }

  AttentionStore* const store_;
  const Tokens tokens_;
  ReferenceContext reference_;
  std::shared_ptr<Chain> chain_;
  std::unique_ptr<Sequence> sequence_;
};

// A whole turn; returns what was cached at its beginning.
inline CachedTokens PlayTurn(AttentionStore* store, const Tokens& tokens,
                             const Truncation& truncation = {}) {
  Turn turn(store, tokens, truncation);
  for (int tries = 0; !turn.Begin(); ++tries) {
    if (tries == 10000) {
      ADD_FAILURE() << "no room";
      return {};
    }
    store->Flush();
    store->Poll();
  }
  const CachedTokens cached = turn.cached();
  turn.Finish();
  store->CheckInvariants();
  return cached;
}

inline uint32_t From(const CachedTokens& cached, Tier tier) {
  return cached.by_tier[static_cast<int>(tier)];
}

}  // namespace cachedattn
