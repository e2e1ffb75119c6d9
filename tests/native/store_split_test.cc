// A history of which a part is computed again while the rest is loaded.
#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

constexpr double kReadLimit = 2e6;  // bytes a second: a block takes 10 ms

class StoreSplitTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    StoreOptions options = TinyOptions({40, 40, GetParam() ? 40u : 0u}, dir_ / "kv");
    options.io_deadline_us = 60'000'000;
    SsdOptions ssd_options = SsdOptionsOf(options);
    ssd_options.io.read_bytes_per_s = static_cast<uint64_t>(kReadLimit);
    ssd_options.io.wrap = plan_.Wrap();
    auto tier = SsdTier::Open(ssd_options);
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    auto store = OpenStoreOn(options, std::move(tier.value()), NewHostCopyEngine());
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(store.value());
    // Reading the history once tells how fast the disk is.
    PlayTurn(store_.get(), history_);
    LeaveOnSsd();
    PlayTurn(store_.get(), history_);
    LeaveOnSsd();
  }

  void LeaveOnSsd() {
    store_->Flush();
    store_->DropTier(Tier::kDevice);
    store_->DropTier(Tier::kDram);
  }

  // Computing a block takes `blocks` times as long as loading it.
  ComputeCost Cost(double blocks) const {
    const double block_s = TinyLayout().payload_bytes() / store_->stats().ssd_read_rate;
    return {.step_tokens = kBlock, .token_s = blocks * block_s / kBlock};
  }

  static constexpr uint32_t kHistory = 8 * kBlock + 5;
  const Tokens history_ = MakeTokens(kHistory, 1);
  const Tokens prompt_ = history_ + MakeTokens(7, 2);
  TempDir dir_;
  FaultPlan plan_;
  std::unique_ptr<AttentionStore> store_;
};
INSTANTIATE_TEST_SUITE_P(Cpu, StoreSplitTest, ::testing::Values(false));
INSTANTIATE_TEST_SUITE_P(Device, StoreSplitTest, ::testing::Values(true));

TEST_P(StoreSplitTest, TheRateIsThatOfTheDisk) {
  EXPECT_GT(store_->stats().ssd_read_rate, kReadLimit / 4);
  EXPECT_LT(store_->stats().ssd_read_rate, kReadLimit * 1.1);
}

TEST_P(StoreSplitTest, APrefixIsComputedWhileTheRestIsLoaded) {
  const uint64_t written = store_->stats().ssd_bytes_written;
  const uint64_t failed = store_->stats().failed_loads;
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold, .count = 1000});
  Turn turn(store_.get(), prompt_);
  ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(1)).ok());
  const CachedTokens cached = turn.cached();
  EXPECT_GT(cached.recomputed, 2 * kBlock);
  EXPECT_LT(cached.recomputed, 6 * kBlock);
  EXPECT_EQ(cached.recomputed % kBlock, 0u);
  EXPECT_EQ(cached.total, kHistory - cached.recomputed);
  EXPECT_EQ(turn.cached_from(Tier::kSsd), cached.total);
  EXPECT_EQ(turn.sequence()->context_len(), 0u);
  EXPECT_EQ(turn.sequence()->room(), cached.recomputed);
  EXPECT_EQ(turn.sequence()->block_table().size(), 9u);
  store_->CheckInvariants();
  // The first step needs none of what is loaded.
  ASSERT_TRUE(turn.Step(10).ok());
  EXPECT_TRUE(turn.sequence()->loading());
  EXPECT_EQ(turn.sequence()->num_computed_tokens(), 10u);
  plan_.Clear();
  plan_.Release();
  while (turn.sequence()->num_computed_tokens() < cached.recomputed) {
    ASSERT_TRUE(turn.Step(10).ok());
    store_->CheckInvariants();
  }
  EXPECT_EQ(turn.sequence()->num_computed_tokens(), kHistory);
  EXPECT_EQ(turn.sequence()->context_len(), kHistory);
  turn.Finish();

  const StoreStats stats = store_->stats();
  EXPECT_EQ(stats.tokens_recomputed, cached.recomputed);
  EXPECT_EQ(stats.failed_loads, failed);
  LeaveOnSsd();
  // Only the longer tail is new to the disk.
  EXPECT_EQ(store_->stats().ssd_bytes_written - written, TinyLayout().host_slot_bytes());
  EXPECT_EQ(From(PlayTurn(store_.get(), prompt_ + history_), Tier::kSsd), prompt_.size());
}

