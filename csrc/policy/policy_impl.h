// PolicyImpl: the engine behind Policy. Tests open it to look at what it has learnt.
//
// A conversation is idle, waiting or in service, and may be both of the latter. Place says what of
// it counts for the order. Where it has a copy that may go it stands in the tier's ranking, in the
// cell of its place: Unseat before anything changes that the place, the cell or the key hangs on,
// Seat after.
//
// With kHazard all that are not over stand in a list for each bin of ages as well, in the order in
// which their last turns ended, and cross to the next one as time passes. A conversation that
// nobody holds any more stays a while as a ghost: in these lists, but in no tier.
#pragma once

#include <set>
#include <tuple>
#include <unordered_map>

#include "csrc/policy/hazard.h"
#include "csrc/policy/ranking.h"

namespace cachedattn {

class PolicyImpl final : public Policy {
 public:
  static constexpr uint32_t kMaxGhosts = 65536;
  // The order of idle ones is made anew after so many turns, or that share of all so far.
  static constexpr uint64_t kRecomputeTurns = 200, kRecomputeShare = 50;

  PolicyImpl(const PolicyOptions& options, const Clock* clock);

  const PolicyOptions& options() const override { return options_; }
  Conversation Hold(uint64_t name, uint32_t tenant) override;
  void Hold(Conversation id) override;
  void Release(Conversation id) override;
  void SetQueue(std::span<const Conversation> waiting) override;
  void Begin(Conversation id) override;
  void End(Conversation id, const TurnEnd* turn) override;
  void SetOver(Conversation id) override;
  void SetTimeToLive(Conversation id, int64_t ns) override;
  void SetLease(Conversation id, int64_t ns) override;
  void SetReturn(Conversation id, int64_t ns) override;
  void SetEvictable(Conversation id, Tier tier, bool evictable) override;
  Conversation Victim(Tier tier) override;
  Conversation Victim(Tier tier, uint32_t tenant) override;
  bool GoesBefore(Tier tier, Conversation a, Conversation b) override;
  uint64_t last_use(Conversation id) const override { return Live(id).used; }
  bool over(Conversation id) const override { return Live(id).over; }
  bool waiting(Conversation id) const override { return Live(id).waiting(); }
  void Restored(Conversation id) override;
  uint64_t num_conversations() const override { return num_held_; }
  uint64_t bytes() const override;
  void CheckInvariants() const override;

  // What has been learnt, for tests.
  const HazardTables& tables() const { return tables_; }
  const Record& record(Conversation id) const { return records_[id]; }
  uint32_t num_ghosts() const { return num_ghosts_; }

 private:
  static constexpr int64_t kNever = INT64_MAX;

  // Of the few that have any.
  struct Hints {
    int64_t time_to_live_ns = 0;
    int64_t over_ns = kNever;  // since when it is over
    int64_t lease_end_ns = kNever;
    int64_t return_ns = kNever;
    int64_t lapse_ns = kNever;  // of the promise to return
    int64_t timer_ns = kNever;  // when to look again, at the latest
    bool leased() const { return lease_end_ns != kNever; }
    bool promised() const { return return_ns != kNever; }
  };
  struct AgeList {
    RecordList list;
    int64_t due_ns = kNever;  // not before this is the oldest too old for it
  };
  // tenant, place, key, conversation
  using OfTenant = std::tuple<uint32_t, uint8_t, uint64_t, Conversation>;

  // Cells of a ranking. Idle conversations have one for each class and bin, or only one.
  static constexpr CellId kOverCell = 0, kDroppedCell = 1, kPromisedCell = 2, kWaitingCell = 3,
                          kLeasedCell = 4, kIdleCell = 5;

  bool learns() const { return options_.kind == PolicyKind::kHazard; }
  bool queue_protects() const {
    return options_.kind == PolicyKind::kHazard || options_.kind == PolicyKind::kLookahead;
  }
  static CellId IdleCell(uint16_t turn_class, uint32_t bin) {
    return static_cast<CellId>(kIdleCell + turn_class * HazardTables::kNumBins + bin);
  }
  float IndexOf(CellId cell) const {
    const uint32_t idle = cell - kIdleCell;
    return tables_.index(static_cast<uint16_t>(idle / HazardTables::kNumBins),
                         idle % HazardTables::kNumBins);
  }
  Record& Live(Conversation id);
  const Record& Live(Conversation id) const;

  // policy.cc
  void LetGo(Conversation id);
  void Free(Conversation id);

  // policy_order.cc
  Place PlaceOf(Conversation id) const;
  uint64_t KeyOf(Conversation id) const;
  CellId CellOf(const Record& record, Tier tier) const;
  OfTenant OfTenantAt(Conversation id, Tier tier) const;
  void Insert(Conversation id, Tier tier);
  void Erase(Conversation id, Tier tier);
  void Unseat(Conversation id);
  void Seat(Conversation id);
  void SetOrder();
  bool IsLeaving(Tier tier, Conversation id) const;
  Conversation FirstOf(Tier tier) const;
  float ValueOfReturn(Conversation id) const;

  // policy_hints.cc
  Hints& HintsOf(Conversation id);
  const Hints& HintsOf(Conversation id) const { return hints_.at(id); }
  void SetTimer(Conversation id);
  void FireTimers();
  void BecomeOver(Conversation id, int64_t at_ns);
  void TakeBackHints(Conversation id);
  void DropHints(Conversation id);

  // policy_learn.cc
  void Advance();
  void FetchDue() const;
  void Age();
  void Cross(Conversation id, uint8_t bin);
  void StopAgeing(Conversation id, int64_t at_ns);
  void StartIdle(Conversation id, bool teaches);
  void Return(Conversation id);
  void EndTurn(Conversation id, const TurnEnd& turn);
  void SetClass(Conversation id, uint16_t turn_class);
  void Recompute();

  // policy_check.cc
  void CheckRankings() const;
  void CheckAges() const;
  void CheckRecord(Conversation id) const;

  const PolicyOptions options_;
  const Clock* const clock_;
  int64_t now_ns_;
  uint64_t stamp_ = 0;
  Records records_;
  Names names_{&records_};
  uint64_t num_held_ = 0;
  CellOrder order_;
  std::vector<Ranking> rankings_;
  std::array<std::set<OfTenant>, kNumTiers> of_tenants_;
  // whole_conversation: who was the last victim.
  std::array<Conversation, kNumTiers> leaving_{kNoConversation, kNoConversation, kNoConversation};
  std::vector<Conversation> queue_;
  uint8_t queue_mark_ = 1;
  std::unordered_map<Conversation, Hints> hints_;
  std::set<std::pair<int64_t, Conversation>> timers_;
  HazardTables tables_;
  std::array<AgeList, HazardTables::kNumBins> ages_;
  int64_t next_crossing_ns_ = kNever;
  uint64_t num_turns_ = 0;        // that ended
  uint64_t next_recompute_ = 10;  // turns
  RecordList ghosts_;             // oldest first
  uint32_t num_ghosts_ = 0;
};

}  // namespace cachedattn
