// Who goes first when a tier is full, what the waiting queue protects, and what it brings.
#include <unistd.h>

#include "csrc/store/conversations.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

class StorePolicyTest : public ::testing::Test {
 protected:
  std::unique_ptr<AttentionStore> Open(PolicyKind policy, const Sizes& sizes, double reserve = 0) {
    StoreOptions options = TinyOptions(sizes, dir_ / "kv");
    options.policy.kind = policy;
    options.dram_reserve = reserve;
    return MustOpenStore(options);
  }
  static uint32_t Cached(AttentionStore* store, const Tokens& tokens) {
    return store->Lookup(*ChainFor(store, tokens + MakeTokens(1, 999))).total;
  }
  static std::shared_ptr<Chain> ChainFor(AttentionStore* store, const Tokens& tokens) {
    auto chain = store->NewChain("t", {});
    chain->Append(tokens);
    return chain;
  }
  static const TierStats& Dram(const StoreStats& stats) {
    return stats.tiers[static_cast<int>(Tier::kDram)];
  }
  static const TierStats& Ssd(const StoreStats& stats) {
    return stats.tiers[static_cast<int>(Tier::kSsd)];
  }

  const Tokens a_ = MakeTokens(3 * kBlock, 1);
  const Tokens b_ = MakeTokens(3 * kBlock, 2);
  const Tokens c_ = MakeTokens(3 * kBlock, 3);
  TempDir dir_;
};

TEST_F(StorePolicyTest, LruDropsTheTailOfTheOldestTurn) {
  const auto store = Open(PolicyKind::kLru, {8, 0, 0});
  PlayTurn(store.get(), a_);
  PlayTurn(store.get(), b_);
  PlayTurn(store.get(), a_ + MakeTokens(kBlock, 4));  // touches a
  PlayTurn(store.get(), MakeTokens(2 * kBlock, 5));   // one slot is missing: b's tail
  EXPECT_EQ(Cached(store.get(), b_), 2 * kBlock);
  EXPECT_EQ(Cached(store.get(), a_), 3 * kBlock);
  PlayTurn(store.get(), c_);  // three more: the rest of b, then a's tail
  EXPECT_EQ(Cached(store.get(), b_), 0u);
  EXPECT_EQ(Cached(store.get(), a_), 3 * kBlock);
}

TEST_F(StorePolicyTest, FifoDropsTheTailOfTheOldestConversation) {
  const auto store = Open(PolicyKind::kFifo, {8, 0, 0});
  PlayTurn(store.get(), a_);
  PlayTurn(store.get(), b_);
  PlayTurn(store.get(), a_ + MakeTokens(kBlock, 4));  // does not make a younger
  PlayTurn(store.get(), MakeTokens(2 * kBlock, 5));
  EXPECT_EQ(Cached(store.get(), b_), 3 * kBlock);
  EXPECT_EQ(Cached(store.get(), a_ + MakeTokens(kBlock, 4)), 3 * kBlock);
  PlayTurn(store.get(), c_);
  EXPECT_EQ(Cached(store.get(), b_), 3 * kBlock);
  EXPECT_EQ(Cached(store.get(), a_), 0u);
}

TEST_F(StorePolicyTest, TheQueueProtectsAndGoesFromItsTail) {
  const auto store = Open(PolicyKind::kLookahead, {10, 0, 0});
  PlayTurn(store.get(), a_);
  PlayTurn(store.get(), b_);
  PlayTurn(store.get(), c_);
  const auto a = ChainFor(store.get(), a_ + MakeTokens(5, 7));
  const auto b = ChainFor(store.get(), b_ + MakeTokens(5, 7));
  const std::shared_ptr<Chain> waiting[] = {a, b};
  store->SetQueue(waiting);
  PlayTurn(store.get(), MakeTokens(3 * kBlock, 5));  // c goes, though it was used last
  EXPECT_EQ(Cached(store.get(), c_), kBlock);
  EXPECT_EQ(Cached(store.get(), a_), 3 * kBlock);
  EXPECT_EQ(Cached(store.get(), b_), 3 * kBlock);
  PlayTurn(store.get(), MakeTokens(6 * kBlock, 6));  // more than is unprotected: b's tail
  EXPECT_EQ(Cached(store.get(), c_), 0u);
  EXPECT_EQ(Cached(store.get(), b_), kBlock);
  EXPECT_EQ(Cached(store.get(), a_), 3 * kBlock);
  store->SetQueue({});
  PlayTurn(store.get(), MakeTokens(8 * kBlock, 8));  // nothing is protected any more
  EXPECT_EQ(Cached(store.get(), a_), 0u);
}

