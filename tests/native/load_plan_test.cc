// What is loaded and what is computed again, and the rates that this follows from.
#include "csrc/store/load_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "csrc/base/rate_meter.h"

namespace cachedattn {
namespace {

// One token after the other, in steps.
double ComputeTokens(const ComputeCost& cost, uint32_t window, uint32_t begin, uint32_t tokens,
                     uint32_t* in_step) {
  double seconds = 0;
  for (uint32_t i = 0; i < tokens; ++i) {
    if ((*in_step)++ % cost.step_tokens == 0) seconds += cost.step_s;
    seconds += cost.token_s + cost.pair_s * std::min(begin + i, window);
  }
  return seconds;
}

// Time to the first new token when the blocks from the first that is not ready up to `last` are
// computed again; all of them: with the new tokens, in the same steps.
double PlayedSeconds(const TurnLoad& turn, const ComputeCost& cost, uint32_t first, uint32_t last) {
  const auto num_blocks = static_cast<uint32_t>(turn.blocks.size());
  const uint32_t there = first * turn.block_size;
  uint32_t in_step = 0;
  if (last == num_blocks) {
    return ComputeTokens(cost, turn.window, there, turn.history - there + turn.new_tokens,
                         &in_step);
  }
  double loaded = 0;
  bool wait = false;
  for (uint32_t i = last; i < num_blocks; ++i) {
    loaded += turn.blocks[i].seconds;
    wait = wait || !turn.blocks[i].ready;
  }
  if (wait) loaded += turn.wait_s;
  double now = ComputeTokens(cost, turn.window, there, last * turn.block_size - there, &in_step);
  in_step = 0;  // a step does not go past what is computed again
  const uint32_t early = std::min(turn.new_tokens, cost.step_tokens);
  now += ComputeTokens(cost, turn.window, turn.context, early, &in_step);
  now = std::max(now, loaded);
  return now +
         ComputeTokens(cost, turn.window, turn.context + early, turn.new_tokens - early, &in_step);
}

class LoadPlanTest : public ::testing::Test {
 protected:
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }
  double Scale(double low, double high) { return low * std::pow(high / low, Below(1001) / 1000.0); }

  ComputeCost RandomCost() {
    return {.step_tokens = 1 + Below(200),
            .step_s = Below(3) == 0 ? 0 : Scale(1e-4, 1e-1),
            .token_s = Scale(1e-6, 1e-2),
            .pair_s = Below(3) == 0 ? 0 : Scale(1e-10, 1e-5)};
  }

  TurnLoad RandomTurn() {
    TurnLoad turn;
    turn.block_size = 1 + Below(40);
    turn.new_tokens = 1 + Below(300);
    turn.wait_s = Below(2) == 0 ? 0 : Scale(1e-4, 10);
    const uint32_t num_blocks = 1 + Below(20);
    const uint32_t ready = Below(2) == 0 ? 0 : Below(num_blocks);
    const double seconds = Scale(1e-5, 10);
    for (uint32_t i = 0; i < num_blocks; ++i) {
      const bool here = i < ready || Below(6) == 0;
      const bool coming = Below(6) == 0;
      turn.blocks.push_back({here, here || coming ? 0 : seconds * (1 + Below(2))});
    }
    turn.context = num_blocks * turn.block_size - Below(turn.block_size);
    turn.history = turn.context;
    if (Below(3) == 0) turn.window = turn.context + Below(100);
    if (turn.window != UINT32_MAX && Below(2) == 0) turn.history += 1 + Below(2 * turn.window);
    return turn;
  }

