#include "csrc/store/store_core.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <optional>

#include "csrc/store/sequence.h"

namespace cachedattn {

namespace {

uint32_t ReserveSlots(const StoreOptions& options, const Tiers& tiers) {
  return static_cast<uint32_t>(options.dram_reserve * tiers.dram->slots().capacity());
}

// What the largest call needs: about half of this for each block that a sequence can hold.
size_t ReserveBytes(const Tiers& tiers) {
  size_t num_slots = tiers.dram->slots().capacity();
  if (tiers.device != nullptr) num_slots += tiers.device->slots().capacity();
  return (size_t{1} << 20) + (size_t{1} << 10) * num_slots;
}

PolicyOptions PolicyOf(const StoreOptions& options) {
  PolicyOptions policy = options.policy;
  policy.by_tenant = options.tenant_quota_bytes != 0;
  return policy;
}

struct Parked {
  std::mutex mutex;
  std::vector<std::shared_ptr<StoreCore>> cores;
};
// Never destroyed: at exit a disk may still write to the memory in it.
Parked& TheParked() {
  static auto* parked = new Parked;
  return *parked;
}

}  // namespace

StoreCore::StoreCore(const StoreOptions& store_options, Tiers&& opened)
    : options(store_options),
      tiers(std::move(opened)),
      memory(ReserveBytes(tiers)),
      trace(options.clock),
      policy(Policy::Make(PolicyOf(options), options.clock)),
      directory(options.layout.block_size, policy.get()),
      writes(&tiers, &directory, policy.get(), &trace, options.clock),
      evictor(&tiers, &directory, policy.get(), &writes, &trace, ReserveSlots(options, tiers)),
      preloader(&tiers, &directory, &trace, options.clock),
      saver(&tiers, &directory, &evictor, &trace, options.keep_on_device),
      prefetcher(&tiers, &directory, policy.get(), &evictor, &preloader),
      health(options.clock) {
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
    SlotPool* slots = tiers.slots(tier);
    if (slots == nullptr) continue;
    directory.Reserve(slots->capacity());
    if (options.tenant_quota_bytes == 0 || tier == Tier::kDevice) continue;
    slots->SetQuota(static_cast<uint32_t>(std::min<uint64_t>(
        options.tenant_quota_bytes / options.layout.host_slot_bytes(), UINT32_MAX)));
  }
}

Status StoreCore::Restore(const std::function<void(uint64_t, uint64_t)>& progress) {
  closed = true;  // until it is whole there is nothing to record
  Result<std::vector<ScannedBlock>> scanned = tiers.ssd->Scan(progress);
  if (!scanned.ok()) return scanned.status();
  std::vector<BlockRef> blocks;
  blocks.reserve(scanned.value().size());
  uint64_t newest = 0;
  const KeyRing* keys = tiers.keys();
  std::erase_if(scanned.value(), [&](const ScannedBlock& block) {
    newest = std::max(newest, block.header.generation);
    return keys != nullptr && !keys->Has(block.header.tenant);  // erased: nobody can read it
  });
  for (const auto& [slot, header] : scanned.value()) {
    blocks.push_back(directory.Insert(directory.TenantIndex(header.tenant), header.key,
                                      header.parent, header.num_tokens, header.depth,
                                      header.depth > 0, kNoConversation));
    blocks.back()->generation = header.generation;
  }
  RestoreConversations(policy.get(), &directory, blocks);
  for (size_t i = 0; i < blocks.size(); ++i) {
    Slot slot = tiers.ssd_slots->TakeAt(scanned.value()[i].slot, blocks[i]->tenant);
    directory.FinishFill(directory.BeginFill(blocks[i], Tier::kSsd, std::move(slot)));
  }
  for (uint32_t i = 0; i < directory.num_tenants(); ++i) {
    evictor.KeepQuota(Tier::kSsd, i, 0);  // it may be smaller than it was
  }
  writes.StartAfter(newest);
  closed = false;
  return Status();
}

Status StoreCore::CheckUsable() const {
  if (forked()) {
    return Status(Code::kClosed,
                  "the store belongs to a parent of this process: open a store after the fork");
  }
  return closed ? Status(Code::kClosed, "the store is closed") : Status();
}

