// What the hazard tables learn from processes that are known.
#include "csrc/policy/hazard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "csrc/policy/policy_impl.h"
#include "tests/native/testing/manual_clock.h"

namespace cachedattn {
namespace {

constexpr int64_t kSecond = ManualClock::kSecond;
constexpr TurnEnd kTurn = {Finish::kEndOfTurn, 1000, 100};

int64_t Ns(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

TEST(HazardTest, BinsGrowByTheRootOfTwo) {
  EXPECT_EQ(HazardTables::BinOf(0), 0);
  EXPECT_EQ(HazardTables::BinOf(kSecond / 2 - 1), 0);
  EXPECT_EQ(HazardTables::BinOf(kSecond / 2), 1);
  EXPECT_EQ(HazardTables::BinOf(kSecond), 3);
  EXPECT_EQ(HazardTables::BinOf(INT64_MAX), HazardTables::kNumBins - 1);
  for (uint32_t bin = 0; bin < HazardTables::kNumBins; ++bin) {
    EXPECT_EQ(HazardTables::BinOf(HazardTables::LowerEdge(bin)), bin);
  }
}

TEST(HazardTest, ClassesAreRelativeToTheMeansSoFar) {
  HazardTables tables(false);
  const uint16_t middle = tables.ClassOf(kTurn, 1, 0);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(tables.ClassOf(kTurn, 1, 0), middle);
  EXPECT_EQ(tables.ClassOf({Finish::kEndOfTurn, 100, 100}, 1, 0), middle - 2 * 3);
  EXPECT_EQ(tables.ClassOf({Finish::kEndOfTurn, 10000, 100}, 1, 0), middle + 3);
  EXPECT_EQ(tables.ClassOf({Finish::kEndOfTurn, 1000, 10}, 1, 0), middle - 1);
  EXPECT_NE(tables.ClassOf({Finish::kToolCall, 1000, 100}, 1, 0), middle);
  EXPECT_LT(tables.ClassOf({Finish::kToolCall, UINT32_MAX, UINT32_MAX}, UINT32_MAX, 3),
            HazardTables::kNoTurn);
  EXPECT_LT(tables.ClassOf({Finish::kOther, 0, 0}, 1, 0), HazardTables::kNoTurn);
}

// A process of idle times, each of which ends in a return unless `draw` says so with infinity; all
// are seen for `seen_s`.
template <typename Draw>
uint16_t Learn(HazardTables* tables, int n, double seen_s, const Draw& draw) {
  uint16_t turn_class = 0;
  for (int i = 0; i < n; ++i) {
    turn_class = tables->ClassOf(kTurn, 1, 0);
    tables->Use(turn_class);
    const double back_s = draw();
    if (back_s < seen_s) {
      tables->AddExposure(turn_class, 0, Ns(back_s));
      tables->AddEvent(turn_class, HazardTables::BinOf(Ns(back_s)));
    } else {
      tables->Enter(turn_class, HazardTables::BinOf(Ns(seen_s)), 0);
      tables->AddExposure(turn_class, 0, HazardTables::LowerEdge(HazardTables::BinOf(Ns(seen_s))));
    }
  }
  tables->Recompute(Ns(seen_s));
  return turn_class;
}

TEST(HazardTest, AMemorylessReturnIsWorthItsRateAtAnyAge) {
  std::mt19937 random(1);
  std::exponential_distribution<double> back(1.0 / 60);
  HazardTables tables(false);
  const uint16_t turn_class = Learn(&tables, 200000, 1e9, [&] { return back(random); });
  for (uint32_t bin = 4; bin < 17; ++bin) {  // 1 to 100 s, beyond which few are seen
    EXPECT_NEAR(tables.index(turn_class, bin), 1.0 / 60, 0.1 / 60) << bin;
  }
}

TEST(HazardTest, ThoseThatNeverReturnMakeOldOnesWorthless) {
  std::mt19937 random(2);
  std::exponential_distribution<double> back(1.0 / 20);
  HazardTables tables(false);
  const uint16_t turn_class = Learn(&tables, 100000, 3600, [&] {
    return random() % 4 == 0 ? back(random) : INFINITY;  // three in four never
  });
  // After 1.7 s 23 in a hundred of those left are at work; after 100 s fewer than one.
  EXPECT_NEAR(tables.index(turn_class, 4), 0.234 / 20, 0.02 / 20);
  EXPECT_LT(tables.index(turn_class, 18), 0.02 / 20);
  for (uint32_t bin = 5; bin < 22; ++bin) {
    EXPECT_LT(tables.index(turn_class, bin), tables.index(turn_class, bin - 1) * 1.05) << bin;
  }
}

TEST(HazardTest, AFixedGapIsWorthMoreTheNearerItsEnd) {
  HazardTables tables(false);
  const uint16_t turn_class = Learn(&tables, 10000, 1e9, [] { return 100.0; });
  const uint8_t back = HazardTables::BinOf(100 * kSecond);
  for (uint32_t bin = 1; bin <= back; ++bin) {
    EXPECT_GT(tables.index(turn_class, bin), tables.index(turn_class, bin - 1));
  }
  // From 1 s on it is kept for about 99 s, for one sure hit.
  EXPECT_NEAR(tables.index(turn_class, 3), 1.0 / 99, 0.1 / 99);
}

TEST(HazardTest, WithoutEvidenceTheOldAreWorthLess) {
  HazardTables tables(false);
  tables.Use(HazardTables::kNoTurn);
  tables.Recompute(0);
  for (uint32_t bin = 1; bin < HazardTables::kNumBins; ++bin) {
    EXPECT_LT(tables.index(HazardTables::kNoTurn, bin),
              tables.index(HazardTables::kNoTurn, bin - 1));
  }
}

// Conversations of regular users: whoever was here last is the last to return.
TEST(HazardTest, WhereRecencyIsWrongTheOldestIsKept) {
  ManualClock clock;
  PolicyImpl policy({.kind = PolicyKind::kHazard}, &clock);
  std::vector<Conversation> all;
  for (int i = 0; i < 100; ++i) all.push_back(policy.Hold(i + 1, 0));
  for (int round = 0; round < 30; ++round) {
    for (const Conversation id : all) {
      policy.Begin(id);
      clock.Advance(kSecond);
      policy.End(id, &kTurn);
    }
  }
  for (const Conversation id : all) policy.SetEvictable(id, Tier::kDram, true);
  EXPECT_TRUE(policy.GoesBefore(Tier::kDram, all[90], all[5]));
  EXPECT_GE(policy.Victim(Tier::kDram), 85u);  // not one of those that come next
  policy.CheckInvariants();
}

}  // namespace
}  // namespace cachedattn