  const uint32_t seed_ = std::random_device()();
  std::mt19937 random_{seed_};
};

TEST_F(LoadPlanTest, NoOtherChoiceIsSooner) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  uint32_t loads = 0, splits = 0, recomputes = 0;
  for (int i = 0; i < 5000; ++i) {
    const TurnLoad turn = RandomTurn();
    const ComputeCost cost = RandomCost();
    const BlockRange again = BlocksToRecompute(turn, cost);
    const auto num_blocks = static_cast<uint32_t>(turn.blocks.size());
    const bool cut = turn.context < turn.history;
    uint32_t first = 0;
    while (!cut && first < num_blocks && turn.blocks[first].ready) ++first;
    if (first == num_blocks) {
      EXPECT_EQ(again.size(), 0u);
      continue;
    }
    ASSERT_EQ(again.first, first);
    ASSERT_LE(again.last, num_blocks);
    const double chosen = PlayedSeconds(turn, cost, first, again.last);
    for (uint32_t last = first; last <= num_blocks; ++last) {
      if (cut && last != first && last != num_blocks) continue;
      const double other = PlayedSeconds(turn, cost, first, last);
      ASSERT_LE(chosen, other * (1 + 1e-9)) << "blocks " << again.last << " or " << last;
    }
    ASSERT_TRUE(!cut || again.size() == 0 || again.last == num_blocks);
    ++(again.size() == 0 ? loads : again.last == num_blocks ? recomputes : splits);
  }
  for (const uint32_t count : {loads, splits, recomputes}) EXPECT_GT(count, 200u);
}

TEST_F(LoadPlanTest, WhatIsNotKnownIsLoaded) {
  TurnLoad turn = RandomTurn();
  EXPECT_EQ(BlocksToRecompute(turn, {}).size(), 0u);
}

TEST_F(LoadPlanTest, LoadsWhereBothTakeAsLong) {
  TurnLoad turn{.block_size = 16, .history = 32, .context = 32, .new_tokens = 16};
  turn.blocks = {{false, 0.5}, {false, 0.5}};
  const ComputeCost cost{.step_tokens = 16, .step_s = 1.0};  // under which all is loaded
  EXPECT_EQ(BlocksToRecompute(turn, cost).size(), 0u);
}

TEST_F(LoadPlanTest, CostsAreChecked) {
  EXPECT_TRUE(RandomCost().Validate().ok());
  EXPECT_EQ((ComputeCost{.step_tokens = 1, .token_s = -1}).Validate().code(),
            Code::kInvalidArgument);
  EXPECT_EQ((ComputeCost{.step_tokens = 1, .pair_s = NAN}).Validate().code(),
            Code::kInvalidArgument);
}

constexpr int64_t kMs = 1'000'000;

TEST(RateMeterTest, IsTheRateOfADeviceThatHasWorkAtEveryLook) {
  RateMeter meter;
  meter.Begin(0);
  EXPECT_EQ(meter.rate(0), 0);
  for (int i = 1; i <= 10; ++i) meter.Look(100 * i * kMs, 100 * i * kMs, 1'000'000, false);
  EXPECT_NEAR(meter.rate(1000 * kMs), 1e7, 1);
  // What it was long ago counts little, time without work not at all.
  meter.Look(1100 * kMs, 1100 * kMs, 1'000'000, true);
  meter.Begin(9000 * kMs);
  for (int i = 1; i <= 50; ++i) {
    meter.Look((9000 + 100 * i) * kMs, (9000 + 100 * i) * kMs, 100'000, false);
  }
  EXPECT_NEAR(meter.rate(15'000 * kMs), 1e6, 1e5);
  EXPECT_EQ(meter.rate(15'000 * kMs + 100'000 * kMs), 0);
}

// Nobody looked while it worked: when it ended is not known.
TEST(RateMeterTest, AnEndThatNobodySawIsNoSlowness) {
  RateMeter meter;
  meter.Begin(0);
  meter.Look(1000 * kMs, 1000 * kMs, 1000, true);
  EXPECT_EQ(meter.rate(1000 * kMs), 0);
  meter.Begin(2000 * kMs);  // seen to work at 2100, and waited for from then on
  meter.Look(2100 * kMs, 2100 * kMs, 0, false);
  meter.Look(2101 * kMs, 2200 * kMs, 1'000'000, true);
  EXPECT_NEAR(meter.rate(2200 * kMs), 5e6, 1);
  meter.Begin(3000 * kMs);
  meter.Look(4000 * kMs, 4000 * kMs, 1'000'000, true);
  EXPECT_NEAR(meter.rate(4000 * kMs), 5e6, 1);
  meter.Begin(5000 * kMs);  // but it is at least as fast as this
  meter.Look(6000 * kMs, 6000 * kMs, 20'000'000, true);
  EXPECT_GT(meter.rate(6000 * kMs), 1e7);
}

}  // namespace
}  // namespace cachedattn