TEST_F(StorePolicyTest, TheQueueBringsBlocksToDramInItsOrder) {
  const auto store = Open(PolicyKind::kLookahead, {8, 32, 0}, 0.25);
  for (const Tokens* tokens : {&a_, &b_, &c_}) PlayTurn(store.get(), *tokens);
  store->DropTier(Tier::kDram);
  ASSERT_EQ(Dram(store->stats()).used_slots, 0u);
  const auto b = ChainFor(store.get(), b_ + MakeTokens(5, 7));
  const auto a = ChainFor(store.get(), a_ + MakeTokens(5, 7));
  const auto c = ChainFor(store.get(), c_ + MakeTokens(5, 7));
  const std::shared_ptr<Chain> waiting[] = {b, a, c};
  store->SetQueue(waiting);
  for (int i = 0; i < 100'000 && From(store->Lookup(*a), Tier::kDram) < 3 * kBlock; ++i) {
    store->Poll();
    usleep(100);
  }
  for (int i = 0; i < 20; ++i) store->Poll();
  EXPECT_EQ(From(store->Lookup(*b), Tier::kDram), 3 * kBlock);
  EXPECT_EQ(From(store->Lookup(*a), Tier::kDram), 3 * kBlock);
  EXPECT_EQ(From(store->Lookup(*c), Tier::kDram), 0u) << "two slots are the reserve";
  EXPECT_EQ(Dram(store->stats()).used_slots, 6u);
  store->CheckInvariants();
  Turn turn(store.get(), b_ + MakeTokens(5, 7));
  ASSERT_TRUE(turn.Begin());
  EXPECT_EQ(turn.cached_from(Tier::kDram), 3 * kBlock);
  turn.Finish();
}

TEST_F(StorePolicyTest, PrefetchDisplacesWhatRanksLower) {
  const auto store = Open(PolicyKind::kLookahead, {6, 32, 0});
  for (const Tokens* tokens : {&a_, &b_, &c_}) PlayTurn(store.get(), *tokens);
  store->Flush();
  const auto a = ChainFor(store.get(), a_ + MakeTokens(5, 7));
  ASSERT_EQ(From(store->Lookup(*a), Tier::kDram), 0u);
  ASSERT_EQ(Dram(store->stats()).used_slots, 6u);
  const std::shared_ptr<Chain> waiting[] = {a};
  store->SetQueue(waiting);
  for (int i = 0; i < 100'000 && From(store->Lookup(*a), Tier::kDram) < 3 * kBlock; ++i) {
    store->Poll();
    usleep(100);
  }
  EXPECT_EQ(From(store->Lookup(*a), Tier::kDram), 3 * kBlock);
  EXPECT_EQ(From(store->Lookup(*ChainFor(store.get(), c_ + c_)), Tier::kDram), 3 * kBlock);
}

TEST_F(StorePolicyTest, ARequestJoinsARunningPrefetch) {
  const auto store = Open(PolicyKind::kLookahead, {8, 32, 0});
  PlayTurn(store.get(), a_);
  store->DropTier(Tier::kDram);
  const auto a = ChainFor(store.get(), a_ + MakeTokens(5, 7));
  const std::shared_ptr<Chain> waiting[] = {a};
  const uint64_t before = store->stats().ssd_bytes_read;
  store->SetQueue(waiting);
  store->Poll();
  ASSERT_GT(store->stats().reads_in_flight, 0u);
  Turn turn(store.get(), a_ + MakeTokens(5, 7));
  ASSERT_TRUE(turn.Begin());
  turn.Finish();
  EXPECT_EQ(store->stats().ssd_bytes_read - before, 3 * store->layout().host_slot_bytes())
      << "each block was read once";
}

