// Schedule: when each request of a workload arrives, starts and completes on a server of some
// slots, first come first served.
//
// A turn takes 0.05 s, the time of its new tokens at 8,000 a second and 0.03 s for each token of
// the answer, or what the trace recorded, times a factor. New is what no store could have: so the
// schedule is the same for all policies, and they see the same queue. A session's next turn arrives
// its think time after the answer.
#pragma once

#include <vector>

#include "csrc/replay/workload.h"

namespace cachedattn {

struct ServerOptions {
  uint32_t slots = 1;
  double span_s = 0;  // of the trace
  // Work that is offered, as a share of what the slots can do in the span; 0: unscaled.
  double load = 0;
  // In place of a load: what the slots complete while all of them are busy; 0: not given.
  double turns_per_second = 0;
};

struct Schedule {
  double factor = 1;
  // Seconds, by request.
  std::vector<double> arrival, start, completion;
  // Requests in the order of their arrivals, which is that of their starts, and by completion.
  std::vector<uint32_t> by_arrival, by_completion;
  double mean_queue = 0;  // waiting requests, on average over the span
};

// Seconds of one turn with `new_tokens` to compute until its first token, at factor 1.
CA_API double PrefillSeconds(double new_tokens);

CA_API Schedule MakeSchedule(const Workload& workload, const ServerOptions& options);

}  // namespace cachedattn
