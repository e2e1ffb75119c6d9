// Tiers: the places, the disk and the copy engine of one store, and which of them exist.
#pragma once

#include <memory>
#include <vector>

#include "csrc/copy/copy_engine.h"
#include "csrc/copy/gpu.h"
#include "csrc/copy/pinner.h"
#include "csrc/store/attention_store.h"
#include "csrc/tier/memory_tier.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

// Tags of SSD operations and of copies carry the mover that started them in the top bit.
constexpr uint64_t kSaveTag = uint64_t{1} << 63;

struct Tiers {
  KvLayout layout;
  // Memory first: it is given back last, after the engines have let go of it.
  std::unique_ptr<Gpu> gpu;  // nullptr: the device tier, if any, is memory of this process
  std::unique_ptr<MemoryTier> dram;
  std::unique_ptr<Pinner> pinner;       // of the DRAM slab; nullptr without a GPU
  std::unique_ptr<MemoryTier> device;   // nullptr: block tables index DRAM slots (design D9)
  std::unique_ptr<SlotPool> ssd_slots;  // nullptr: no SSD tier
  std::unique_ptr<SsdTier> ssd;
  bool ssd_on = true;                // SsdHealth's verdict: false, and nothing is started on it
  std::unique_ptr<CopyEngine> copy;  // nullptr without a device tier

  // The tier that block tables index.
  Tier pool_tier() const { return device ? Tier::kDevice : Tier::kDram; }
  MemoryTier& pool() const { return device ? *device : *dram; }

  KeyRing* keys() const { return ssd ? ssd->keys() : nullptr; }  // nullptr: not encrypted
  TenantId IdOf(std::string_view tenant) const {
    return keys() ? keys()->IdOf(tenant) : TenantIdOf(tenant);
  }

  // nullptr: the tier does not exist.
  SlotPool* slots(Tier tier) const {
    if (tier == Tier::kSsd) return ssd_slots.get();
    if (tier == Tier::kDram) return &dram->slots();
    return device ? &device->slots() : nullptr;
  }
};

}  // namespace cachedattn
