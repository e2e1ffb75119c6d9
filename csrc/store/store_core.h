// StoreCore: the parts of one store, and what keeps them moving. Shared by the store and its
// sequences, so that it is there until the last of them is gone.
#pragma once

#include <memory>
#include <set>

#include "csrc/base/fork.h"
#include "csrc/base/memory_reserve.h"
#include "csrc/store/conversations.h"
#include "csrc/store/prefetch.h"
#include "csrc/store/save.h"
#include "csrc/store/ssd_health.h"

namespace cachedattn {

class SequenceImpl;

struct StoreCore : std::enable_shared_from_this<StoreCore> {
  StoreCore(const StoreOptions& options, Tiers&& opened);

  // Lists the blocks that the SSD tier holds.
  Status Restore(const std::function<void(uint64_t, uint64_t)>& progress);

  // As AttentionStore::CheckUsable.
  Status CheckUsable() const;
  bool usable() const { return !closed && !forked(); }
  bool forked() const { return ForkDepth() != opener; }

  // As AttentionStore::Close. A disk that has not let go of everything keeps what it holds: the
  // parts of the store are parked until it has.
  Status Close();
  static size_t FreeParked();  // as FreeParkedStores

  // Lets finished moves take effect and starts what is due. Waits up to `timeout_us` for the
  // first of them.
  void Drive(int64_t timeout_us);
  static constexpr int64_t kWaitUs = 10'000;  // of one wait; who waits looks again after it

  // Until no save and no write is left. False: there was none.
  bool Drain();
  void Flush();  // as AttentionStore::Flush
  // Until no load is left.
  void FinishLoads();

  // As Evictor::MakeRoom. Copies that are worth a write are lost only when no save is under way
  // that would make room by itself.
  bool MakeRoom(Tier tier, uint32_t n, uint32_t tenant);

  Result<bool> EraseTenant(std::string_view tenant);

  void SetQueue(std::span<const std::shared_ptr<Chain>> waiting);

  CachedTokens Count(const Chain& chain, const History& history) const;
  StoreStats Stats() const;
  std::array<uint32_t, kNumTiers> TenantUsage(const TenantId& tenant) const;
  StoreCounters TotalCounters() const;  // of the file's whole life
  void CheckInvariants() const;

  const StoreOptions options;
  Stalls stalls;
  Tiers tiers;
  MemoryReserve memory;  // of every call that moves blocks
  Trace trace;
  const std::unique_ptr<Policy> policy;
  Directory directory;
  WriteBehind writes;
  Evictor evictor;
  Preloader preloader;
  Saver saver;
  Prefetcher prefetcher;

  SsdHealth health;

  bool closed = false;
  const uint32_t opener = ForkDepth();  // the process whose engines, threads and file these are
  bool abandoned = false;  // the store is gone, and the last sequence closes what is left
  std::set<SequenceImpl*> sequences;  // alive
  uint64_t next_sequence_id = 1;
  StoreCounters counters;            // since open
  uint64_t tokens_recomputed = 0;    // by choice
  uint64_t conversations_ended = 0;  // for the mean size of one
  uint64_t conversation_bytes = 0;

 private:
  Status Record();
  void TakeCompletions(int64_t timeout_us);
  void JudgeSsd();
  void SwitchSsd(bool on);

  std::vector<SsdCompletion> completions_;
  std::vector<uint64_t> copied_;
};

}  // namespace cachedattn