TEST_F(StorePolicyTest, TheReserveIsKeptAndNothingIsLost) {
  const auto store = Open(PolicyKind::kLru, {10, 64, 0}, 0.4);
  std::vector<Tokens> all;
  for (uint32_t i = 0; i < 8; ++i) {
    all.push_back(MakeTokens(3 * kBlock, 20 + i));
    PlayTurn(store.get(), all.back());
    store->Flush();
    store->Poll();
    EXPECT_LE(Dram(store->stats()).used_slots, 6u);
  }
  for (const Tokens& tokens : all) EXPECT_EQ(Cached(store.get(), tokens), 3 * kBlock);
}

TEST_F(StorePolicyTest, WhatWaitsIsGivenUpForTheLastHalfOfTheReserveAlone) {
  const auto store = Open(PolicyKind::kLookahead, {10, 64, 0}, 0.4);
  PlayTurn(store.get(), a_);
  PlayTurn(store.get(), b_);
  store->Flush();
  const auto a = ChainFor(store.get(), a_ + MakeTokens(5, 7));
  const auto b = ChainFor(store.get(), b_ + MakeTokens(5, 7));
  const std::shared_ptr<Chain> waiting[] = {a, b};
  store->SetQueue(waiting);
  Turn turn(store.get(), MakeTokens(3 * kBlock + 5, 8));  // takes from the four free slots
  ASSERT_TRUE(turn.Begin());
  ASSERT_TRUE(turn.Step(2 * kBlock).ok());
  store->Poll();
  EXPECT_EQ(From(store->Lookup(*b), Tier::kDram), 3 * kBlock);
  ASSERT_TRUE(turn.Step(kBlock).ok());
  store->Poll();
  EXPECT_EQ(From(store->Lookup(*b), Tier::kDram), 2 * kBlock);
  EXPECT_EQ(From(store->Lookup(*a), Tier::kDram), 3 * kBlock);
  turn.Finish();
}

TEST_F(StorePolicyTest, AllOfALongQueueIsProtected) {
  const auto store = Open(PolicyKind::kLookahead, {8, 0, 0});
  PlayTurn(store.get(), a_);
  std::vector<std::shared_ptr<Chain>> waiting;
  for (uint32_t i = 0; i < 100; ++i) {  // of these nothing is stored
    waiting.push_back(ChainFor(store.get(), MakeTokens(3 * kBlock, 100 + i)));
  }
  waiting.push_back(ChainFor(store.get(), a_ + MakeTokens(5, 7)));
  store->SetQueue(waiting);
  PlayTurn(store.get(), b_);
  PlayTurn(store.get(), c_);
  EXPECT_EQ(Cached(store.get(), a_), 3 * kBlock);
  EXPECT_EQ(Cached(store.get(), b_), 2 * kBlock);
}

TEST_F(StorePolicyTest, AFullSsdDropsTheLowestRank) {
  const auto store = Open(PolicyKind::kLru, {6, 7, 0});
  PlayTurn(store.get(), a_);
  PlayTurn(store.get(), b_);
  store->Flush();
  PlayTurn(store.get(), c_);
  store->Flush();
  EXPECT_EQ(Ssd(store->stats()).used_slots, 7u);
  EXPECT_EQ(store->stats().evictions[static_cast<int>(Tier::kSsd)], 2u);
  store->DropTier(Tier::kDram);
  EXPECT_EQ(Cached(store.get(), a_), kBlock);
  EXPECT_EQ(Cached(store.get(), b_), 3 * kBlock);
  EXPECT_EQ(Cached(store.get(), c_), 3 * kBlock);
}

TEST_F(StorePolicyTest, RankSurvivesReopening) {
  {
    const auto store = Open(PolicyKind::kLru, {8, 7, 0});
    PlayTurn(store.get(), a_);
    PlayTurn(store.get(), b_);
  }
  const auto store = Open(PolicyKind::kLru, {8, 7, 0});
  PlayTurn(store.get(), c_);
  store->Flush();
  EXPECT_EQ(Cached(store.get(), a_), kBlock);
  EXPECT_EQ(Cached(store.get(), b_), 3 * kBlock);
}

TEST(PrefetchWindowTest, FollowsTheMeanSize) {
  EXPECT_EQ(PrefetchWindow(1000, 100), 10u);
  EXPECT_EQ(PrefetchWindow(10, 100), 1u);
  EXPECT_EQ(PrefetchWindow(10, 0), 10u);
}

}  // namespace
}  // namespace cachedattn
