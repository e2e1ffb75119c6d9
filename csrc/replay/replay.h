// Replay: the requests of a source, played to the real AttentionStore in virtual time on modelled
// hardware. What is kept, prefetched and dropped is decided by the code that a live store
// runs.
//
// Without a size the device tier holds the running turns alone (keep_on_device is false), so that
// DRAM and SSD are the experiment. A turn begins at its scheduled start and ends at its scheduled
// completion, or as soon after that as its history has been loaded; it is computed when it ends,
// in the steps of the engine (cachedattn/scheduler.py).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "csrc/replay/hardware.h"
#include "csrc/replay/source.h"
#include "csrc/replay/token_tree.h"
#include "csrc/store/attention_store.h"

namespace cachedattn {

// How far it has got, and what is held for it now.
struct ReplayProgress {
  uint64_t ended = 0;                      // requests
  uint64_t sessions = 0;                   // that have begun and have turns to come
  uint64_t conversations = 0, blocks = 0;  // of which the store holds something
  uint64_t evictions = 0;                  // from DRAM and SSD, so far
};

struct ReplayOptions {
  std::string policy = "lookahead";
  uint64_t device_bytes = 0;  // 0: room for the running turns, which leave it as they end
  uint64_t dram_bytes = 0;
  uint64_t ssd_bytes = 0;    // 0: no SSD tier
  uint64_t token_bytes = 0;  // K and V of one token of the model
  double dram_reserve = 0;
  SsdModel ssd = {};
  double copy_bytes_s = 0;  // DRAM <-> device, each way; 0: takes no time
  bool events = false;      // the store's trace is wanted
  // Called every few hundred requests. False: the replay is given up.
  std::function<bool(const ReplayProgress&)> progress = {};
};

// What the store has done.
struct ReplayTotals {
  uint64_t ssd_bytes_read = 0, ssd_bytes_written = 0;
  uint64_t device_evictions = 0, dram_evictions = 0, ssd_evictions = 0;  // blocks
  uint64_t without_history = 0;  // turns that began without theirs: there was no room to load it
  uint64_t not_saved = 0;        // turns whose new tokens found no room at all
  std::vector<TraceEvent> events;
};

struct ReplayResult : ReplayTotals {
  // As in TurnResult, by request.
  std::vector<uint32_t> hit_tokens, dram_tokens, device_tokens;
  std::vector<double> load_s;
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
CA_API Result<ReplayTotals> Replay(Source* source, const ReplayOptions& options);
CA_API Result<ReplayResult> Replay(const TokenTree& tree, const Schedule& schedule,
                                   const ReplayOptions& options);

}  // namespace cachedattn
