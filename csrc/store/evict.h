// Evictor: makes room ahead of need, by demoting (DRAM -> SSD) and dropping (design D6).
#pragma once

#include <set>

#include "csrc/store/write_behind.h"

namespace cachedattn {

class Evictor {
 public:
  // `reserve` DRAM slots are kept free ahead of need.
  Evictor(Tiers* tiers, Directory* directory, WriteBehind* writes, Trace* trace, uint32_t reserve);

  // True when `n` slots of `tier` are free or can be freed now. A copy whose save or write to the
  // next tier is still to come may be lost only if `lose_unsaved`.
  bool CanMakeRoom(Tier tier, uint32_t n, bool lose_unsaved);
  // Frees slots until `n` are free, for a running sequence of `tenant`: its own copies go first as
  // far as that keeps its quota. REQUIRES: CanMakeRoom(tier, n, lose_unsaved).
  void MakeRoom(Tier tier, uint32_t n, bool lose_unsaved, uint32_t tenant);

  // Drops copies of `tenant`, the lowest first, until `more` slots are within its quota. False: of
  // those that may go now, none is left.
  bool KeepQuota(Tier tier, uint32_t tenant, uint32_t more);

  // Keeps the reserve of free DRAM slots: drops what SSD has, waits for the writes of the rest.
  // Brings tenants back to their quota that running sequences took above it.
  void KeepReserve();

  // Whether the tenant's quota has room in DRAM for `block`, or for it in place of a lower one.
  bool QuotaAdmits(const Block& block) const;
  // A free DRAM slot beyond the reserve, if need be from a copy that ranks below `incoming`.
  // REQUIRES: QuotaAdmits(incoming).
  bool MakeSpareRoom(const Block& incoming);

  // Drops every copy in `tier` that nothing uses.
  void DropAll(Tier tier);

  uint64_t num_evicted(Tier tier) const { return num_evicted_[static_cast<int>(tier)]; }

 private:
  bool MustSaveFirst(Tier tier, Block* block);
  void Evict(Tier tier, Block* block);

  Tiers* const tiers_;
  Directory* const directory_;
  WriteBehind* const writes_;
  Trace* const trace_;
  const uint32_t reserve_;
  uint64_t num_evicted_[kNumTiers] = {};
  std::set<uint32_t> over_quota_;  // tenants, in DRAM
};

}  // namespace cachedattn