Status StoreCore::Close() {
  if (forked()) return CheckUsable();
  if (closed) return Status();
  std::optional<MemoryReserve::Use> use(&memory);
  if (!sequences.empty()) {
    return Status(Code::kBusy, std::to_string(sequences.size()) +
                                   " sequences are running: end them before the store");
  }
  SetQueue({});
  FinishLoads();
  Flush();
  while (health.probing()) {
    Drive(kWaitUs);
    Flush();  // the disk may be back
  }
  closed = true;
  use.reset();  // how much the index takes depends on the SSD: that may be refused
  Status status;
  try {
    if (tiers.ssd != nullptr) status = Record();
  } catch (const std::bad_alloc&) {
    status = Status(Code::kExhausted, "out of memory");  // the next open reads every header
  }
  if (tiers.ssd != nullptr && tiers.ssd->in_flight() > 0) {
    const std::lock_guard lock(TheParked().mutex);
    TheParked().cores.push_back(shared_from_this());
  }
  return status;
}

Status StoreCore::Record() {
  if (tiers.ssd->num_late() > 0) {
    return Status(Code::kIo, std::to_string(tiers.ssd->num_late()) +
                                 " operations have not come back from the disk: until they have, "
                                 "nobody can open this store");
  }
  std::vector<ScannedBlock> blocks;
  directory.ForEach([&](const Block& block) {
    if (!block.ready(Tier::kSsd)) return;
    blocks.push_back({block.copy(Tier::kSsd).slot.id(), directory.HeaderOf(block)});
  });
  return tiers.ssd->Sync(TotalCounters(), blocks);
}

size_t StoreCore::FreeParked() {
  std::vector<std::shared_ptr<StoreCore>> free;
  const std::lock_guard lock(TheParked().mutex);
  std::erase_if(TheParked().cores, [&](const std::shared_ptr<StoreCore>& core) {
    if (core->forked()) return false;  // of the parent
    core->TakeCompletions(0);
    if (core->tiers.ssd->in_flight() > 0) return false;
    free.push_back(core);
    return true;
  });
  return TheParked().cores.size() + SsdTier::FreeAbandoned();
}

Result<bool> StoreCore::EraseTenant(std::string_view tenant) {
  KeyRing* keys = tiers.keys();
  if (keys == nullptr) {
    return Status(Code::kInvalidArgument, "only an encrypted store can erase a tenant");
  }
  const TenantId id = keys->IdOf(tenant);
  const auto index = directory.FindTenant(id);
  for (const SequenceImpl* sequence : sequences) {
    if (sequence->tenant() != index) continue;
    return Status(Code::kBusy, "the tenant's sequences are running: end them first");
  }
  Flush();
  FinishLoads();
  Result<bool> erased = keys->Erase(id);
  if (!erased.ok() || !index) return erased;
  std::vector<BlockKey> blocks;
  directory.ForEach([&](const Block& block) {
    if (block.tenant == *index) blocks.push_back(block.key);
  });
  for (const BlockKey& key : blocks) {
    const BlockRef block = directory.Find(key);
    for (Tier tier : {Tier::kDevice, Tier::kDram}) {
      const Copy& copy = block->copy(tier);
      if (!block->ready(tier) || copy.pins > 0) continue;
      MemoryTier& memory = tier == Tier::kDevice ? *tiers.device : *tiers.dram;
      memory.Wipe(copy.slot.id());
    }
    directory.Forget(block.get());
  }
  return erased;
}

void StoreCore::Drive(int64_t timeout_us) {
  if (tiers.copy != nullptr) {
    copied_.clear();
    // With copies under way the wait is for them, and the disk is looked at after it; but a GPU
    // waits for them by itself.
    const bool copying = tiers.copy->in_flight() > 0 &&
                         !(tiers.copy->computes_alone() && preloader.num_reads_in_flight() > 0);
    if (tiers.copy->in_flight() > 0 || tiers.copy->computes_alone()) {
      tiers.copy->Poll(&copied_, copying ? timeout_us : 0);
    }
    if (copying) timeout_us = 0;
    for (uint64_t tag : copied_) {
      (tag & kSaveTag) ? saver.OnCopy(tag) : preloader.OnLoad(tag);
    }
  }
  if (tiers.ssd != nullptr) {
    TakeCompletions(timeout_us);
    JudgeSsd();
  }
  preloader.Pump();
  // Saves take from the reserve, prefetches what lies above it, and writes that both have asked for
  // start at once; until no one has changed what another has looked at.
  for (bool again = true; again;) {
    evictor.KeepReserve();
    again = saver.Pump();
    if (tiers.ssd == nullptr || !tiers.ssd_on) continue;
    if (memory.full()) prefetcher.Pump();
    if (!preloader.reads_waiting()) again |= writes.Pump();
  }
  if (tiers.copy != nullptr) tiers.copy->Submit();
}

