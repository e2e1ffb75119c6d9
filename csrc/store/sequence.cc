#include "csrc/store/sequence.h"

#include <algorithm>

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

// The block before it in the context is the one before it in the chain, too.
bool SequenceImpl::follows(uint32_t position) const {
  return position > 0 && entries_[position - 1].index + 1 == entries_[position].index;
}

void SequenceImpl::AddEntry(uint32_t index, Entry entry, SlotId slot) {
  entry.index = index;
  entries_.push_back(std::move(entry));
  block_table_.push_back(static_cast<int32_t>(slot));
}

// The next block of the context, to be computed.
void SequenceImpl::AddPrivate() {
  Entry entry;
  entry.slot = core_->tiers.pool().slots().Take(tenant_);
  const SlotId slot = entry.slot.id();
  AddEntry(static_cast<uint32_t>(entries_.size()) + num_dropped_, std::move(entry), slot);
}

uint32_t SequenceImpl::room() const {
  if (recompute_end_ != 0) return recompute_end_ - context_len_;
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
  while (entries_.size() < needed) AddPrivate();
  return Status();
}

bool SequenceImpl::loading() const {
  return std::ranges::any_of(entries_, [](const Entry& entry) {
    return entry.fill != nullptr && !(entry.fill->done && entry.fill->status.ok());
  });
}

double SequenceImpl::load_left_s() const {
  std::vector<const Fill*> fills;
  for (const Entry& entry : entries_) {
    if (entry.fill == nullptr || (entry.fill->done && entry.fill->status.ok())) continue;
    if (!entry.fill->status.ok()) return 0;
    fills.push_back(entry.fill.get());
  }
  return core_->preloader.SecondsLeft(fills);
}

// Lets go of the fills that are done, or will be before any computing; private slots become ours.
void SequenceImpl::Settle() {
  for (Entry& entry : entries_) {
    if (entry.fill == nullptr || !entry.fill->status.ok()) continue;
    if (!entry.fill->done && entry.fill->visible.count() < core_->options.layout.num_layers) {
      continue;
    }
    if (!entry.pin) entry.slot = std::move(entry.fill->private_slot);
    entry.fill.reset();
  }
}

// The first fill whose `layer` is not there; nullptr: all are. An error: one has failed.
Result<Fill*> SequenceImpl::FirstMissing(uint32_t layer) const {
  Fill* missing = nullptr;
  for (const Entry& entry : entries_) {
    if (entry.fill == nullptr) continue;
    if (!entry.fill->status.ok()) return entry.fill->status;
    if (recompute_end_ != 0) continue;  // what is computed now needs nothing that is loaded
    if (!core_->preloader.Visible(entry.fill.get(), layer) && !missing) missing = entry.fill.get();
  }
  return missing;
}

// What that gets is the time that computing has only waited, once it is known.
std::function<void(int64_t)> SequenceImpl::StallCounter(bool ssd) {
  return [ssd, mine = stalls_, all = &core_->stalls](int64_t ns) {
    for (Stalls* stalls : {mine.get(), all}) (ssd ? stalls->ssd_ns : stalls->copy_ns) += ns;
  };
}

Status SequenceImpl::WaitLayer(uint32_t layer) {
  const MemoryReserve::Use use(&core_->memory);
  if (Status status = core_->CheckUsable(); !status.ok()) return status;
  CA_CHECK(layer < core_->options.layout.num_layers);
  core_->trace.Add(TraceKind::kWaitStart, id_, layer, 1, kNoSlot, nullptr);
  CopyEngine* gpu = core_->tiers.copy.get();
  if (gpu != nullptr && !(gpu->computes_alone() && loading())) gpu = nullptr;
  if (gpu != nullptr) gpu->BeginStall();
  int64_t since_ns = core_->options.clock->NowNs();
  bool ssd = false;
  Result<Fill*> missing = nullptr;
  // Once without waiting: the next layers' reads start here, under this layer's compute.
  for (int64_t timeout_us = 0;; timeout_us = StoreCore::kWaitUs) {
    core_->Drive(timeout_us);
    missing = FirstMissing(layer);
    const int64_t now_ns = core_->options.clock->NowNs();
    if (gpu == nullptr && timeout_us > 0) StallCounter(ssd)(now_ns - since_ns);
    if (!missing.ok() || missing.value() == nullptr) break;
    ssd = core_->preloader.WaitsForSsd(*missing.value(), layer) || (gpu != nullptr && ssd);
    since_ns = now_ns;
  }
  if (gpu != nullptr) gpu->EndStall(StallCounter(ssd));
  if (!missing.ok()) return missing.status();
  Settle();
  core_->trace.Add(TraceKind::kWaitEnd, id_, layer, 1, kNoSlot, nullptr);
  return Status();
}

void SequenceImpl::LayerDone(uint32_t layer, uint32_t num_tokens) {
  const MemoryReserve::Use use(&core_->memory);
  if (!core_->usable()) return;
  core_->trace.Add(TraceKind::kComputeEnd, id_, layer, 1, kNoSlot, nullptr);
  if (core_->tiers.pool_tier() == Tier::kDevice) {
    if (layer == 0) Settle();  // who did not wait may have places of fills that are done
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
  CA_CHECK(tokens.size() <= room());
  CA_CHECK(context_len_ + tokens.size() <= entries_.size() * block_size_);
  chain_->Append(tokens.subspan(common));
  Settle();
  const uint32_t first = context_len_ / block_size_;
  num_computed_ += static_cast<uint32_t>(tokens.size());
  context_len_ += static_cast<uint32_t>(tokens.size());
  for (uint32_t i = first; i < context_len_ / block_size_; ++i) PublishFull(i);
  if (recompute_end_ == 0 || context_len_ < recompute_end_) return;
  recompute_end_ = 0;
  context_len_ = num_computed_ = cached_.total + cached_.recomputed;
}

BlockRef SequenceImpl::InsertBlock(const BlockKey& key, uint32_t position, uint32_t num_tokens) {
  Directory& directory = core_->directory;
  const uint32_t index = entries_[position].index;
  const BlockKey& parent = chain_->parent_key(index);
  BlockRef block =
      directory.Insert(tenant_, key, parent, num_tokens, index, follows(position), conversation_);
  core_->trace.Add(TraceKind::kPublish, id_, 0, 0, kNoSlot, block.get());
  std::vector<BlockKey> replaced;
  for (const uint32_t shorter : directory.PartialLengths(parent)) {
    if (shorter >= num_tokens) continue;
    const BlockKey tail = chain_->PartialKey(index, shorter);
    if (directory.Find(tail) != nullptr) replaced.push_back(tail);
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
  if (core_->tiers.copy != nullptr) core_->tiers.copy->OrderLoadsAfterCompute();
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
  if (core_->tiers.copy != nullptr) core_->tiers.copy->OrderLoadsAfterCompute();
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
