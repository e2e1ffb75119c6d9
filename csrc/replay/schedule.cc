#include "csrc/replay/schedule.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>

#include "csrc/base/check.h"

namespace cachedattn {

namespace {

constexpr double kTurnSeconds = 0.05;
constexpr double kPrefillRate = 8000;  // tokens a second
constexpr double kSecondsPerAnswerToken = 0.03;
constexpr double kLeastSeconds = 1e-6;  // so that every turn ends after it began

double ServiceSeconds(const Request& request) {
  if (request.service_s >= 0) return request.service_s;
  return PrefillSeconds(request.prompt - request.shared) + kSecondsPerAnswerToken * request.answer;
}

double Factor(const Workload& workload, const ServerOptions& options) {
  double work = 0;
  for (const Request& request : workload) work += ServiceSeconds(request);
  if (options.turns_per_second > 0) {
    return options.slots * static_cast<double>(workload.size()) / (options.turns_per_second * work);
  }
  return options.load > 0 ? options.load * options.slots * options.span_s / work : 1;
}

struct Event {
  double time = 0;
  uint32_t request = 0;
  // Of two at one time the one that the trace lists first.
  auto operator<=>(const Event&) const = default;
};
using Events = std::priority_queue<Event, std::vector<Event>, std::greater<>>;

std::vector<uint32_t> Sorted(const std::vector<double>& times) {
  std::vector<uint32_t> order(times.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](uint32_t r) { return times[r]; });
  return order;
}

}  // namespace

double PrefillSeconds(double new_tokens) { return kTurnSeconds + new_tokens / kPrefillRate; }

Schedule MakeSchedule(const Workload& workload, const ServerOptions& options) {
  CA_CHECK(options.slots > 0);
  const size_t n = workload.size();
  Schedule out;
  out.factor = Factor(workload, options);
  out.arrival.resize(n);
  out.start.resize(n);
  out.completion.resize(n);
  std::vector<std::vector<uint32_t>> next(n);
  Events arrivals, completions;
  for (uint32_t r = 0; r < n; ++r) {
    const Request& request = workload[r];
    if (request.previous == kNoRequest) {
      arrivals.push({request.arrival_s, r});
    } else {
      next[request.previous].push_back(r);
    }
  }
  std::queue<uint32_t> waiting;
  uint32_t num_free = options.slots;
  while (!arrivals.empty() || !completions.empty()) {
    double now = 0;
    if (arrivals.empty() ||
        (!completions.empty() && completions.top().time <= arrivals.top().time)) {
      const uint32_t done = completions.top().request;
      now = completions.top().time;
      completions.pop();
      ++num_free;
      for (uint32_t r : next[done]) arrivals.push({now + workload[r].think_s, r});
    } else {
      const uint32_t r = arrivals.top().request;
      now = arrivals.top().time;
      arrivals.pop();
      out.arrival[r] = now;
      out.by_arrival.push_back(r);
      waiting.push(r);
    }
    // Who arrives at this very moment stands in line before anyone is taken from it.
    const bool more = !arrivals.empty() && arrivals.top().time <= now;
    for (; !more && num_free > 0 && !waiting.empty(); --num_free) {
      const uint32_t r = waiting.front();
      waiting.pop();
      out.start[r] = now;
      out.completion[r] = now + std::max(kLeastSeconds, out.factor * ServiceSeconds(workload[r]));
      completions.push({out.completion[r], r});
    }
  }
  CA_CHECK(out.by_arrival.size() == n);
  out.by_completion = Sorted(out.completion);
  double waited = 0;
  for (size_t r = 0; r < n && options.span_s > 0; ++r) {
    waited += std::max(0.0, std::min(out.start[r], options.span_s) - out.arrival[r]);
  }
  out.mean_queue = options.span_s > 0 ? waited / options.span_s : 0;
  return out;
}

}  // namespace cachedattn
