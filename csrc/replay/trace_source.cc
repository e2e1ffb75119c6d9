#include "csrc/replay/trace_source.h"

#include <algorithm>

#include "csrc/base/check.h"

namespace cachedattn {

TraceSource::TraceSource(const TokenTree& tree, const Schedule& schedule)
    : tree_(tree),
      schedule_(schedule),
      lines_{{&schedule.by_completion, &schedule.completion},
             {&schedule.by_arrival, &schedule.arrival},
             {&schedule.by_arrival, &schedule.start}},
      last_(tree.size()),
      results_(tree.size()) {
  for (uint32_t r = 0; r < tree.size(); ++r) last_[tree.workload()[r].session] = r;
}

double TraceSource::next_s() const {
  return std::min({lines_[0].next_s(), lines_[1].next_s(), lines_[2].next_s()});
}

Event TraceSource::Next() {
  Line& line = *std::ranges::min_element(lines_, {}, &Line::next_s);
  const double time_s = line.next_s();
  CA_CHECK(time_s != kNoTime);
  return {static_cast<EventKind>(&line - lines_), time_s, (*line.order)[line.next++]};
}

Turn TraceSource::turn(uint32_t r) const {
  const Request& request = tree_.workload()[r];
  const bool goes_on =
      request.parent != kNoRequest && tree_.shared(r) == tree_.total(request.parent);
  return {.session = request.session,
          .goes_on_from = goes_on ? request.parent : kNoRequest,
          .prompt = tree_.prompt(r),
          .total = tree_.total(r),
          .finish = request.finish,
          .last = last_[request.session] == r};
}

uint32_t TraceSource::max_running() const {
  uint32_t most = 0, running = 0;
  size_t completed = 0;
  for (uint32_t r : schedule_.by_arrival) {
    for (; schedule_.completion[schedule_.by_completion[completed]] <= schedule_.start[r];
         ++completed) {
      --running;
    }
    most = std::max(most, ++running);
  }
  return most;
}

}  // namespace cachedattn
