// WriteBehind: DRAM -> SSD, the demote mover. A block is written when it is about to leave DRAM, or
// at a Flush, straight from its DRAM slot; reads go first.
#pragma once

#include <deque>
#include <unordered_map>

#include "csrc/store/directory.h"
#include "csrc/store/tiers.h"
#include "csrc/store/trace.h"

namespace cachedattn {

class WriteBehind {
 public:
  WriteBehind(Tiers* tiers, Directory* directory, Policy* policy, Trace* trace, const Clock* clock);

  // True when the DRAM copy is the only one and worth a place on SSD: queues the write.
  bool MustDemote(Block* block);
  // Queues the writes of all that DRAM alone has and is worth a place.
  void DemoteAll();

  // Starts queued writes, few at a time so that a read never waits long behind them. True: the SSD
  // has no place for some, so they make no room.
  bool Pump();
  // A late write keeps its places until the disk has let go of them, and may still succeed.
  void OnDone(const SsdCompletion& done);

  // The SSD tier was switched off: what waits is forgotten, so that a long outage costs no memory.
  // Whoever switches it on queues the blocks that it lacks.
  void SwitchOff();

  // Nothing is to come but late writes.
  bool idle() const { return queue_.empty() && in_flight_.size() == num_late_; }
  uint32_t num_waiting() const { return static_cast<uint32_t>(queue_.size()); }
  uint32_t num_in_flight() const { return static_cast<uint32_t>(in_flight_.size()); }
  // DRAM copies that may go when their writes have ended.
  uint32_t num_on_the_way() const { return num_waiting() + num_in_flight() - num_late_; }
  uint32_t num_quarantined() const { return num_late_; }  // DRAM slots held by late writes
  uint32_t num_resting() const { return static_cast<uint32_t>(resting_.size()); }
  uint64_t num_failed() const { return num_failed_; }
  uint64_t num_evicted() const { return num_evicted_; }  // SSD copies that made room

  // Blocks written from now on are newer than `generation`.
  void StartAfter(uint64_t generation) { generation_ = generation; }

  // For the invariants: the resting places.
  void AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  struct Write {
    Transfer transfer;
    BlockPin source;
    bool late = false;
  };
  // A place that a write has failed on; it may be good again later, as after a full disk.
  struct Resting {
    int64_t until_ns = 0;
    Slot slot;
  };

  void Queue(Block* block);
  bool HasSsdRoom(const Block& incoming, Block** victim) const;
  // The disk refused it, or its tenant has no key (any more) to write under.
  bool NeverWritten(const Block& block) const;
  Slot TakeSsdSlot(const Block& incoming);
  void SealAhead();
  void Start(const BlockRef& block, Slot slot);

  Tiers* const tiers_;
  Directory* const directory_;
  Policy* const policy_;
  Trace* const trace_;
  const Clock* const clock_;
  const uint32_t max_in_flight_;
  std::deque<BlockKey> queue_;  // a block is in it at most once (Copy::leaving)
  uint32_t num_looked_at_ = 0;  // of queue_: its first ones, by SealAhead
  std::unordered_map<uint64_t, Write> in_flight_;
  uint32_t num_late_ = 0;        // of in_flight_
  std::deque<Resting> resting_;  // in the order of their ends
  uint64_t next_tag_ = kSaveTag;
  uint64_t generation_ = 0;
  uint64_t num_failed_ = 0;
  uint64_t num_evicted_ = 0;
};

}  // namespace cachedattn
