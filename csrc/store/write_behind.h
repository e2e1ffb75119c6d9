// WriteBehind: DRAM -> SSD, the demote mover. Each block is written once, straight from its DRAM
// slot, some time after it became kReady there; reads go first.
#pragma once

#include <deque>
#include <unordered_map>

#include "csrc/store/directory.h"
#include "csrc/store/tiers.h"
#include "csrc/store/trace.h"

namespace cachedattn {

class WriteBehind {
 public:
  WriteBehind(Tiers* tiers, Directory* directory, Trace* trace);

  // `block` is kReady in DRAM: write it unless SSD has it or refused it.
  void Queue(Block* block);

  // True when the DRAM copy is the only one and worth a place on SSD: queues the write.
  bool MustDemote(Block* block);

  // Starts queued writes, few at a time so that a read never waits long behind them.
  void Pump();
  void OnDone(uint64_t tag, const Status& status);

  bool idle() const { return queue_.empty() && in_flight_.empty(); }
  uint32_t num_waiting() const { return static_cast<uint32_t>(queue_.size()); }
  uint32_t num_in_flight() const { return static_cast<uint32_t>(in_flight_.size()); }
  uint64_t num_failed() const { return num_failed_; }
  uint64_t num_evicted() const { return num_evicted_; }  // SSD copies that made room

  // Blocks written from now on are newer than `generation`.
  void StartAfter(uint64_t generation) { generation_ = generation; }

 private:
  struct Write {
    Transfer transfer;
    BlockPin source;
  };

  bool HasSsdRoom(const Block& incoming, Block** victim) const;
  Slot TakeSsdSlot(const Block& incoming);
  void Start(const BlockRef& block, Slot slot);

  Tiers* const tiers_;
  Directory* const directory_;
  Trace* const trace_;
  const uint32_t max_in_flight_;
  std::deque<BlockKey> queue_;  // a block is in it at most once (Copy::unsaved)
  std::unordered_map<uint64_t, Write> in_flight_;
  uint64_t next_tag_ = kSaveTag;
  uint64_t generation_ = 0;
  uint64_t num_failed_ = 0;
  uint64_t num_evicted_ = 0;
};

}  // namespace cachedattn
