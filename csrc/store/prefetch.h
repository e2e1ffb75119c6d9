// Prefetcher: SSD -> DRAM for waiting requests, in the order of the queue (design D6).
#pragma once

#include <deque>
#include <unordered_map>

#include "csrc/store/conversations.h"
#include "csrc/store/evict.h"
#include "csrc/store/preload.h"

namespace cachedattn {

class Prefetcher {
 public:
  Prefetcher(Tiers* tiers, Directory* directory, Policy* policy, Evictor* evictor,
             Preloader* preloader);

  // Bring what these need to DRAM, the first of them first.
  void SetQueue(std::span<const std::shared_ptr<Chain>> waiting);
  // Starts the next reads. Reads that a running sequence waits for go first.
  void Pump();

 private:
  struct Wanted {
    BlockKey key;
    Conversation conversation;  // held
  };

  void Clear();
  bool WantMore();

  Tiers* const tiers_;
  Directory* const directory_;
  Policy* const policy_;
  Evictor* const evictor_;
  Preloader* const preloader_;
  const uint32_t max_in_flight_;  // blocks
  std::vector<std::shared_ptr<Chain>> waiting_;
  size_t next_ = 0;            // of waiting_, to be looked at
  std::deque<Wanted> wanted_;  // of those before
  std::vector<FillRef> running_;
  // Of waiting_, those that have all in DRAM while nothing of these owners' is evicted.
  std::unordered_map<const Chain*, std::vector<Conversation>> there_;
};

}  // namespace cachedattn
