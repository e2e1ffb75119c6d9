// What PolicyImpl does as time passes and as conversations come and go: ages, and what is learnt.
#include <algorithm>
#include <cmath>

#include "csrc/policy/policy_impl.h"

namespace cachedattn {

void PolicyImpl::Advance() {
  const int64_t now_ns = clock_->NowNs();
  if (now_ns <= now_ns_) return;
  now_ns_ = now_ns;
  FireTimers();
  if (now_ns_ >= next_crossing_ns_) Age();
}

// Of each bin about one is due at a time. Reads of what their crossing will touch, started
// together, take hardly longer than one of them.
void PolicyImpl::FetchDue() const {
  std::array<uint8_t, HazardTables::kNumBins> due;
  size_t num_due = 0;
  for (uint32_t bin = 0; bin + 1 < HazardTables::kNumBins; ++bin) {
    if (now_ns_ < ages_[bin].due_ns || ages_[bin].list.empty()) continue;
    records_.Prefetch(ages_[bin].list.head);
    due[num_due++] = static_cast<uint8_t>(bin);
  }
  for (size_t i = 0; i < num_due; ++i) {
    const Record& record = records_[ages_[due[i]].list.head];
    for (uint32_t tier = 0; tier < kNumTiers; ++tier) {
      if ((record.evictable >> tier & 1) == 0) continue;
      records_.Prefetch(rankings_[tier].tail(IdleCell(record.turn_class, due[i] + 1u)));
    }
  }
}

// From the oldest bin on, so that whoever skips bins still comes behind all that are older.
void PolicyImpl::Age() {
  FetchDue();
  next_crossing_ns_ = kNever;
  for (uint32_t bin = HazardTables::kNumBins - 1; bin-- > 0;) {
    AgeList& ages = ages_[bin];
    while (now_ns_ >= ages.due_ns) {
      const Conversation id = ages.list.head;
      if (id == kNoConversation) {
        ages.due_ns = kNever;
        break;
      }
      const Record& record = records_[id];
      ages.due_ns = record.idle_since_ns + HazardTables::UpperEdge(bin);
      if (now_ns_ < ages.due_ns) break;
      records_.Prefetch(record.links[kAgeLink].next);
      Cross(id, HazardTables::BinOf(now_ns_ - record.idle_since_ns));
    }
    next_crossing_ns_ = std::min(next_crossing_ns_, ages.due_ns);
  }
}

// To a later bin of ages.
void PolicyImpl::Cross(Conversation id, uint8_t bin) {
  Record& record = records_[id];
  ages_[record.bin].list.Erase(&records_, kAgeLink, id);
  if (record.teaches) {
    const int64_t since_ns = record.idle_since_ns;
    tables_.Leave(record.turn_class, record.bin, since_ns, since_ns + HazardTables::LowerEdge(bin));
    tables_.Enter(record.turn_class, bin, since_ns);
  }
  std::array<CellId, kNumTiers> from{};
  for (uint32_t tier = 0; tier < kNumTiers; ++tier) {
    from[tier] = CellOf(record, static_cast<Tier>(tier));
  }
  record.bin = bin;
  AgeList& ages = ages_[bin];
  if (ages.list.empty() && bin + 1u < HazardTables::kNumBins) {
    ages.due_ns = record.idle_since_ns + HazardTables::UpperEdge(bin);
    next_crossing_ns_ = std::min(next_crossing_ns_, ages.due_ns);
  }
  ages.list.PushBack(&records_, kAgeLink, id);
  if (record.place != Place::kIdle) return;
  for (uint32_t tier = 0; tier < kNumTiers; ++tier) {
    const CellId to = CellOf(record, static_cast<Tier>(tier));
    if ((record.evictable >> tier & 1) == 0 || to == from[tier]) continue;
    rankings_[tier].Erase(id, from[tier]);
    rankings_[tier].Insert(id, to);
  }
}

void PolicyImpl::StopAgeing(Conversation id, int64_t at_ns) {
  Record& record = records_[id];
  if (!record.ageing) return;
  record.ageing = false;
  ages_[record.bin].list.Erase(&records_, kAgeLink, id);
  if (record.teaches) {
    tables_.Leave(record.turn_class, record.bin, record.idle_since_ns, at_ns);
  }
}

// Its age is counted from now on; `teaches`: it is idle, and its return is news. REQUIRES:
// unseated, not ageing.
void PolicyImpl::StartIdle(Conversation id, bool teaches) {
  Record& record = records_[id];
  record.idle_since_ns = now_ns_;
  record.bin = 0;
  if (record.hinted) SetTimer(id);
  if (!learns()) return;
  record.order = ++stamp_;
  record.teaches = teaches;
  if (record.over) return;
  record.ageing = true;
  AgeList& ages = ages_[0];
  if (ages.list.empty()) {
    ages.due_ns = now_ns_ + HazardTables::UpperEdge(0);
    next_crossing_ns_ = std::min(next_crossing_ns_, ages.due_ns);
  }
  ages.list.PushBack(&records_, kAgeLink, id);
  if (teaches) tables_.Enter(record.turn_class, 0, now_ns_);
}

// Its user is back: it waits, or its turn begins. REQUIRES: unseated.
void PolicyImpl::Return(Conversation id) {
  Record& record = records_[id];
  std::ranges::replace(leaving_, id, kNoConversation);
  const int64_t age_ns = now_ns_ - record.idle_since_ns;
  if (record.teaches && record.over) {
    // It was not over after all, and was idle all the while.
    const int64_t over_ns = HintsOf(id).over_ns - record.idle_since_ns;
    tables_.AddExposure(record.turn_class, std::max<int64_t>(over_ns, 0), age_ns);
  }
  if (!record.teaches) return;
  if (record.ageing) tables_.Leave(record.turn_class, record.bin, record.idle_since_ns, now_ns_);
  tables_.AddEvent(record.turn_class, HazardTables::BinOf(age_ns));
  record.gap = HazardTables::GapOf(age_ns);
  record.teaches = false;
}

// REQUIRES: the turn is no longer in service, and the conversation unseated.
void PolicyImpl::EndTurn(Conversation id, const TurnEnd& turn) {
  Record& record = records_[id];
  ++record.turns;
  ++num_turns_;
  record.used = ++stamp_;
  if (learns()) {
    SetClass(id, tables_.ClassOf(turn, record.turns, record.gap));
    if (num_turns_ >= next_recompute_) Recompute();
  } else if (options_.kind != PolicyKind::kFifo) {
    record.order = record.used;
  }
  if (learns() && record.in_service == 0 && record.waiting()) {
    // The next turn came before this one ended.
    tables_.AddEvent(record.turn_class, 0);
    record.gap = HazardTables::GapOf(0);
  }
}

void PolicyImpl::SetClass(Conversation id, uint16_t turn_class) {
  records_[id].turn_class = turn_class;
  if (tables_.Use(turn_class)) Recompute();
}

// Nothing that was seen is forgotten: each time, as much has to be new as can make a difference.
void PolicyImpl::Recompute() {
  constexpr std::array<uint64_t, 4> kFirst = {10, 20, 50, 100};
  const auto first = std::ranges::upper_bound(kFirst, num_turns_);
  next_recompute_ = first != kFirst.end()
                        ? *first
                        : num_turns_ + std::max(kRecomputeTurns, num_turns_ / kRecomputeShare);
  tables_.Recompute(now_ns_);
  SetOrder();
}

}  // namespace cachedattn
