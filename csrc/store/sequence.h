// SequenceImpl: a running turn over one chain (attention_store.h, "Sequence").
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "csrc/store/store_core.h"

namespace cachedattn {

class SequenceImpl final : public Sequence {
 public:
  // As AttentionStore::Begin.
  static Result<std::unique_ptr<Sequence>> Begin(std::shared_ptr<StoreCore> core,
                                                 std::shared_ptr<Chain> chain, uint32_t max_history,
                                                 const ComputeCost& cost);
  ~SequenceImpl() override;

  uint64_t id() const override { return id_; }
  Stalls stalls() const override { return *stalls_; }
  const CachedTokens& cached() const override { return cached_; }
  uint32_t num_computed_tokens() const override { return num_computed_; }
  uint32_t context_len() const override { return context_len_; }
  std::span<const int32_t> block_table() const override { return block_table_; }
  uint32_t room() const override;

  Status Reserve(uint32_t num_tokens) override;
  bool loading() const override;
  double load_left_s() const override;
  Status WaitLayer(uint32_t layer) override;
  void LayerDone(uint32_t layer, uint32_t num_tokens) override;
  void Append(std::span<const TokenId> tokens) override;
  void Truncate() override;
  void Commit(Finish finish) override;

  uint32_t tenant() const { return tenant_; }  // Directory::TenantIndex

  // For the invariants: the private slots.
  void AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  // A block of the context: shared with others (pin) or private (slot).
  struct Entry {
    uint32_t index = 0;  // in the chain
    BlockPin pin;
    Slot slot;
    FillRef fill;  // until every layer has landed
    SaveRef save;
  };

  SequenceImpl(std::shared_ptr<StoreCore> core, std::shared_ptr<Chain> chain);

  BlockRange Plan(const History& history, const ComputeCost& cost) const;
  Status TakeHistory(const History& history, BlockRange again);
  void Join(const History& history);
  Entry TakeShared(const BlockRef& block);
  Entry TakeTail(const BlockRef& block);
  void AddPrivate();
  void AddEntry(uint32_t index, Entry entry, SlotId slot);
  void Settle();
  Result<Fill*> FirstMissing(uint32_t layer) const;
  std::function<void(int64_t ns)> StallCounter(bool ssd);
  void PublishFull(uint32_t position);
  void PublishTail(uint32_t position, uint32_t num_tokens);
  BlockRef InsertBlock(const BlockKey& key, uint32_t position, uint32_t num_tokens);
  bool follows(uint32_t position) const;
  void Release(Entry entry);
  void End();

  const std::shared_ptr<StoreCore> core_;
  const std::shared_ptr<Chain> chain_;
  const uint64_t id_;
  const uint32_t block_size_;
  const uint32_t window_;                        // tokens, whole blocks; UINT32_MAX: none
  const uint32_t tenant_;                        // Directory::TenantIndex
  Conversation conversation_ = kNoConversation;  // held
  uint32_t prompt_tokens_ = 0;
  std::optional<TurnEnd> turn_;  // once it is committed
  CachedTokens cached_;
  const std::shared_ptr<Stalls> stalls_ = std::make_shared<Stalls>();  // a GPU tells of them late
  uint32_t num_computed_ = 0;
  uint32_t context_len_ = 0;
  // Until the context has so many tokens again, it is computed while what follows it is loaded; 0:
  // not, or no longer.
  uint32_t recompute_end_ = 0;
  uint32_t num_dropped_ = 0;  // blocks that cuts have taken
  std::vector<Entry> entries_;
  std::vector<int32_t> block_table_;  // slot of each entry
};

}  // namespace cachedattn
