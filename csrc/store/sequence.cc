#include "csrc/store/sequence.h"

#include <algorithm>
#include <cstring>

namespace cachedattn {

namespace {

uint32_t WindowTokens(const Chain& chain) {
  const uint32_t window = chain.truncation().window;
  return window == 0 ? UINT32_MAX : window / chain.block_size() * chain.block_size();
}

}  // namespace

SequenceImpl::SequenceImpl(std::shared_ptr<StoreCore> core, std::shared_ptr<Chain> chain)
    : core_(std::move(core)),
      chain_(std::move(chain)),
      id_(core_->next_sequence_id++),
      block_size_(chain_->block_size()),
      window_(WindowTokens(*chain_)),
      tenant_(core_->directory.TenantIndex(chain_->tenant())) {
  core_->sequences.insert(this);
}

SequenceImpl::~SequenceImpl() {
  const MemoryReserve::Use use(&core_->memory);
  if (!core_->forked()) End();
}

Result<std::unique_ptr<Sequence>> SequenceImpl::Begin(std::shared_ptr<StoreCore> core,
                                                      std::shared_ptr<Chain> chain,
                                                      uint32_t max_history) {
  if (Status status = core->CheckUsable(); !status.ok()) return status;
  if (!core->memory.full()) return Status(Code::kExhausted, "out of memory");
  if (chain == nullptr || chain->num_tokens() == 0) {
    return Status(Code::kInvalidArgument, "chain: holds no tokens");
  }
  if (chain->block_size() != core->options.layout.block_size) {
    return Status(Code::kInvalidArgument, "chain: made for another block size");
  }
  const uint32_t limit = std::min(max_history, chain->num_tokens() - 1);
  const History history = FindHistory(core->directory, *chain, limit, core->tiers.ssd_on);
  std::unique_ptr<SequenceImpl> sequence(new SequenceImpl(core, chain));
  if (Status status = sequence->TakeHistory(history); !status.ok()) return status;
  sequence->Join(history);

  const CachedTokens& cached = sequence->cached_;
  ++core->counters.turns;
  core->counters.tokens_requested += chain->num_tokens();
  core->counters.tokens_from_device += cached.by_tier[static_cast<int>(Tier::kDevice)];
  core->counters.tokens_from_dram += cached.by_tier[static_cast<int>(Tier::kDram)];
  core->counters.tokens_from_ssd += cached.by_tier[static_cast<int>(Tier::kSsd)];
  core->preloader.Pump();
  return std::unique_ptr<Sequence>(std::move(sequence));
}

Status SequenceImpl::TakeHistory(const History& history) {
  Tiers& tiers = core_->tiers;
  const Tier pool = tiers.pool_tier();
  std::vector<BlockPin> held;  // what is there must not make room for what is not
  uint32_t pool_slots = 0, staging_slots = 0;
  for (const BlockRef& block : history.blocks) {
    for (Tier tier : {Tier::kDevice, Tier::kDram}) {
      if (!block->absent(tier)) held.push_back(core_->directory.Pin(block, tier));
    }
    const bool needs_slot = block->num_tokens < block_size_ || block->absent(pool);
    pool_slots += needs_slot;
    staging_slots += needs_slot && pool == Tier::kDevice && block->absent(Tier::kDram);
  }
  if (!core_->MakeRoom(pool, pool_slots, tenant_) ||
      !core_->MakeRoom(Tier::kDram, staging_slots, tenant_)) {
    return Status(Code::kExhausted, "no room for " + std::to_string(history.blocks.size()) +
                                        " blocks of history now");
  }

  cached_ = core_->Count(*chain_, history);
  for (size_t i = 0; i < history.blocks.size(); ++i) {
    const BlockRef& block = history.blocks[i];
    Entry entry = block->num_tokens < block_size_ ? TakeTail(block) : TakeShared(block);
    const SlotId slot = entry.pin               ? entry.pin.slot()
                        : entry.fill != nullptr ? entry.fill->private_slot.id()
                                                : entry.slot.id();
    AddEntry(history.indices[i], std::move(entry), slot);
    context_len_ += block->num_tokens;
  }
  num_computed_ = history.num_tokens;
  num_dropped_ = entries_.empty() ? 0 : entries_.back().index + 1 - entries_.size();
  return Status();
}

// The turn is one of the conversation whose end it goes on from, or of a new one.
void SequenceImpl::Join(const History& history) {
  Policy* policy = core_->policy.get();
  prompt_tokens_ = chain_->num_tokens();
  conversation_ = HoldConversation(policy, core_->directory, *chain_, tenant_, history);
  if (conversation_ == kNoConversation) conversation_ = policy->Hold(0, tenant_);
  policy->Begin(conversation_);
  for (uint32_t i = 0; i < history.blocks.size(); ++i) {
    core_->directory.SetOwner(history.blocks[i].get(), conversation_);
    if (!follows(i)) core_->directory.Detach(history.blocks[i].get());
  }
}

// The block before it in the context is the one before it in the chain, too.
bool SequenceImpl::follows(uint32_t position) const {
  return position > 0 && entries_[position - 1].index + 1 == entries_[position].index;
}

SequenceImpl::Entry SequenceImpl::TakeShared(const BlockRef& block) {
  Tiers& tiers = core_->tiers;
  const Tier pool = tiers.pool_tier();
  Entry entry;
  if (block->absent(pool)) {
    Slot slot = tiers.pool().slots().Take(tenant_);
    if (pool == Tier::kDram) {
      entry.fill = core_->preloader.StartRead(block, std::move(slot), false, id_);
    } else {
      if (block->absent(Tier::kDram)) {
        core_->preloader.StartRead(block, tiers.dram->slots().Take(tenant_), false, id_);
      }
      entry.fill = core_->preloader.StartLoad(block, std::move(slot), id_);
    }
  } else {
    entry.fill = core_->preloader.FillOf(*block, pool);  // of someone else, if it is not there yet
  }
  entry.pin = core_->directory.Pin(block, pool);
  return entry;
}

// A part-filled tail will be written to: its bytes go to a slot of our own.
SequenceImpl::Entry SequenceImpl::TakeTail(const BlockRef& block) {
  Tiers& tiers = core_->tiers;
  Entry entry;
  Slot slot = tiers.pool().slots().Take(tenant_);
  if (tiers.pool_tier() == Tier::kDevice) {
    if (block->absent(Tier::kDram)) {
      core_->preloader.StartRead(block, tiers.dram->slots().Take(tenant_), false, id_);
    }
    entry.fill = core_->preloader.StartPrivateLoad(block, std::move(slot), id_);
  } else if (block->ready(Tier::kDram)) {
    const SlotId source = block->copy(Tier::kDram).slot.id();
    std::memcpy(tiers.dram->payload(slot.id()), tiers.dram->payload(source),
                tiers.layout.payload_bytes());
    entry.slot = std::move(slot);
  } else {
    entry.fill = core_->preloader.StartPrivateRead(block, std::move(slot), id_);
  }
  return entry;
}

void SequenceImpl::AddEntry(uint32_t index, Entry entry, SlotId slot) {
  entry.index = index;
  entries_.push_back(std::move(entry));
  block_table_.push_back(static_cast<int32_t>(slot));
}

uint32_t SequenceImpl::room() const {
  return window_ == UINT32_MAX ? UINT32_MAX : window_ - context_len_;
}

Status SequenceImpl::Reserve(uint32_t num_tokens) {
  const MemoryReserve::Use use(&core_->memory);
  if (Status status = core_->CheckUsable(); !status.ok()) return status;
  CA_CHECK(num_tokens <= room());
  const uint32_t needed = core_->options.layout.num_blocks(uint64_t{context_len_} + num_tokens);
  if (needed <= entries_.size()) return Status();
  if (!core_->memory.full()) return Status(Code::kExhausted, "out of memory");
  const auto more = static_cast<uint32_t>(needed - entries_.size());
  const Tier pool = core_->tiers.pool_tier();
  core_->Drive(0);  // a save that has landed holds no slot any more
  if (!core_->MakeRoom(pool, more, tenant_)) {
    return Status(Code::kExhausted, "no room for " + std::to_string(more) + " more blocks now");
  }
  for (uint32_t i = 0; i < more; ++i) {
    Entry entry;
    entry.slot = core_->tiers.pool().slots().Take(tenant_);
    const SlotId slot = entry.slot.id();
    AddEntry(static_cast<uint32_t>(entries_.size()) + num_dropped_, std::move(entry), slot);
  }
  return Status();
}

bool SequenceImpl::loading() const {
  return std::ranges::any_of(entries_, [](const Entry& entry) {
    return entry.fill != nullptr && !(entry.fill->done && entry.fill->status.ok());
  });
}

// Lets go of the fills that are done; private slots become ours.
void SequenceImpl::Settle() {
  for (Entry& entry : entries_) {
    if (entry.fill == nullptr || !entry.fill->done || !entry.fill->status.ok()) continue;
    if (!entry.pin) entry.slot = std::move(entry.fill->private_slot);
    entry.fill.reset();
  }
}

Status SequenceImpl::WaitLayer(uint32_t layer) {
  const MemoryReserve::Use use(&core_->memory);
  if (Status status = core_->CheckUsable(); !status.ok()) return status;
  CA_CHECK(layer < core_->options.layout.num_layers);
  core_->trace.Add(TraceKind::kWaitStart, id_, layer, 1, kNoSlot);
  // Once without waiting: the next layers' reads start here, under this layer's compute.
  for (int64_t timeout_us = 0;; timeout_us = StoreCore::kWaitUs) {
    core_->Drive(timeout_us);
    bool landed = true;
    for (const Entry& entry : entries_) {
      if (entry.fill == nullptr) continue;
      if (!entry.fill->status.ok()) return entry.fill->status;
      landed = landed && entry.fill->landed[layer];
    }
    if (landed) break;
  }
  Settle();
  core_->trace.Add(TraceKind::kWaitEnd, id_, layer, 1, kNoSlot);
  return Status();
}

void SequenceImpl::LayerDone(uint32_t layer, uint32_t num_tokens) {
  const MemoryReserve::Use use(&core_->memory);
  if (!core_->usable()) return;
  core_->trace.Add(TraceKind::kComputeEnd, id_, layer, 1, kNoSlot);
  if (core_->tiers.pool_tier() == Tier::kDevice) {
    const uint32_t end = (context_len_ + num_tokens) / block_size_;
    for (uint32_t i = context_len_ / block_size_; i < end; ++i) {
      Entry& entry = entries_[i];
      const auto slot = static_cast<SlotId>(block_table_[i]);
      // A place that a fill still writes to is the fill's; it is saved when it is published.
      if (layer == 0 && !entry.fill) entry.save = core_->saver.Begin(slot, id_, tenant_);
      if (entry.save != nullptr) core_->saver.Layer(entry.save, layer);
    }
  }
  core_->Drive(0);  // reads and writes go on under the next layer's compute
}

void SequenceImpl::Append(std::span<const TokenId> tokens) {
  const MemoryReserve::Use use(&core_->memory);
  if (!core_->usable()) return;
  const auto known = chain_->tokens().subspan(num_computed_);
  const size_t common = std::min(known.size(), tokens.size());
  CA_CHECK(std::ranges::equal(tokens.first(common), known.first(common)));
  CA_CHECK(context_len_ + tokens.size() <= entries_.size() * block_size_);
  chain_->Append(tokens.subspan(common));
  Settle();
  const uint32_t first = context_len_ / block_size_;
  num_computed_ += static_cast<uint32_t>(tokens.size());
  context_len_ += static_cast<uint32_t>(tokens.size());
  for (uint32_t i = first; i < context_len_ / block_size_; ++i) PublishFull(i);
}

BlockRef SequenceImpl::InsertBlock(const BlockKey& key, uint32_t position, uint32_t num_tokens) {
  Directory& directory = core_->directory;
  const uint32_t index = entries_[position].index;
  const BlockKey& parent = chain_->parent_key(index);
  BlockRef block =
      directory.Insert(tenant_, key, parent, num_tokens, index, follows(position), conversation_);
  std::vector<BlockKey> replaced;
  for (const Block* partial : directory.partials(parent)) {
    const uint32_t shorter = partial->num_tokens;
    if (shorter < num_tokens && chain_->PartialKey(index, shorter) == partial->key) {
      replaced.push_back(partial->key);
    }
  }
  directory.SetReplaced(block.get(), std::move(replaced));
  return block;
}

// A block that someone else has published meanwhile stays ours alone.
void SequenceImpl::PublishFull(uint32_t position) {
  Entry& entry = entries_[position];
  const Tier pool = core_->tiers.pool_tier();
  const BlockKey& key = chain_->key(entry.index);
  BlockRef block = core_->directory.Find(key);
  if (block != nullptr && !block->absent(pool)) return;
  const bool known = block != nullptr;
  if (!known) block = InsertBlock(key, position, block_size_);
  core_->directory.SetOwner(block.get(), conversation_);
  core_->directory.FinishFill(core_->directory.BeginFill(block, pool, std::move(entry.slot)));
  entry.pin = core_->directory.Pin(block, pool);
  if (pool == Tier::kDram) {
    core_->directory.DropReplaced(block.get(), core_->tiers.ssd == nullptr);
    return;
  }
  if (known && !(block->absent(Tier::kDram) && !core_->tiers.ssd_on)) return;  // saved elsewhere
  if (entry.save == nullptr) entry.save = core_->saver.Begin(entry.pin.slot(), id_, tenant_);
  if (entry.save != nullptr) {
    core_->saver.Publish(entry.save, block);
  } else {
    core_->saver.Queue(block);
  }
}

void SequenceImpl::PublishTail(uint32_t position, uint32_t num_tokens) {
  Entry& entry = entries_[position];
  const BlockKey key = chain_->PartialKey(entry.index, num_tokens);
  Tiers& tiers = core_->tiers;
  const BlockRef known = core_->directory.Find(key);
  if (known != nullptr) core_->directory.SetOwner(known.get(), conversation_);
  if (!entry.slot || (known != nullptr && (tiers.ssd_on || !known->absent(Tier::kDram)))) return;
  const auto listed = [&] {
    return known != nullptr ? known : InsertBlock(key, position, num_tokens);
  };
  if (tiers.pool_tier() == Tier::kDram) {
    ZeroUnusedTokens(tiers.layout, num_tokens, tiers.dram->payload(entry.slot.id()));
    const BlockRef block = listed();
    core_->directory.FinishFill(
        core_->directory.BeginFill(block, Tier::kDram, std::move(entry.slot)));
    core_->directory.DropReplaced(block.get(), tiers.ssd == nullptr);
    return;
  }
  entry.save = core_->saver.Begin(entry.slot.id(), id_, tenant_);
  if (entry.save == nullptr) return;
  entry.save->source_slot = std::move(entry.slot);
  core_->saver.Publish(entry.save, listed());
}

void SequenceImpl::Truncate() {
  const MemoryReserve::Use use(&core_->memory);
  if (!core_->usable()) return;
  CA_CHECK(room() == 0);
  const Cut* cut = chain_->CutBefore(static_cast<uint32_t>(entries_.size()) + num_dropped_);
  CA_CHECK(cut != nullptr);
  const auto first = entries_.begin() + cut->first_block;
  // What is cut off is a conversation of its own, and over, unless somebody else uses it.
  const Conversation over = core_->policy->Hold(0, tenant_);
  core_->policy->SetOver(over);
  for (auto it = first; it != first + cut->num_blocks; ++it) {
    const BlockRef block = it->pin ? it->pin.block() : nullptr;
    if (block && block->owner == conversation_) core_->directory.SetOwner(block.get(), over);
    Release(std::move(*it));
    if (block) core_->saver.Leave(block);
  }
  core_->policy->Release(over);
  entries_.erase(first, first + cut->num_blocks);
  if (cut->first_block < entries_.size() && entries_[cut->first_block].pin) {
    core_->directory.Detach(entries_[cut->first_block].pin.block().get());
  }
  const auto slots = block_table_.begin() + cut->first_block;
  block_table_.erase(slots, slots + cut->num_blocks);
  num_dropped_ += cut->num_blocks;
  context_len_ -= cut->num_blocks * block_size_;
}

// A save keeps the place that it reads from until it is done, also one that was given up.
void SequenceImpl::Release(Entry entry) {
  if (entry.save == nullptr) return;
  if (entry.slot) entry.save->source_slot = std::move(entry.slot);
  if (entry.pin) entry.save->source = std::move(entry.pin);
}

void SequenceImpl::Commit(Finish finish) {
  const MemoryReserve::Use use(&core_->memory);
  if (!core_->usable()) return;
  if (!core_->sequences.contains(this)) return;
  Settle();
  const uint32_t tail = context_len_ % block_size_;
  if (tail != 0) PublishTail(context_len_ / block_size_, tail);
  turn_ = TurnEnd{.finish = finish,
                  .prompt_tokens = prompt_tokens_,
                  .answer_tokens = chain_->num_tokens() - prompt_tokens_};
  ++core_->conversations_ended;
  core_->conversation_bytes += context_len_ * core_->options.layout.bytes_per_token();
  End();
}

void SequenceImpl::End() {
  if (core_->sequences.erase(this) == 0) return;
  std::vector<BlockRef> used;
  for (const Entry& entry : entries_) {
    if (entry.pin) used.push_back(entry.pin.block());
  }
  for (Entry& entry : entries_) Release(std::move(entry));
  entries_.clear();
  block_table_.clear();
  if (conversation_ != kNoConversation) {
    core_->policy->End(conversation_, turn_ ? &*turn_ : nullptr);
    core_->policy->Release(conversation_);
  }
  for (const BlockRef& block : used) core_->saver.Leave(block);
  if (core_->abandoned && core_->sequences.empty()) (void)core_->Close();
}

void SequenceImpl::AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const {
  const auto pool = static_cast<int>(core_->tiers.pool_tier());
  for (const Entry& entry : entries_) {
    if (entry.slot) (*places)[pool].push_back(entry.slot.id());
  }
}

}  // namespace cachedattn
