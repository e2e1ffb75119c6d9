// The hints of PolicyImpl, and the times at which they begin or end to count.
#include <algorithm>

#include "csrc/policy/policy_impl.h"

namespace cachedattn {
namespace {

// `ns` from now, or as late as can be said.
int64_t After(int64_t now_ns, int64_t ns) {
  return ns < INT64_MAX - 1 - std::max<int64_t>(now_ns, 0) ? now_ns + ns : INT64_MAX - 1;
}

}  // namespace

PolicyImpl::Hints& PolicyImpl::HintsOf(Conversation id) {
  records_[id].hinted = true;
  return hints_[id];
}

void PolicyImpl::DropHints(Conversation id) {
  if (!records_[id].hinted) return;
  timers_.erase({HintsOf(id).timer_ns, id});
  hints_.erase(id);
  records_[id].hinted = false;
}

// Looks again when the next of its times comes. A timer that comes too early is left as it is: each
// turn puts a time to live off, and most end before it has passed.
void PolicyImpl::SetTimer(Conversation id) {
  const Record& record = records_[id];
  Hints& hints = HintsOf(id);
  int64_t due_ns = std::min(hints.lease_end_ns, hints.lapse_ns);
  if (hints.time_to_live_ns > 0 && !record.busy() && !record.over) {
    due_ns = std::min(due_ns, After(record.idle_since_ns, hints.time_to_live_ns));
  }
  if (due_ns >= hints.timer_ns) return;
  timers_.erase({hints.timer_ns, id});
  hints.timer_ns = due_ns;
  timers_.emplace(due_ns, id);
}

void PolicyImpl::FireTimers() {
  while (!timers_.empty() && timers_.begin()->first <= now_ns_) {
    const auto [at_ns, id] = *timers_.begin();
    timers_.erase(timers_.begin());
    const Record& record = records_[id];
    Hints& hints = HintsOf(id);
    hints.timer_ns = kNever;
    Unseat(id);
    if (hints.lease_end_ns <= at_ns) hints.lease_end_ns = kNever;
    if (hints.lapse_ns <= at_ns) hints.return_ns = hints.lapse_ns = kNever;
    if (hints.time_to_live_ns > 0 && !record.busy() && !record.over &&
        After(record.idle_since_ns, hints.time_to_live_ns) <= at_ns) {
      BecomeOver(id, at_ns);
    }
    SetTimer(id);
    Seat(id);
  }
}

// REQUIRES: unseated.
void PolicyImpl::BecomeOver(Conversation id, int64_t at_ns) {
  Record& record = records_[id];
  if (record.over) return;
  StopAgeing(id, at_ns);
  record.over = true;
  HintsOf(id).over_ns = at_ns;
}

// A turn begins: what was said of how this one ended, and of the next one, is past.
void PolicyImpl::TakeBackHints(Conversation id) {
  Record& record = records_[id];
  if (!record.hinted) return;
  record.over = false;
  Hints& hints = HintsOf(id);
  hints.over_ns = hints.return_ns = hints.lapse_ns = kNever;
  if (hints.time_to_live_ns == 0 && !hints.leased()) DropHints(id);
}

void PolicyImpl::SetOver(Conversation id) {
  Live(id);
  Advance();
  Unseat(id);
  BecomeOver(id, now_ns_);
  Seat(id);
}

void PolicyImpl::SetTimeToLive(Conversation id, int64_t ns) {
  const Record& record = Live(id);
  Advance();
  Unseat(id);
  HintsOf(id).time_to_live_ns = std::max<int64_t>(ns, 0);
  if (ns > 0 && !record.busy() && After(record.idle_since_ns, ns) <= now_ns_) {
    BecomeOver(id, now_ns_);
  }
  SetTimer(id);
  Seat(id);
}

void PolicyImpl::SetLease(Conversation id, int64_t ns) {
  Live(id);
  Advance();
  Unseat(id);
  HintsOf(id).lease_end_ns = ns > 0 ? After(now_ns_, ns) : kNever;
  SetTimer(id);
  Seat(id);
}

void PolicyImpl::SetReturn(Conversation id, int64_t ns) {
  Live(id);
  Advance();
  Unseat(id);
  Hints& hints = HintsOf(id);
  hints.return_ns = ns > 0 ? After(now_ns_, ns) : kNever;
  hints.lapse_ns = ns > 0 ? After(hints.return_ns, ns) : kNever;
  SetTimer(id);
  Seat(id);
}

}  // namespace cachedattn
