// Schedule: when each request of a workload arrives, starts and completes on a server of some
// slots, first come first served.
//
// A turn takes 0.05 s, the time of its new tokens at 8,000 a second and 0.03 s for each token of
// the answer, or what the trace recorded, times a factor. New is what no store could have: so the
// schedule is the same for all policies, and they see the same queue. A session's next turn arrives
// its think time after the answer.
#pragma once

#include <functional>
#include <limits>
#include <queue>
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

constexpr double kNoTime = std::numeric_limits<double>::infinity();

// What happens to a request; of one moment in this order.
enum class EventKind : uint8_t { kCompletion, kArrival, kStart };

struct Event {
  EventKind kind = EventKind::kArrival;
  double time_s = 0;
  uint32_t request = 0;
};

// A server's events, one after the other. It knows only what is to come and what is there.
class Server {
 public:
  explicit Server(uint32_t slots) : num_free_(slots) {}

  // A request that will arrive, not before the last event. After a completion the turns that follow
  // from it are made known before the next event is asked for.
  void Expect(double arrival_s, uint32_t request, double service_s);
  double next_s() const;  // of the next event; kNoTime: none is to come
  Event Next();           // REQUIRES: one is to come

 private:
  struct Pending {
    double time_s = 0;
    uint32_t request = 0;
    double service_s = 0;
    // Of two at one time the one that the trace lists first.
    auto operator<=>(const Pending&) const = default;
  };
  using Queue = std::priority_queue<Pending, std::vector<Pending>, std::greater<>>;

  bool can_start() const;

  uint32_t num_free_;
  double now_s_ = 0;
  Queue arrivals_, completions_;
  std::queue<Pending> waiting_;
};

// Seconds of one turn with `new_tokens` to compute, at factor 1: until its first token, and whole.
CA_API double PrefillSeconds(double new_tokens);
CA_API double ServiceSeconds(uint32_t new_tokens, uint32_t answer);

CA_API Schedule MakeSchedule(const Workload& workload, const ServerOptions& options);

}  // namespace cachedattn
