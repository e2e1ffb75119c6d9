// Replay: a workload and its schedule, played to the real AttentionStore in virtual time on
// modelled hardware. What is kept, prefetched and dropped is decided by the code that a live store
// runs.
//
// The device tier holds the running turns alone (keep_on_device is false), so that DRAM and SSD are
// the experiment. A turn begins at its scheduled start and ends at its scheduled completion, or as
// soon after that as its history has been loaded.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "csrc/replay/hardware.h"
#include "csrc/replay/schedule.h"
#include "csrc/replay/token_tree.h"
#include "csrc/store/attention_store.h"

namespace cachedattn {

struct ReplayOptions {
  std::string policy = "lookahead";
  uint64_t dram_bytes = 0;
  uint64_t ssd_bytes = 0;    // 0: no SSD tier
  uint64_t token_bytes = 0;  // K and V of one token of the model
  double dram_reserve = 0;
  SsdModel ssd = {};
  double copy_bytes_s = 0;  // DRAM <-> device, each way; 0: takes no time
  // Called with the number of requests that have ended. False: the replay is given up.
  std::function<bool(size_t done)> progress = {};
};

struct ReplayResult {
  // By request. Tokens of the context that were found at its start, and of these those in DRAM or
  // faster; seconds from its start until all of them were on the device.
  std::vector<uint32_t> hit_tokens, dram_tokens;
  std::vector<double> load_s;
  uint64_t ssd_bytes_read = 0, ssd_bytes_written = 0;
  uint64_t dram_evictions = 0, ssd_evictions = 0;  // blocks
  uint64_t without_history = 0;  // turns that began without theirs: there was no room to load it
  uint64_t not_saved = 0;        // turns whose new tokens found no room at all
};

// What the store is told of sessions beside their turns.
struct SessionHints {
  bool over = false;            // when a session has had its last turn
  int64_t time_to_live_ns = 0;  // how long it may be idle; 0: not told
};

// A policy from its name: lookahead, hazard, lru or fifo, then any of +ended and +ttl=SECONDS
// (SessionHints), +in-service, +whole, +per-token (PolicyOptions). kInvalidArgument: there is no
// such policy.
CA_API Status SetPolicy(const std::string& name, PolicyOptions* policy, SessionHints* hints);

// kInvalidArgument when the options hold no store; kClosed when `progress` gave up.
CA_API Result<ReplayResult> Replay(const TokenTree& tree, const Schedule& schedule,
                                   const ReplayOptions& options);

}  // namespace cachedattn