void StoreCore::TakeCompletions(int64_t timeout_us) {
  completions_.clear();
  tiers.ssd->Poll(&completions_, tiers.ssd->in_flight() > 0 ? timeout_us : 0);
  for (const SsdCompletion& done : completions_) {
    if (health.OnCompletion(done)) continue;
    (done.tag & kSaveTag) ? writes.OnDone(done) : preloader.OnRead(done);
  }
}

void StoreCore::JudgeSsd() {
  const bool stuck = !tiers.ssd->can_submit() && health.late_now() >= tiers.ssd->in_flight();
  health.Judge(preloader.num_quarantined() + writes.num_quarantined(),
               tiers.dram->slots().capacity(), stuck);
  if (health.on() != tiers.ssd_on) SwitchSsd(health.on());
  if (tiers.ssd->can_submit() && health.TakeProbe()) tiers.ssd->StartProbe(SsdHealth::kProbeTag);
}

void StoreCore::SwitchSsd(bool on) {
  tiers.ssd_on = on;
  if (!on) {
    writes.SwitchOff();
    prefetcher.SetQueue({});
    return;
  }
  directory.ForEach([](Block& block) { block.write_failed = false; });
}

bool StoreCore::Drain() {
  const auto busy = [this] { return !writes.idle() || saver.num_in_flight() > 0; };
  if (!busy()) return false;
  while (busy()) Drive(kWaitUs);
  return true;
}

void StoreCore::Flush() {
  Drain();
  writes.DemoteAll();
  Drain();
}

void StoreCore::FinishLoads() {
  while (!preloader.idle()) Drive(kWaitUs);
}

bool StoreCore::MakeRoom(Tier tier, uint32_t n, uint32_t tenant) {
  if (evictor.MakeRoom(tier, n, false, tenant)) return true;
  if (!writes.idle() || saver.num_in_flight() > 0) return false;
  return evictor.MakeRoom(tier, n, true, tenant);
}

void StoreCore::SetQueue(std::span<const std::shared_ptr<Chain>> waiting) {
  const PolicyKind kind = policy->options().kind;
  const bool looks_ahead = kind == PolicyKind::kLookahead || kind == PolicyKind::kHazard;
  if (!looks_ahead || !memory.full()) waiting = {};

  uint64_t mean = conversations_ended ? conversation_bytes / conversations_ended : 0;
  if (mean == 0) {
    for (const auto& chain : waiting) {
      mean += chain->num_tokens() * options.layout.bytes_per_token() / waiting.size();
    }
  }
  std::vector<Conversation> conversations;
  for (const auto& chain : waiting) {
    const Conversation conversation = HoldWaiting(policy.get(), &directory, *chain, tiers.ssd_on);
    if (conversation != kNoConversation) conversations.push_back(conversation);
  }
  policy->SetQueue(conversations);
  for (const Conversation conversation : conversations) policy->Release(conversation);
  if (tiers.ssd == nullptr) return;
  const uint64_t dram_bytes = tiers.dram->slots().capacity() * options.layout.payload_bytes();
  prefetcher.SetQueue(
      waiting.first(std::min<size_t>(waiting.size(), PrefetchWindow(dram_bytes, mean))));
}

void StoreCore::CheckInvariants() const {
  std::vector<SlotId> places[kNumTiers];
  policy->CheckInvariants();
  directory.CheckInvariants(&places);
  preloader.AddPlaces(&places);
  saver.AddPlaces(&places);
  writes.AddPlaces(&places);
  for (const SequenceImpl* sequence : sequences) sequence->AddPlaces(&places);
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
    const SlotPool* slots = tiers.slots(tier);
    auto& held = places[static_cast<int>(tier)];
    if (slots == nullptr) {
      CA_CHECK(held.empty());
      continue;
    }
    std::ranges::sort(held);
    CA_CHECK(std::ranges::adjacent_find(held) == held.end());  // one owner each
    for (SlotId slot : held) CA_CHECK(!slots->is_free(slot));
    CA_CHECK(held.size() + slots->num_free() == slots->capacity());
    size_t counted = 0;
    for (uint32_t i = 0; i < directory.num_tenants(); ++i) {
      counted += slots->num_used(i);
      CA_CHECK(tier != Tier::kSsd || slots->WithinQuota(i, 0));
    }
    CA_CHECK(counted == held.size());
  }
}

}  // namespace cachedattn
