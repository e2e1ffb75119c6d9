#include "csrc/store/write_behind.h"

#include <algorithm>

namespace cachedattn {

namespace {

// What the engine holds of writes, and as much again that is sealed and waits for it; a read waits
// behind the former alone.
constexpr uint64_t kMaxBytesInFlight = 32 << 20;
constexpr uint64_t kMaxWritesInFlight = 16;
// One DRAM slot in so many: a disk that hangs keeps them.
constexpr uint64_t kDramShare = 8;

constexpr int64_t kRestNs = 30'000'000'000;

}  // namespace

WriteBehind::WriteBehind(Tiers* tiers, Directory* directory, Policy* policy, Trace* trace,
                         const Clock* clock)
    : tiers_(tiers),
      directory_(directory),
      policy_(policy),
      trace_(trace),
      clock_(clock),
      max_in_flight_(static_cast<uint32_t>(std::max<uint64_t>(
          std::min({kMaxBytesInFlight / tiers->layout.payload_bytes(), kMaxWritesInFlight,
                    tiers->dram->slots().capacity() / kDramShare}),
          2))) {}

bool WriteBehind::NeverWritten(const Block& block) const {
  const KeyRing* keys = tiers_->keys();
  return block.write_failed || (keys && !keys->Has(directory_->tenant(block.tenant)));
}

void WriteBehind::Queue(Block* block) {
  directory_->SetLeaving(block, Tier::kDram, true);
  queue_.push_back(block->key);
}

bool WriteBehind::MustDemote(Block* block) {
  if (tiers_->ssd == nullptr || !tiers_->ssd_on) return false;
  if (NeverWritten(*block) || !block->absent(Tier::kSsd)) return false;
  if (policy_->over(block->owner)) return false;
  // A turn under way has it on the device, and will save it if it is the only one.
  if (block->copy(Tier::kDevice).pins > 0) return false;
  Block* victim = nullptr;
  const bool worth = HasSsdRoom(*block, &victim);
  if (worth) Queue(block);
  return worth;
}

void WriteBehind::DemoteAll() {
  if (tiers_->ssd == nullptr || !tiers_->ssd_on) return;
  std::vector<Block*> blocks;
  directory_->ForEach([&](Block& block) {
    if (block.ready(Tier::kDram) && !block.copy(Tier::kDram).leaving) blocks.push_back(&block);
  });
  // In the order of use, which is what the next process goes by; and a block is of no use without
  // those before it.
  std::ranges::sort(blocks, {}, [this](const Block* block) {
    return std::pair(policy_->last_use(block->owner), block->depth);
  });
  for (Block* block : blocks) (void)MustDemote(block);
}

// True when `incoming` finds a place, if need be that of `victim`: the SSD copy that goes next, of
// its own tenant where that holds its quota, if it goes before the incoming block would.
bool WriteBehind::HasSsdRoom(const Block& incoming, Block** victim) const {
  const SlotPool& slots = *tiers_->ssd_slots;
  *victim = nullptr;
  Conversation first = kNoConversation;
  if (!slots.WithinQuota(incoming.tenant, 1)) {
    first = policy_->Victim(Tier::kSsd, incoming.tenant);
  } else if (slots.num_free() > 0) {
    return true;
  } else {
    first = policy_->Victim(Tier::kSsd);
  }
  if (first == kNoConversation) return false;
  *victim = directory_->Last(first, Tier::kSsd);
  if (first == incoming.owner) return (*victim)->depth > incoming.depth;
  return policy_->GoesBefore(Tier::kSsd, first, incoming.owner);
}

Slot WriteBehind::TakeSsdSlot(const Block& incoming) {
  while (!resting_.empty() && resting_.front().until_ns <= clock_->NowNs()) resting_.pop_front();
  Block* victim = nullptr;
  if (!HasSsdRoom(incoming, &victim)) return Slot();
  if (victim != nullptr) {
    trace_->AddEvict(*victim, Tier::kSsd);
    directory_->Drop(victim, Tier::kSsd);
    ++num_evicted_;
  }
  return tiers_->ssd_slots->Take(incoming.tenant);
}

bool WriteBehind::Pump() {
  bool refused = false;
  while (!queue_.empty() && in_flight_.size() - num_late_ < max_in_flight_ &&
         tiers_->ssd->can_submit()) {
    const BlockRef block = directory_->Find(queue_.front());
    queue_.pop_front();
    num_looked_at_ -= num_looked_at_ > 0;
    if (block == nullptr || !block->copy(Tier::kDram).leaving) continue;
    Slot slot = block->absent(Tier::kSsd) ? TakeSsdSlot(*block) : Slot();
    if (slot) {
      Start(block, std::move(slot));
    } else {
      directory_->SetLeaving(block.get(), Tier::kDram, false);
      refused = true;
    }
  }
  SealAhead();
  return refused;
}

// Takes the sums of what is written next while the disk works, which would wait for them else: it
// may report all that it has as finished at once.
void WriteBehind::SealAhead() {
  for (; num_looked_at_ < std::min<size_t>(queue_.size(), max_in_flight_); ++num_looked_at_) {
    const BlockRef block = directory_->Find(queue_[num_looked_at_]);
    if (block == nullptr || !block->ready(Tier::kDram)) continue;
    Copy& copy = block->copy(Tier::kDram);
    if (copy.sealed) continue;
    copy.sealed = tiers_->ssd->Seal(block->key, tiers_->dram->slot(copy.slot.id()));
  }
}

void WriteBehind::Start(const BlockRef& block, Slot slot) {
  const SlotId ssd_slot = slot.id();
  Write write{directory_->BeginFill(block, Tier::kSsd, std::move(slot)),
              directory_->Pin(block, Tier::kDram)};
  block->generation = ++generation_;
  const BlockHeader header = directory_->HeaderOf(*block);
  const SlotId dram_slot = write.source.slot();
  trace_->Add(TraceKind::kWriteStart, 0, 0, tiers_->layout.num_layers, dram_slot, block.get());
  const uint64_t tag = next_tag_++;
  in_flight_.emplace(tag, std::move(write));
  tiers_->ssd->StartWrite(ssd_slot, header, block->copy(Tier::kDram).sealed,
                          tiers_->dram->slot(dram_slot), tag);
}

void WriteBehind::OnDone(const SsdCompletion& done) {
  const auto it = in_flight_.find(done.tag);
  CA_CHECK(it != in_flight_.end());
  if (done.late) {
    it->second.late = true;
    ++num_late_;  // it goes on leaving: those before it must not be held by a disk that hangs
    return;
  }
  Write write = std::move(it->second);
  in_flight_.erase(it);
  num_late_ -= write.late;
  const BlockRef block = write.source.block();
  trace_->Add(TraceKind::kWriteEnd, 0, 0, tiers_->layout.num_layers, write.source.slot(),
              block.get());
  write.source.Release();
  directory_->SetLeaving(block.get(), Tier::kDram, false);  // and now it goes first
  if (done.status.ok()) {
    directory_->FinishFill(std::move(write.transfer));
    directory_->DropReplaced(block.get(), /*on_ssd=*/true);
    return;
  }
  // The DRAM copy stays. The place rests, the block is not tried again while the tier is on.
  ++num_failed_;
  block->write_failed = true;
  resting_.push_back({clock_->NowNs() + kRestNs, directory_->AbortFill(std::move(write.transfer))});
}

void WriteBehind::SwitchOff() {
  for (const BlockKey& key : queue_) {
    const BlockRef block = directory_->Find(key);
    if (block != nullptr) directory_->SetLeaving(block.get(), Tier::kDram, false);
  }
  queue_.clear();
  num_looked_at_ = 0;
}

void WriteBehind::AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const {
  for (const Resting& resting : resting_) {
    (*places)[static_cast<int>(Tier::kSsd)].push_back(resting.slot.id());
  }
}

}  // namespace cachedattn
