// Hazard: how likely conversations are to come back, by what they are and for how long they have
// been idle, and what keeping a token of theirs is worth.
//
// A class is what the end of a turn told: how it ended, the turn's number, the gap before it, the
// sizes of prompt and answer beside the running geometric means of all. Ages are cut into bins
// whose edges grow by the square root of two. Of each class and bin the tables hold how many
// conversations came back at that age (events) and for how long any were idle at it (exposure),
// with what those that are idle now have spent in it so far: without these the conversations that
// never come back would not count. Events over exposure is the hazard. Where a class has seen
// little it takes after all classes of the same finish and turn number, and those after all.
//
// index(class, bin) is what storing one token of such a conversation brings, in hits a second: the
// best ratio, over all times to drop it at, of the chance that it is back by then to the time
// until it is back or dropped.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "csrc/policy/policy.h"

namespace cachedattn {

class HazardTables {
 public:
  static constexpr uint32_t kNumBins = 42;
  static constexpr uint32_t kNumGroups = 3 * 4;  // finish, turn number
  static constexpr uint32_t kNumClasses = kNumGroups * 4 * 4 * 3 + 1;
  static constexpr uint16_t kNoTurn = kNumClasses - 1;  // no turn of it is known to have ended
  static constexpr double kClassPrior = 8, kGroupPrior = 4, kAllPrior = 1;  // events
  static constexpr double kReturnsPerFold = 0.1;  // expected of nothing known: returns in an e-fold

  explicit HazardTables(bool per_token);

  // The last bin has no upper edge: what is returned for it only bounds how far is looked ahead.
  static int64_t LowerEdge(uint32_t bin) { return edges_ns()[bin]; }
  static int64_t UpperEdge(uint32_t bin) { return edges_ns()[bin + 1]; }
  static uint8_t BinOf(int64_t age_ns);
  static uint8_t GapOf(int64_t age_ns);  // never 0, which is: no gap

  // The class after a turn's end, which the means of sizes then hold.
  uint16_t ClassOf(const TurnEnd& turn, uint32_t turn_number, uint8_t gap);
  // The class is in use from now on. False: it was.
  bool Use(uint16_t turn_class);

  // One more, or one less, is at the age of a bin. `since_ns`: since when it is idle.
  void Enter(uint16_t turn_class, uint8_t bin, int64_t since_ns);
  // `at_ns` may lie beyond the bin: it was idle all the time until then.
  void Leave(uint16_t turn_class, uint8_t bin, int64_t since_ns, int64_t at_ns);
  void AddExposure(uint16_t turn_class, int64_t from_age_ns, int64_t to_age_ns);
  void AddEvent(uint16_t turn_class, uint8_t bin) { ++rows_[turn_class]->bins[bin].events; }

  void Recompute(int64_t now_ns);
  // Of the last Recompute.
  float index(uint16_t turn_class, uint32_t bin) const { return rows_[turn_class]->index[bin]; }
  // Classes in use, in the order they came up.
  const std::vector<uint16_t>& used() const { return used_; }
  // Mean tokens of a turn, prompt and answer; 1 unless asked for values per token.
  double MeanTokens(uint16_t turn_class) const;

  uint64_t events(uint16_t turn_class, uint32_t bin) const;
  double exposure_s(uint16_t turn_class, uint32_t bin, int64_t now_ns) const;
  uint32_t count(uint16_t turn_class, uint32_t bin) const;
  uint64_t bytes() const { return sizeof(*this) + used_.size() * sizeof(Row); }

 private:
  using Wide = __int128;  // ten million times a century of nanoseconds
  struct Bin {
    Wide exposure_ns = 0;  // of those that left
    Wide sum_since_ns = 0;
    uint64_t events = 0;
    uint64_t count = 0;  // that are at this age now
  };
  struct Row {
    std::array<Bin, kNumBins> bins;
    std::array<float, kNumBins> index{};
    uint64_t turns = 0;
    uint64_t tokens = 0;
    bool used = false;
  };
  // Of several classes taken together.
  struct Sums {
    std::array<double, kNumBins> events{};
    std::array<double, kNumBins> exposure_s{};
  };
  using Hazards = std::array<double, kNumBins>;  // a second

  static const std::array<int64_t, kNumBins + 1>& edges_ns();
  static Hazards Shrink(const Sums& seen, double prior_events, const Hazards& prior);
  Sums SumsOf(uint16_t turn_class, int64_t now_ns) const;
  static void SetIndex(const Hazards& hazards, Row* row);

  const bool per_token_;
  std::vector<std::unique_ptr<Row>> rows_;  // by class; null: not in use
  std::vector<uint16_t> used_;
  double sum_log_prompt_ = 0, sum_log_answer_ = 0;
  uint64_t turns_ = 0, tokens_ = 0;
};

}  // namespace cachedattn
