// Source: where a replay takes its requests from, as they come up.
//
// A source numbers its requests. A trace's are its lines; a generated workload gives the numbers of
// those that have ended to others, so that they stay as small as what lives.
#pragma once

#include <vector>

#include "csrc/replay/schedule.h"
#include "csrc/store/chain.h"

namespace cachedattn {

// A request in tokens of the store.
struct Turn {
  uint64_t session = 0;
  // The session's turn with whose answer this prompt goes on; kNoRequest: it does not.
  int32_t goes_on_from = kNoRequest;
  uint32_t prompt = 0, total = 0;  // tokens, history included, without and with the answer
  Finish finish = Finish::kOther;
  bool last = false;  // of its session
};

// What became of it.
struct TurnResult {
  // Tokens of the context that were found at its start, of these those in DRAM or faster, and of
  // these those on the device.
  uint32_t hit_tokens = 0, dram_tokens = 0, device_tokens = 0;
  double load_s = 0;  // from its start until all of them were on the device
};

class Source {
 public:
  virtual ~Source() = default;

  virtual double next_s() const = 0;  // of the next event; kNoTime: there is none
  virtual Event Next() = 0;           // REQUIRES: there is one

  // Of a request that has arrived and not ended.
  virtual Turn turn(uint32_t request) const = 0;
  virtual std::vector<TokenId> Tokens(uint32_t request, uint32_t first, uint32_t last) const = 0;
  // It has ended, later than its completion where its history was late.
  virtual void End(uint32_t request, const TurnResult& result) = 0;

  virtual uint32_t granularity() const = 0;  // tokens of the model in one of the store
  virtual Truncation truncation() const = 0;
  virtual uint32_t max_context() const = 0;  // tokens of the store
  virtual uint32_t max_running() const = 0;  // requests
};

}  // namespace cachedattn
