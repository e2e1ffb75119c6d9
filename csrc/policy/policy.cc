#include "csrc/policy/policy.h"

#include <algorithm>

#include "csrc/policy/policy_impl.h"

namespace cachedattn {

std::unique_ptr<Policy> Policy::Make(const PolicyOptions& options, const Clock* clock) {
  return std::make_unique<PolicyImpl>(options, clock);
}

PolicyImpl::PolicyImpl(const PolicyOptions& options, const Clock* clock)
    : options_(options),
      clock_(clock),
      now_ns_(clock->NowNs()),
      order_(learns() ? IdleCell(HazardTables::kNumClasses, 0) : kIdleCell + 1),
      tables_(options.per_token) {
  for (uint32_t tier = 0; tier < kNumTiers; ++tier)
    rankings_.emplace_back(tier, &records_, &order_);
  if (learns()) {
    tables_.Use(HazardTables::kNoTurn);
    tables_.Recompute(now_ns_);
  }
  SetOrder();
}

Record& PolicyImpl::Live(Conversation id) {
  CA_CHECK(id < records_.end() && records_[id].holders > 0);
  return records_[id];
}

const Record& PolicyImpl::Live(Conversation id) const {
  CA_CHECK(id < records_.end() && records_[id].holders > 0);
  return records_[id];
}

Conversation PolicyImpl::Hold(uint64_t name, uint32_t tenant) {
  Advance();
  Conversation id = name == 0 ? kNoConversation : names_.Find(name, tenant);
  if (id != kNoConversation) {
    Record& record = records_[id];
    if (record.ghost) {
      record.ghost = false;
      ghosts_.Erase(&records_, kGhostLink, id);
      --num_ghosts_;
      ++num_held_;
    }
    ++record.holders;
    return id;
  }
  id = records_.Take();
  Record& record = records_[id];
  record.live = true;
  record.holders = 1;
  record.name = name;
  record.tenant = tenant;
  record.turn_class = learns() ? HazardTables::kNoTurn : 0;
  record.order = record.used = ++stamp_;
  if (name != 0) names_.Insert(id);
  ++num_held_;
  StartIdle(id, false);
  Seat(id);
  return id;
}

void PolicyImpl::Hold(Conversation id) { ++Live(id).holders; }

void PolicyImpl::Release(Conversation id) {
  Live(id);
  Advance();
  LetGo(id);
}

// One holder less. What was learnt of a conversation outlives the last one for a while.
void PolicyImpl::LetGo(Conversation id) {
  Record& record = records_[id];
  if (--record.holders > 0) return;
  --num_held_;
  Unseat(id);
  record.evictable = 0;
  if (record.name == 0 || !learns() || record.turn_class == HazardTables::kNoTurn) {
    Free(id);
    return;
  }
  record.ghost = true;
  ghosts_.PushBack(&records_, kGhostLink, id);
  if (++num_ghosts_ > kMaxGhosts) Free(ghosts_.head);
}

// REQUIRES: in no tier.
void PolicyImpl::Free(Conversation id) {
  Record& record = records_[id];
  if (record.ghost) {
    ghosts_.Erase(&records_, kGhostLink, id);
    --num_ghosts_;
  }
  StopAgeing(id, now_ns_);
  DropHints(id);
  if (record.name != 0) names_.Erase(id);
  std::ranges::replace(leaving_, id, kNoConversation);
  records_.Free(id);
}

void PolicyImpl::SetQueue(std::span<const Conversation> waiting) {
  Advance();
  const auto mark = static_cast<uint8_t>(3 - queue_mark_);  // 1 and 2 in turn
  std::vector<Conversation> queue;
  uint64_t last = 0;
  for (const Conversation id : waiting) {
    Record& record = Live(id);
    if (record.queue_mark == mark) continue;  // its first place counts
    // As the queue moves up, those in it keep their numbers and their seats.
    const bool was_waiting = record.waiting();
    const uint64_t queued = was_waiting && record.queued > last ? record.queued : last + 1;
    if (!was_waiting || queued != record.queued) {
      Unseat(id);
      if (!record.busy()) Return(id);
      record.queue_mark = mark;
      record.queued = queued;
      Seat(id);
    }
    record.queue_mark = mark;
    if (!was_waiting) ++record.holders;
    last = queued;
    queue.push_back(id);
  }
  for (const Conversation id : queue_) {
    Record& record = records_[id];
    if (record.queue_mark == mark) continue;
    Unseat(id);
    record.queue_mark = 0;
    if (record.hinted) SetTimer(id);
    Seat(id);
    LetGo(id);
  }
  queue_ = std::move(queue);
  queue_mark_ = mark;
  FireTimers();  // of those whose time to live had passed while they waited
}

void PolicyImpl::Begin(Conversation id) {
  Record& record = Live(id);
  Advance();
  ++record.holders;
  Unseat(id);
  if (!record.busy()) Return(id);
  TakeBackHints(id);
  if (learns() && !record.ageing) StartIdle(id, false);  // it was over
  record.used = ++stamp_;
  ++record.in_service;
  if (!learns() && options_.kind != PolicyKind::kFifo) record.order = record.used;
  Seat(id);
}

void PolicyImpl::End(Conversation id, const TurnEnd* turn) {
  Record& record = Live(id);
  CA_CHECK(record.in_service > 0);
  Advance();
  Unseat(id);
  --record.in_service;
  if (turn != nullptr) EndTurn(id, *turn);
  StopAgeing(id, now_ns_);
  StartIdle(id, turn != nullptr && !record.busy());
  Seat(id);
  LetGo(id);
}

void PolicyImpl::Restored(Conversation id) {
  Record& record = Live(id);
  Advance();
  Unseat(id);
  StopAgeing(id, now_ns_);
  record.order = record.used = ++stamp_;
  StartIdle(id, false);
  Seat(id);
}

uint64_t PolicyImpl::bytes() const {
  constexpr uint64_t kNodeBytes = 96;  // of a tree or a hash table, with what it holds
  uint64_t bytes = sizeof(*this) + records_.bytes() + names_.bytes() + tables_.bytes();
  for (const Ranking& ranking : rankings_) bytes += ranking.bytes();
  for (const auto& of_tenant : of_tenants_) bytes += of_tenant.size() * kNodeBytes;
  bytes += (hints_.size() + timers_.size()) * kNodeBytes;
  return bytes + queue_.capacity() * sizeof(Conversation);
}

}  // namespace cachedattn
