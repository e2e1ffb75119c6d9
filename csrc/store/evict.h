// Evictor: makes room ahead of need, by demoting (DRAM -> SSD) and dropping (design D6).
#pragma once

#include "csrc/store/write_behind.h"

namespace cachedattn {

class Evictor {
 public:
  // `reserve` DRAM slots are kept free ahead of need.
  Evictor(Tiers* tiers, Directory* directory, WriteBehind* writes, Trace* trace, uint32_t reserve);

  // True when `n` slots of `tier` are free or can be freed now. A copy whose save or write to the
  // next tier is still to come may be lost only if `lose_unsaved`.
  bool CanMakeRoom(Tier tier, uint32_t n, bool lose_unsaved);
  // Frees slots until `n` are free. REQUIRES: CanMakeRoom(tier, n, lose_unsaved).
  void MakeRoom(Tier tier, uint32_t n, bool lose_unsaved);

  // Keeps the reserve of free DRAM slots: drops what SSD has, waits for the writes of the rest.
  void KeepReserve();

  // A free DRAM slot beyond the reserve, if need be from a block that ranks below `rank`.
  bool MakeSpareRoom(const Rank& rank);

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
};

}  // namespace cachedattn
