// Saver: device -> DRAM, one layer slice at a time, while later layers compute.
#pragma once

#include <bitset>
#include <deque>
#include <memory>
#include <unordered_map>

#include "csrc/store/evict.h"

namespace cachedattn {

// One block on its way from a device slot to a DRAM slot. It starts before the block has a key:
// the tokens are known only when the step is done.
struct Save {
  SlotId device_slot = kNoSlot;
  // Of a sequence that has ended, or of a listed block: what it reads from stays until it is done,
  // also when it is given up.
  Slot source_slot;
  BlockPin source;
  Slot target;  // until the block is published
  SlotId target_id = kNoSlot;
  BlockRef block;  // nullptr: not published
  Transfer transfer;
  uint32_t num_tokens = 0;  // in the block: all that fit, until it is published
  uint64_t sequence = 0;
  std::bitset<KvLayout::kMaxLayers> started;
  uint32_t num_landed = 0;
};
using SaveRef = std::shared_ptr<Save>;

class Saver {
 public:
  Saver(Tiers* tiers, Directory* directory, Evictor* evictor, Trace* trace, bool keep_on_device);

  // nullptr when DRAM, or the tenant's quota of it, has no slot for it now.
  SaveRef Begin(SlotId device_slot, uint64_t sequence, uint32_t tenant);
  // Layer `layer` of the device slot is final.
  void Layer(const SaveRef& save, uint32_t layer);
  // Every layer is final and the block has a key: its DRAM copy becomes kReady when all of them
  // have landed. Without a place for it in the directory the save is given up.
  void Publish(const SaveRef& save, const BlockRef& block);

  // The turn that used the device copy has ended: it is saved if it is the only one, and without
  // keep_on_device it goes.
  void Leave(const BlockRef& block);

  // A listed block whose save found no DRAM slot: it is tried again when there is one.
  void Queue(const BlockRef& block);
  bool Pump();  // true: some have begun
  void OnCopy(uint64_t tag);

  uint64_t bytes_saved() const { return bytes_saved_; }
  uint32_t num_in_flight() const { return static_cast<uint32_t>(in_flight_.size()); }
  uint32_t num_waiting() const { return static_cast<uint32_t>(queue_.size()); }

  // For the invariants: slots that saves hold outside of the directory.
  void AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  struct Slice {
    SaveRef save;
    uint32_t layer = 0;
  };

  void FinishIfLanded(Save* save);

  Tiers* const tiers_;
  Directory* const directory_;
  Evictor* const evictor_;
  Trace* const trace_;
  const bool keep_on_device_;
  const bool sums_;  // are taken where the slices are computed
  std::unordered_map<uint64_t, Slice> in_flight_;
  std::deque<BlockKey> queue_;              // a block is in it at most once (Copy::leaving)
  std::vector<std::weak_ptr<Save>> saves_;  // for the invariants alone
  uint64_t next_tag_ = kSaveTag;
  uint64_t bytes_saved_ = 0;
};

// Zeroes the places after `num_tokens` in every layer slice, so that no bytes of a slot's earlier
// life reach the disk. `payload` is where the first slice begins.
void ZeroUnusedTokens(const KvLayout& layout, uint32_t num_tokens, std::byte* payload);

}  // namespace cachedattn