TEST_P(StoreSplitTest, WhatIsThereComesFirst) {
  PlayTurn(store_.get(), Tokens(history_.begin(), history_.begin() + 3 * kBlock + 1));
  Turn turn(store_.get(), prompt_);
  ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(1)).ok());
  EXPECT_EQ(turn.sequence()->num_computed_tokens(), 3 * kBlock);
  EXPECT_GT(turn.cached().recomputed, kBlock);
  EXPECT_LT(turn.cached().recomputed, 5 * kBlock);
  EXPECT_EQ(turn.cached_from(GetParam() ? Tier::kDevice : Tier::kDram), 3 * kBlock);
  turn.Finish();
  store_->CheckInvariants();
}

TEST_P(StoreSplitTest, AllIsComputedWhereThatIsSooner) {
  Turn turn(store_.get(), prompt_);
  const uint64_t read = store_->stats().ssd_bytes_read;
  ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(0.001)).ok());
  EXPECT_EQ(turn.cached().recomputed, kHistory);
  EXPECT_EQ(turn.cached().total, 0u);
  EXPECT_TRUE(turn.sequence()->block_table().empty());
  turn.Finish();
  store_->CheckInvariants();
  EXPECT_EQ(store_->stats().ssd_bytes_read, read);
}

TEST_P(StoreSplitTest, AllIsLoadedWhereThatIsSooner) {
  Turn turn(store_.get(), prompt_);
  ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(1000)).ok());
  EXPECT_EQ(turn.cached().recomputed, 0u);
  EXPECT_EQ(turn.cached_from(Tier::kSsd), kHistory);
  turn.Finish();
  EXPECT_EQ(store_->stats().tokens_recomputed, 0u);
}

TEST_P(StoreSplitTest, AFailedLoadIsAMissThatKeepsWhatWasComputed) {
  {
    Turn turn(store_.get(), prompt_);
    plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold, .count = 1000});
    ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(1)).ok());
    ASSERT_TRUE(turn.Step(2 * kBlock).ok());
    plan_.Clear();  // of more than 16 reads, the last ones are still to start
    plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError, .count = 1000});
    plan_.Release();
    Status status;
    while (status.ok() && !turn.finished()) status = turn.Step(kBlock);
    EXPECT_EQ(status.code(), Code::kIo);
    store_->CheckInvariants();
  }
  plan_.Clear();
  const CachedTokens cached = PlayTurn(store_.get(), prompt_);
  EXPECT_GE(From(cached, GetParam() ? Tier::kDevice : Tier::kDram), 2 * kBlock);
  EXPECT_LT(cached.total, kHistory);
}

TEST_P(StoreSplitTest, ATurnThatEndsWhileItsHistoryIsComputedLeavesNothing) {
  for (const uint32_t steps : {0u, 1u, 2u}) {
    Turn turn(store_.get(), prompt_);
    ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(1)).ok());
    for (uint32_t i = 0; i < steps; ++i) ASSERT_TRUE(turn.Step(10).ok());
    turn.Drop();
    store_->CheckInvariants();
  }
  LeaveOnSsd();
  EXPECT_EQ(store_->stats().tiers[static_cast<int>(Tier::kDram)].used_slots, 0u);
}

// A context that a cut has shortened is loaded, or all of its tokens are computed.
TEST_P(StoreSplitTest, AfterACutItIsAllOrNothing) {
  const Truncation truncation{.window = 6 * kBlock, .ratio = 0.5, .keep_first = 4};
  PlayTurn(store_.get(), history_, truncation);
  LeaveOnSsd();
  for (const double blocks : {0.8, 0.001}) {
    Turn turn(store_.get(), prompt_, truncation);
    ASSERT_TRUE(turn.Player::Begin(UINT32_MAX, Cost(blocks)).ok());
    EXPECT_EQ(turn.cached().recomputed, blocks < 0.1 ? kHistory : 0);
    if (blocks < 0.1) turn.Finish();
  }
}

TEST_P(StoreSplitTest, AWrongCostIsRefused) {
  Turn turn(store_.get(), prompt_);
  const ComputeCost cost{.step_tokens = 1, .step_s = -1};
  EXPECT_EQ(turn.Player::Begin(UINT32_MAX, cost).code(), Code::kInvalidArgument);
}

TEST(ReadLimitTest, ALimitThatTheDeadlineCannotHoldIsRefused) {
  TempDir dir;
  StoreOptions options = TinyOptions({16, 16, 0}, dir / "kv");
  options.io_deadline_us = 2'000'000;
  options.ssd_read_limit = 1'000'000;
  const auto store = AttentionStore::Open(options);
  ASSERT_FALSE(store.ok());
  EXPECT_EQ(store.status().code(), Code::kInvalidArgument);
  EXPECT_NE(store.status().message().find("ssd_read_limit"), std::string::npos);
  options.io_deadline_us = 60'000'000;
  MustOpenStore(options);
}

}  // namespace
}  // namespace cachedattn
