// The order of PolicyImpl: where a conversation stands, and who goes first.
#include <algorithm>
#include <bit>

#include "csrc/policy/policy_impl.h"

namespace cachedattn {
namespace {

// Nanoseconds as a key that orders like them.
uint64_t KeyOfTime(int64_t ns) { return static_cast<uint64_t>(ns) + (uint64_t{1} << 63); }

}  // namespace

Place PolicyImpl::PlaceOf(Conversation id) const {
  const Record& record = records_[id];
  if (record.hinted && HintsOf(id).leased()) return Place::kLeased;
  if (record.waiting() && queue_protects()) return Place::kWaiting;
  if (record.over) return Place::kOver;
  if (record.in_service == 0 && record.hinted && HintsOf(id).promised()) return Place::kPromised;
  return Place::kIdle;
}

// REQUIRES: its place is set.
uint64_t PolicyImpl::KeyOf(Conversation id) const {
  const Record& record = records_[id];
  switch (record.place) {
    case Place::kOver:
      return KeyOfTime(HintsOf(id).over_ns);
    case Place::kPromised:
      return ~KeyOfTime(HintsOf(id).return_ns);
    case Place::kWaiting:
      return ~record.queued;
    case Place::kLeased:
      return KeyOfTime(HintsOf(id).lease_end_ns);
    case Place::kIdle:
      break;
  }
  return record.order;
}

CellId PolicyImpl::CellOf(const Record& record, Tier tier) const {
  const bool dropped = options_.drop_in_service && tier == Tier::kDram && record.in_service > 0;
  switch (record.place) {
    case Place::kOver:
      return kOverCell;
    case Place::kPromised:
      return kPromisedCell;
    case Place::kWaiting:
      return kWaitingCell;
    case Place::kLeased:
      return kLeasedCell;
    case Place::kIdle:
      break;
  }
  if (dropped) return kDroppedCell;
  return learns() ? IdleCell(record.turn_class, record.bin) : kIdleCell;
}

PolicyImpl::OfTenant PolicyImpl::OfTenantAt(Conversation id, Tier tier) const {
  const Record& record = records_[id];
  const bool idle = record.place == Place::kIdle;
  const CellId cell = CellOf(record, tier);
  const uint32_t place =
      cell == kDroppedCell || cell == kOverCell ? cell : 2 + static_cast<uint32_t>(record.place);
  return {record.tenant, static_cast<uint8_t>(place), idle ? record.used : record.key, id};
}

void PolicyImpl::Insert(Conversation id, Tier tier) {
  const auto i = static_cast<uint32_t>(tier);
  rankings_[i].Insert(id, CellOf(records_[id], tier));
  if (options_.by_tenant) of_tenants_[i].insert(OfTenantAt(id, tier));
}

void PolicyImpl::Erase(Conversation id, Tier tier) {
  const auto i = static_cast<uint32_t>(tier);
  rankings_[i].Erase(id, CellOf(records_[id], tier));
  if (options_.by_tenant) of_tenants_[i].erase(OfTenantAt(id, tier));
}

void PolicyImpl::Unseat(Conversation id) {
  for (uint32_t tier = 0; tier < kNumTiers; ++tier) {
    if ((records_[id].evictable >> tier & 1) != 0) Erase(id, static_cast<Tier>(tier));
  }
}

void PolicyImpl::Seat(Conversation id) {
  records_[id].place = PlaceOf(id);
  records_[id].key = KeyOf(id);
  for (uint32_t tier = 0; tier < kNumTiers; ++tier) {
    if ((records_[id].evictable >> tier & 1) != 0) Insert(id, static_cast<Tier>(tier));
  }
}

void PolicyImpl::SetEvictable(Conversation id, Tier tier, bool evictable) {
  Record& record = Live(id);
  const auto bit = static_cast<uint8_t>(1u << static_cast<uint32_t>(tier));
  if (((record.evictable & bit) != 0) == evictable) return;
  record.evictable ^= bit;
  if (evictable) {
    Insert(id, tier);
  } else {
    Erase(id, tier);
  }
}

void PolicyImpl::SetOrder() {
  order_.cell_at = {kOverCell, kDroppedCell};
  if (learns()) {
    // Of positive numbers of a size, bits order like values; whole numbers are sorted faster.
    std::vector<uint64_t> idle;
    idle.reserve(tables_.used().size() * HazardTables::kNumBins);
    for (const uint16_t turn_class : tables_.used()) {
      for (uint32_t bin = 0; bin < HazardTables::kNumBins; ++bin) {
        const auto index = std::bit_cast<uint32_t>(tables_.index(turn_class, bin));
        idle.push_back(uint64_t{index} << 32 | IdleCell(turn_class, bin));
      }
    }
    std::ranges::sort(idle);
    for (const uint64_t cell : idle) order_.cell_at.push_back(static_cast<CellId>(cell));
  } else {
    order_.cell_at.push_back(kIdleCell);
  }
  for (CellId cell : {kPromisedCell, kWaitingCell, kLeasedCell}) {
    order_.cell_at.push_back(cell);
  }
  for (size_t i = 0; i < order_.cell_at.size(); ++i) {
    order_.position_of[order_.cell_at[i]] = static_cast<uint16_t>(i);
  }
  for (Ranking& ranking : rankings_) ranking.Reorder();
}

// A hit is certain, but not before it comes back.
float PolicyImpl::ValueOfReturn(Conversation id) const {
  const double rest_s = static_cast<double>(HintsOf(id).return_ns - now_ns_) * 1e-9;
  return static_cast<float>(1 / std::max(rest_s, 1e-9) / tables_.MeanTokens(HazardTables::kNoTurn));
}

Conversation PolicyImpl::FirstOf(Tier tier) const {
  const Ranking& ranking = rankings_[static_cast<uint32_t>(tier)];
  const uint16_t position = ranking.FirstPosition();
  if (position == CellOrder::kUnused) return kNoConversation;
  const CellId cell = order_.cell_at[position];
  if (learns() && cell >= kIdleCell && !ranking.empty(kPromisedCell)) {
    const Conversation promised = ranking.First(kPromisedCell);
    if (ValueOfReturn(promised) < IndexOf(cell)) return promised;
  }
  return ranking.First(cell);
}

// It was the last victim, and is still of no more use than it was then.
bool PolicyImpl::IsLeaving(Tier tier, Conversation id) const {
  const auto i = static_cast<uint32_t>(tier);
  if (!options_.whole_conversation || id == kNoConversation || id != leaving_[i]) return false;
  const Record& record = records_[id];
  return (record.evictable >> i & 1) != 0 &&
         (record.place == Place::kOver || record.place == Place::kIdle ||
          record.place == Place::kPromised);
}

Conversation PolicyImpl::Victim(Tier tier) {
  Advance();
  Conversation& leaving = leaving_[static_cast<uint32_t>(tier)];
  if (!IsLeaving(tier, leaving)) leaving = FirstOf(tier);
  return leaving;
}

Conversation PolicyImpl::Victim(Tier tier, uint32_t tenant) {
  CA_CHECK(options_.by_tenant);
  Advance();
  const auto& of_tenant = of_tenants_[static_cast<uint32_t>(tier)];
  const auto first = of_tenant.lower_bound({tenant, 0, 0, 0});
  if (first == of_tenant.end() || std::get<0>(*first) != tenant) return kNoConversation;
  return std::get<3>(*first);
}

bool PolicyImpl::GoesBefore(Tier tier, Conversation a, Conversation b) {
  const Record &first = Live(a), &second = Live(b);
  Advance();
  // That a conversation has begun to leave does not count: what its copies give way to must stay
  // above them, or two conversations could take each other's places in turn for ever.
  if (a == b) return false;
  const CellId cell_a = CellOf(first, tier), cell_b = CellOf(second, tier);
  if (cell_a == cell_b) return std::pair(first.key, a) < std::pair(second.key, b);
  if (learns() && cell_a == kPromisedCell && cell_b >= kIdleCell) {
    return ValueOfReturn(a) < IndexOf(cell_b);
  }
  if (learns() && cell_b == kPromisedCell && cell_a >= kIdleCell) {
    return !(ValueOfReturn(b) < IndexOf(cell_a));
  }
  return order_.position_of[cell_a] < order_.position_of[cell_b];
}

}  // namespace cachedattn
