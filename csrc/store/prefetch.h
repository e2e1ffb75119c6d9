// Prefetcher: SSD -> DRAM for waiting requests, in the order of the queue (design D6).
#pragma once

#include <deque>

#include "csrc/store/evict.h"
#include "csrc/store/preload.h"

namespace cachedattn {

class Prefetcher {
 public:
  Prefetcher(Tiers* tiers, Directory* directory, Policy* policy, Evictor* evictor,
             Preloader* preloader);

  void Clear();
  // Bring these blocks to DRAM for the conversation, after those that were asked for before;
  // kNoConversation: that of the last of them.
  void Want(std::span<const BlockRef> blocks, Conversation conversation);
  // Starts the next reads. Reads that a running sequence waits for go first.
  void Pump();

 private:
  Tiers* const tiers_;
  Directory* const directory_;
  Policy* const policy_;
  Evictor* const evictor_;
  Preloader* const preloader_;
  const uint32_t max_in_flight_;  // blocks
  struct Wanted {
    BlockKey key;
    Conversation conversation;  // held
  };
  std::deque<Wanted> wanted_;
  std::unordered_map<uint32_t, uint32_t> num_wanted_;  // by tenant, since Clear
  std::vector<FillRef> running_;
};

}  // namespace cachedattn
