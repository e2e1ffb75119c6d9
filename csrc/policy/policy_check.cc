// What always holds in PolicyImpl.
#include "csrc/policy/policy_impl.h"

namespace cachedattn {

void PolicyImpl::CheckInvariants() const {
  uint64_t num_held = 0, num_named = 0, num_hinted = 0;
  uint32_t num_ghosts = 0;
  for (Conversation id = 0; id < records_.end(); ++id) {
    const Record& record = records_[id];
    if (!record.live) continue;
    CheckRecord(id);
    num_held += record.holders > 0;
    num_ghosts += record.ghost;
    num_named += record.name != 0;
    num_hinted += record.hinted;
  }
  CA_CHECK(num_held == num_held_ && num_named == names_.size());
  CA_CHECK(num_hinted == hints_.size());
  CA_CHECK(num_ghosts == num_ghosts_ && num_ghosts <= kMaxGhosts);
  uint32_t listed = 0;
  for (Conversation id = ghosts_.head; id != kNoConversation;
       id = records_[id].links[kGhostLink].next) {
    CA_CHECK(records_[id].ghost);
    ++listed;
  }
  CA_CHECK(listed == num_ghosts);
  for (const Conversation id : queue_) CA_CHECK(records_[id].queue_mark == queue_mark_);
  for (const auto& [due_ns, id] : timers_) {
    CA_CHECK(due_ns > now_ns_ && HintsOf(id).timer_ns == due_ns);
  }
  CheckRankings();
  CheckAges();
}

void PolicyImpl::CheckRecord(Conversation id) const {
  const Record& record = records_[id];
  CA_CHECK(record.ghost == (record.holders == 0));
  CA_CHECK(!record.ghost || (record.evictable == 0 && !record.busy() && record.name != 0));
  CA_CHECK(record.name == 0 || names_.Find(record.name, record.tenant) == id);
  CA_CHECK(record.hinted == (hints_.count(id) == 1));
  CA_CHECK(record.place == PlaceOf(id) && record.key == KeyOf(id));
  CA_CHECK(!record.over || HintsOf(id).over_ns <= now_ns_);
  CA_CHECK(!record.teaches || (learns() && !record.busy()));
  CA_CHECK(record.ageing == (learns() && !record.over));
  if (record.ageing) CA_CHECK(record.bin == HazardTables::BinOf(now_ns_ - record.idle_since_ns));
  if (!record.hinted) return;
  const Hints& hints = HintsOf(id);
  CA_CHECK(hints.timer_ns == kNever || timers_.count({hints.timer_ns, id}) == 1);
  CA_CHECK(hints.timer_ns <= hints.lease_end_ns && hints.timer_ns <= hints.lapse_ns);
}

// Every ranking has those members that it should, each in its cell.
void PolicyImpl::CheckRankings() const {
  for (uint32_t tier = 0; tier < kNumTiers; ++tier) {
    uint64_t expected = 0, found = 0;
    for (Conversation id = 0; id < records_.end(); ++id) {
      expected += records_[id].live && (records_[id].evictable >> tier & 1) != 0;
    }
    rankings_[tier].Check([&](Conversation id, CellId cell) {
      CA_CHECK((records_[id].evictable >> tier & 1) != 0);
      CA_CHECK(cell == CellOf(records_[id], static_cast<Tier>(tier)));
      CA_CHECK(!options_.by_tenant ||
               of_tenants_[tier].count(OfTenantAt(id, static_cast<Tier>(tier))) == 1);
      ++found;
    });
    CA_CHECK(found == expected);
    CA_CHECK(of_tenants_[tier].size() == (options_.by_tenant ? expected : 0));
  }
}

// The lists of ages are in order, and the tables count who teaches in them.
void PolicyImpl::CheckAges() const {
  if (!learns()) return;
  std::vector<uint32_t> teaching(HazardTables::kNumClasses * HazardTables::kNumBins);
  uint64_t expected = 0, found = 0;
  for (Conversation id = 0; id < records_.end(); ++id) expected += records_[id].ageing;
  for (uint32_t bin = 0; bin < HazardTables::kNumBins; ++bin) {
    int64_t last_ns = INT64_MIN;
    const AgeList& ages = ages_[bin];
    for (Conversation id = ages.list.head; id != kNoConversation;) {
      const Record& record = records_[id];
      CA_CHECK(record.ageing && record.bin == bin && record.idle_since_ns >= last_ns);
      last_ns = record.idle_since_ns;
      if (bin + 1 < HazardTables::kNumBins) {
        const int64_t due_ns = record.idle_since_ns + HazardTables::UpperEdge(bin);
        CA_CHECK(ages.due_ns <= due_ns && next_crossing_ns_ <= due_ns);
      }
      teaching[record.turn_class * HazardTables::kNumBins + bin] += record.teaches;
      ++found;
      id = record.links[kAgeLink].next;
    }
  }
  CA_CHECK(found == expected);
  for (const uint16_t turn_class : tables_.used()) {
    for (uint32_t bin = 0; bin < HazardTables::kNumBins; ++bin) {
      const uint32_t count = teaching[turn_class * HazardTables::kNumBins + bin];
      CA_CHECK(tables_.count(turn_class, bin) == count);
    }
  }
}

}  // namespace cachedattn
