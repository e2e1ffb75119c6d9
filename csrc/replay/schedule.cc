#include "csrc/replay/schedule.h"

#include <algorithm>
#include <numeric>

#include "csrc/base/check.h"

namespace cachedattn {

namespace {

constexpr double kTurnSeconds = 0.05;
constexpr double kPrefillRate = 8000;  // tokens a second
constexpr double kSecondsPerAnswerToken = 0.03;
constexpr double kLeastSeconds = 1e-6;  // so that every turn ends after it began

double ServiceOf(const Request& request) {
  if (request.service_s >= 0) return request.service_s;
  return ServiceSeconds(request.prompt - request.shared, request.answer);
}

double Factor(const Workload& workload, const ServerOptions& options) {
  double work = 0;
  for (const Request& request : workload) work += ServiceOf(request);
  if (options.turns_per_second > 0) {
    return options.slots * static_cast<double>(workload.size()) / (options.turns_per_second * work);
  }
  return options.load > 0 ? options.load * options.slots * options.span_s / work : 1;
}

std::vector<uint32_t> Sorted(const std::vector<double>& times) {
  std::vector<uint32_t> order(times.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](uint32_t r) { return times[r]; });
  return order;
}

}  // namespace

double PrefillSeconds(double new_tokens) { return kTurnSeconds + new_tokens / kPrefillRate; }

double ServiceSeconds(uint32_t new_tokens, uint32_t answer) {
  return PrefillSeconds(new_tokens) + kSecondsPerAnswerToken * answer;
}

void Server::Expect(double arrival_s, uint32_t request, double service_s) {
  arrivals_.push({arrival_s, request, std::max(kLeastSeconds, service_s)});
}

// Who arrives at this very moment stands in line before anyone is taken from it.
bool Server::can_start() const {
  return num_free_ > 0 && !waiting_.empty() &&
         (arrivals_.empty() || arrivals_.top().time_s > now_s_);
}

double Server::next_s() const {
  if (can_start()) return now_s_;
  const double arrival_s = arrivals_.empty() ? kNoTime : arrivals_.top().time_s;
  return completions_.empty() ? arrival_s : std::min(arrival_s, completions_.top().time_s);
}

Event Server::Next() {
  if (can_start()) {
    const Pending turn = waiting_.front();
    waiting_.pop();
    --num_free_;
    completions_.push({now_s_ + turn.service_s, turn.request, 0});
    return {EventKind::kStart, now_s_, turn.request};
  }
  now_s_ = next_s();
  CA_CHECK(now_s_ != kNoTime);
  if (!completions_.empty() && completions_.top().time_s <= now_s_) {
    const Event event = {EventKind::kCompletion, now_s_, completions_.top().request};
    completions_.pop();
    ++num_free_;
    return event;
  }
  const Event event = {EventKind::kArrival, now_s_, arrivals_.top().request};
  waiting_.push(arrivals_.top());
  arrivals_.pop();
  return event;
}

Schedule MakeSchedule(const Workload& workload, const ServerOptions& options) {
  CA_CHECK(options.slots > 0);
  const size_t n = workload.size();
  Schedule out;
  out.factor = Factor(workload, options);
  out.arrival.resize(n);
  out.start.resize(n);
  out.completion.resize(n);
  Server server(options.slots);
  const auto expect = [&](double arrival_s, uint32_t r) {
    server.Expect(arrival_s, r, out.factor * ServiceOf(workload[r]));
  };
  std::vector<std::vector<uint32_t>> next(n);
  for (uint32_t r = 0; r < n; ++r) {
    const Request& request = workload[r];
    if (request.previous == kNoRequest) {
      expect(request.arrival_s, r);
    } else {
      next[request.previous].push_back(r);
    }
  }
  while (server.next_s() != kNoTime) {
    const auto [kind, time_s, r] = server.Next();
    if (kind == EventKind::kArrival) {
      out.arrival[r] = time_s;
      out.by_arrival.push_back(r);
    } else if (kind == EventKind::kStart) {
      out.start[r] = time_s;
    } else {
      out.completion[r] = time_s;
      for (uint32_t later : next[r]) expect(time_s + workload[later].think_s, later);
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
