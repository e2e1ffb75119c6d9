// Evictor: makes room ahead of need, by demoting (DRAM -> SSD) and dropping (design D6).
#pragma once

#include <set>
#include <unordered_set>

#include "csrc/store/write_behind.h"

namespace cachedattn {

class Evictor {
 public:
  // `reserve` DRAM slots are kept free ahead of need.
  Evictor(Tiers* tiers, Directory* directory, Policy* policy, WriteBehind* writes, Trace* trace,
          uint32_t reserve);

  // Frees slots until `n` are free, for a running sequence of `tenant`: its own copies go first as
  // far as that keeps its quota. False: not so many can be had now. A copy that is worth a write is
  // lost only with `lose_unsaved`, else its write is queued.
  bool MakeRoom(Tier tier, uint32_t n, bool lose_unsaved, uint32_t tenant);

  // Drops copies of `tenant`, the first to go first, until `more` slots are within its quota.
  // False: none may go now, or those that do are written first.
  bool KeepQuota(Tier tier, uint32_t tenant, uint32_t more);

  // Keeps the reserve of free DRAM slots: drops what SSD has or does not want, queues writes of the
  // rest. Brings tenants back to their quota that running sequences took above it.
  void KeepReserve();

  // Whether the tenant's quota has room in DRAM for a block of `incoming`, or for it in place of
  // one of a conversation that goes before.
  bool QuotaAdmits(uint32_t tenant, Conversation incoming) const;
  // A free DRAM slot beyond the reserve, if need be from a conversation that goes before
  // `incoming`. REQUIRES: QuotaAdmits(tenant, incoming).
  bool MakeSpareRoom(uint32_t tenant, Conversation incoming);

  // Drops every copy in `tier` that nothing uses.
  void DropAll(Tier tier);

  // Copies of waiting conversations, of all in num_evicted.
  // Conversations that wait, or waited then, and have lost a copy since the last call.
  std::unordered_set<Conversation> TakeWaitingEvicted() {
    return std::exchange(waiting_evicted_, {});
  }
  uint64_t num_evicted(Tier tier) const { return num_evicted_[static_cast<int>(tier)]; }

 private:
  // The copy that goes next, of all or of one tenant's; nullptr: none may go now.
  Block* Next(Tier tier) const;
  Block* Next(Tier tier, uint32_t tenant) const;
  // Drops the copy. False: it is to be written first, and is on the way out now.
  bool TryEvict(Tier tier, Block* block);
  void Evict(Tier tier, Block* block);

  Tiers* const tiers_;
  Directory* const directory_;
  Policy* const policy_;
  WriteBehind* const writes_;
  Trace* const trace_;
  const uint32_t reserve_;
  uint64_t num_evicted_[kNumTiers] = {};
  std::unordered_set<Conversation> waiting_evicted_;
  std::set<uint32_t> over_quota_;  // tenants, in DRAM
};

}  // namespace cachedattn
