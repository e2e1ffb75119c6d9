// Plays turns on a store as an engine would, with a "model" whose K and V are a function of
// everything they may depend on, so that it can tell for every byte of the context whether it is
// the right one.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/store/attention_store.h"

namespace cachedattn {

using Tokens = std::vector<TokenId>;

// The context after each token, by the rule of design D4 played one token at a time.
class ReferenceContext {
 public:
  ReferenceContext(const Truncation& truncation, uint32_t block_size, std::string_view tenant = "t")
      : truncation_(truncation), block_size_(block_size) {
    for (char c : tenant) hash_ = Mix(hash_, static_cast<uint8_t>(c));
  }

  // One more token. Its K and V are made of all tokens and cuts so far.
  void Push(TokenId token) {
    const uint32_t blocks = truncation_.window / block_size_;
    if (blocks != 0 && positions_.size() == blocks * block_size_) {
      const uint32_t keep = (truncation_.keep_first + block_size_ - 1) / block_size_;
      const auto leave = static_cast<uint32_t>((blocks - keep) * truncation_.ratio);
      const auto first = positions_.begin() + keep * block_size_;
      positions_.erase(first, first + std::max(leave, 1u) * block_size_);
      hash_ = Mix(hash_, 0xC07 + leave);
    }
    hash_ = Mix(hash_, static_cast<uint64_t>(token) + 1);
    positions_.push_back(static_cast<uint32_t>(hashes_.size()));
    hashes_.push_back(hash_);
  }

  // Absolute positions of the context's tokens.
  const std::vector<uint32_t>& positions() const { return positions_; }
  uint32_t num_tokens() const { return static_cast<uint32_t>(hashes_.size()); }
  uint64_t hash(uint32_t position) const { return hashes_[position]; }

  static uint64_t Mix(uint64_t a, uint64_t b) {
    a = (a ^ b) * 0x9E3779B97F4A7C15ull;
    return a ^ (a >> 29);
  }

 private:
  const Truncation truncation_;
  const uint32_t block_size_;
  uint64_t hash_ = 1;
  std::vector<uint64_t> hashes_;
  std::vector<uint32_t> positions_;
};

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

// One turn over `tokens`. What is found to be wrong is kept as a text.
class Player {
 public:
  Player(AttentionStore* store, Tokens tokens, const Truncation& truncation,
         const std::string& tenant, uint64_t conversation = 0)
      : store_(store),
        tokens_(std::move(tokens)),
        reference_(truncation, store->layout().block_size, tenant) {
    chain_ = store->NewChain(tenant, truncation, conversation);
    chain_->Append(tokens_);
  }

  Status Begin(uint32_t max_history, const ComputeCost& cost = {}) {
    auto begun = store_->Begin(chain_, max_history, cost);
    if (!begun.ok()) return begun.status();
    sequence_ = std::move(begun.value());
    // Tokens of the history; the cut that is due before the next one is still to come.
    for (uint32_t i = 0; i < sequence_->num_computed_tokens(); ++i) reference_.Push(tokens_[i]);
    Expect(sequence_->context_len() == reference_.positions().size(), "length of the history");
    return Status();
  }

  // One step of at most `most` tokens, checked in every layer. The status of a failed wait;
  // kExhausted: no slots. Ends before layer `end_layer`, which leaves a step that must be dropped.
  Status Step(uint32_t most, uint32_t end_layer = UINT32_MAX) {
    if (sequence_->room() == 0) sequence_->Truncate();
    const uint32_t done = sequence_->num_computed_tokens();
    const uint32_t count =
        std::min({most, static_cast<uint32_t>(tokens_.size()) - done, sequence_->room()});
    if (Status status = sequence_->Reserve(count); !status.ok()) return status;
    const uint32_t context = sequence_->context_len();
    while (reference_.num_tokens() < done + count) {
      reference_.Push(tokens_[reference_.num_tokens()]);
    }
    Expect(context + count == reference_.positions().size(), "length of the context");
    for (uint32_t layer = 0; layer < store_->layout().num_layers; ++layer) {
      if (layer == end_layer) return Status();
      if (sequence_->loading()) {
        if (Status status = sequence_->WaitLayer(layer); !status.ok()) return status;
      }
      CheckLayer(layer, context);
      WriteLayer(layer, context, count);
      sequence_->LayerDone(layer, count);
    }
    sequence_->Append(std::span(tokens_).subspan(done, count));
    const uint32_t history = cached().total + cached().recomputed;
    const bool again = done < history;  // what was left to compute again ends in all of the history
    const uint32_t computed = sequence_->num_computed_tokens();
    Expect(computed == done + count || (again && computed == history), "number of computed tokens");
    return Status();
  }

  bool finished() const { return sequence_->num_computed_tokens() >= tokens_.size(); }
  void Commit(Finish finish = Finish::kOther) {
    sequence_->Commit(finish);
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
    if (wrong == 0) return;
    wrong_ += std::to_string(wrong) + " elements of layer " + std::to_string(layer) +
              " of a context of " + std::to_string(context) + "; ";
  }

  // The K and V of the next `count` tokens in one layer, for steps that a test plays by hand.
  void WriteLayer(uint32_t layer, uint32_t count) {
    const uint32_t context = sequence_->context_len();
    while (reference_.positions().size() < context + count) {
      reference_.Push(tokens_[reference_.num_tokens()]);
    }
    WriteLayer(layer, context, count);
  }

  AttentionStore* store() const { return store_; }
  Sequence* sequence() { return sequence_.get(); }
  const CachedTokens& cached() const { return sequence_->cached(); }
  uint32_t cached_from(Tier tier) const { return cached().by_tier[static_cast<int>(tier)]; }
  const std::shared_ptr<Chain>& chain() const { return chain_; }
  const Tokens& tokens() const { return tokens_; }
  const std::string& wrong() const { return wrong_; }  // empty: all was right

 private:
  void Expect(bool right, const char* what) {
    if (!right) wrong_ += std::string(what) + "; ";
  }

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
  std::string wrong_;
};

}  // namespace cachedattn
