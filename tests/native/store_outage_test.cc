// A disk that hangs, fails or comes back, in a time that the tests move: nobody waits longer than
// the deadline, what the disk still holds is nobody else's, and the SSD tier goes and returns.
#include <unistd.h>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

constexpr int64_t kSecond = ManualClock::kSecond;

class StoreOutageTest : public ::testing::TestWithParam<bool> {
 protected:
  StoreOutageTest() { plan_.set_clock(&clock_); }
  // What is parked must not outlive the test's disk.
  ~StoreOutageTest() override {
    plan_.Release();
    for (int i = 0; i < 100'000 && FreeParkedStores() > 0; ++i) usleep(100);
  }

  Result<std::unique_ptr<AttentionStore>> TryOpen(uint32_t dram) {
    StoreOptions options = TinyOptions({dram, 32, GetParam() ? 24u : 0u}, dir_ / "kv");
    options.clock = &clock_;
    options.io_deadline_us = StoreOptions().io_deadline_us;
    SsdOptions ssd_options = SsdOptionsOf(options);
    ssd_options.io.wrap = plan_.Wrap();
    auto tier = SsdTier::Open(ssd_options);
    if (!tier.ok()) return tier.status();
    return OpenStoreOn(options, std::move(tier.value()), NewHostCopyEngine());
  }
  std::unique_ptr<AttentionStore> Open(uint32_t dram = 40) {
    auto store = TryOpen(dram);
    EXPECT_TRUE(store.ok()) << store.status().message();
    return std::move(store.value());
  }
  // A store whose only copies of `tokens_` are on SSD.
  std::unique_ptr<AttentionStore> OpenOnSsd(uint32_t dram = 40) {
    auto store = Open(dram);
    PlayTurn(store.get(), tokens_);
    Forget(store.get());
    return store;
  }
  static void Forget(AttentionStore* store) {
    store->Flush();
    store->DropTier(Tier::kDevice);
    store->DropTier(Tier::kDram);
  }
  // The disk of these tests is a real one.
  template <typename Done>
  static void PollUntil(AttentionStore* store, const Done& done) {
    for (int i = 0; i < 100'000 && !done(store->stats()); ++i) {
      store->Poll();
      usleep(100);
    }
    EXPECT_TRUE(done(store->stats()));
  }
  static uint32_t Used(const AttentionStore& store, Tier tier) {
    return store.stats().tiers[static_cast<int>(tier)].used_slots;
  }
  void Hold(IoOp op, uint32_t skip, uint32_t count) {
    plan_.Add({.op = op, .kind = FaultKind::kHold, .skip = skip, .count = count});
  }
  void Break(IoOp op, uint32_t count) {
    plan_.Add({.op = op, .kind = FaultKind::kError, .count = count, .error = EIO});
  }

  const Tokens tokens_ = MakeTokens(4 * kBlock + 3, 1);
  TempDir dir_;
  ManualClock clock_;
  FaultPlan plan_;
};
INSTANTIATE_TEST_SUITE_P(Cpu, StoreOutageTest, ::testing::Values(false));
INSTANTIATE_TEST_SUITE_P(Device, StoreOutageTest, ::testing::Values(true));

TEST_P(StoreOutageTest, ALateReadIsAMissAndKeepsItsSlot) {
  const auto store = OpenOnSsd();
  Hold(IoOp::kRead, 6, 1);  // the first layers have come; this is a higher one of the second block
  const int64_t before = clock_.NowNs();
  {
    Turn turn(store.get(), tokens_ + tokens_);
    ASSERT_TRUE(turn.Begin());
    EXPECT_EQ(turn.cached().total, tokens_.size());
    EXPECT_EQ(turn.Step(5).code(), Code::kIo);
    ASSERT_EQ(plan_.fired(), 1u);
    EXPECT_EQ(store->stats().late_ios, 1u);
    EXPECT_EQ(store->stats().quarantined_slots, 1u);
    store->CheckInvariants();
  }
  EXPECT_LE(clock_.NowNs() - before, 21 * kSecond / 10);
  // Nobody waits for it; its slot is not free, and all else goes on.
  Forget(store.get());
  EXPECT_EQ(Used(*store, Tier::kDram), 1u);
  EXPECT_LE(clock_.NowNs() - before, 21 * kSecond / 10);
  EXPECT_STREQ(store->stats().ssd_state, "on");
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_).total, kBlock)
      << "the second one is forgotten";
  Forget(store.get());
  EXPECT_EQ(Used(*store, Tier::kDram), 1u);
  plan_.Release();
  Forget(store.get());  // its bytes land now
  PollUntil(store.get(), [](const StoreStats& s) { return s.quarantined_slots == 0; });
  EXPECT_EQ(store->stats().quarantined_slots, 0u);
  EXPECT_EQ(Used(*store, Tier::kDram), 0u);
  store->CheckInvariants();
  EXPECT_TRUE(store->Close().ok());
}

TEST_P(StoreOutageTest, ALateWriteMaySucceedAfterAll) {
  const auto store = Open();
  Hold(IoOp::kWrite, 1, 1);
  PlayTurn(store.get(), tokens_);
  store->Flush();  // does not wait for it longer than the deadline
  ASSERT_EQ(plan_.fired(), 1u);
  EXPECT_EQ(store->stats().late_ios, 1u);
  EXPECT_EQ(store->stats().quarantined_slots, 1u);
  EXPECT_EQ(store->stats().failed_saves, 0u);
  Forget(store.get());
  EXPECT_EQ(Used(*store, Tier::kDram), 1u);
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_).total, tokens_.size()) << "DRAM has it";
  plan_.Release();
  PollUntil(store.get(), [](const StoreStats& s) { return s.quarantined_slots == 0; });
  Forget(store.get());
  EXPECT_EQ(Used(*store, Tier::kDram), 0u);
  Turn turn(store.get(), tokens_ + tokens_ + tokens_);
  ASSERT_TRUE(turn.Begin());
  EXPECT_EQ(turn.cached_from(Tier::kSsd), 2 * tokens_.size());
  turn.Finish();
  store->CheckInvariants();
}

TEST_P(StoreOutageTest, AFailingDiskIsSwitchedOffAndComesBack) {
  const auto store = OpenOnSsd();
  const Tokens other = MakeTokens(3 * kBlock, 2);
  Break(IoOp::kRead, 1000);
  {
    Turn turn(store.get(), tokens_ + tokens_);
    ASSERT_TRUE(turn.Begin());
    EXPECT_FALSE(turn.Step(5).ok());
  }
  store->Poll();
  ASSERT_GE(plan_.fired(), 5u);
  EXPECT_STREQ(store->stats().ssd_state, "off");
  EXPECT_EQ(store->stats().outages, 1u);
  EXPECT_NE(store->stats().ssd_report.find("5 failures"), std::string::npos)
      << store->stats().ssd_report;

  // From DRAM alone; what SSD holds is a miss, and nothing is asked of the disk.
  const uint32_t fired = plan_.fired();
  const uint64_t written = store->stats().ssd_bytes_written;
  EXPECT_EQ(PlayTurn(store.get(), other).total, 0u);
  EXPECT_EQ(PlayTurn(store.get(), other + tokens_).total, other.size());
  store->Flush();
  EXPECT_EQ(plan_.fired(), fired);
  EXPECT_EQ(store->stats().ssd_bytes_written, written);

  // A probe that fails changes nothing.
  clock_.Advance(30 * kSecond);
  const uint64_t errors = store->stats().io_errors;
  PollUntil(store.get(), [&](const StoreStats& s) { return s.io_errors > errors; });
  EXPECT_STREQ(store->stats().ssd_state, "off");

  plan_.Clear();
  clock_.Advance(30 * kSecond);
  PollUntil(store.get(), [](const StoreStats& s) { return s.ssd_state == std::string("on"); });
  EXPECT_STREQ(store->stats().ssd_state, "on");
  Forget(store.get());  // what came during the outage is written now
  EXPECT_EQ(Used(*store, Tier::kDram), 0u);
  EXPECT_EQ(PlayTurn(store.get(), other + tokens_ + tokens_).total, other.size() + tokens_.size());
  store->CheckInvariants();
  EXPECT_TRUE(store->Close().ok());
}

TEST_P(StoreOutageTest, WhatIsOnSsdIsFoundAgainAfterAnOutage) {
  const auto store = OpenOnSsd();
  Break(IoOp::kWrite, 5);
  PlayTurn(store.get(), MakeTokens(5 * kBlock, 2));
  store->Flush();
  ASSERT_EQ(plan_.fired(), 5u);
  EXPECT_STREQ(store->stats().ssd_state, "off");
  Turn during(store.get(), tokens_ + tokens_);
  EXPECT_EQ(store->Lookup(*during.chain()).total, 0u);
  // It is computed again meanwhile; the copies on SSD stay listed, and both are good.
  EXPECT_EQ(PlayTurn(store.get(), tokens_).total, 0u);
  store->Flush();
  EXPECT_EQ(store->Lookup(*during.chain()).total, tokens_.size());
  store->CheckInvariants();
  clock_.Advance(30 * kSecond);
  PollUntil(store.get(), [](const StoreStats& s) { return s.ssd_state == std::string("on"); });
  Forget(store.get());
  EXPECT_EQ(Used(*store, Tier::kDram), 0u);
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_).total, tokens_.size());
  EXPECT_EQ(PlayTurn(store.get(), MakeTokens(5 * kBlock + 1, 2)).total, 5 * kBlock)
      << "writes that failed are tried again";
}

TEST_P(StoreOutageTest, ManyLateReadsSwitchTheTierOff) {
  const auto store = OpenOnSsd(/*dram=*/16);
  Hold(IoOp::kRead, 3, 2);
  Turn turn(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(turn.Begin());
  EXPECT_FALSE(turn.Step(5).ok());
  ASSERT_EQ(plan_.fired(), 2u);
  EXPECT_EQ(store->stats().quarantined_slots, 2u);
  EXPECT_STREQ(store->stats().ssd_state, "off");
  EXPECT_NE(store->stats().ssd_report.find("2 of 16"), std::string::npos)
      << store->stats().ssd_report;
  turn.Drop();
  clock_.Advance(31 * kSecond);
  for (int i = 0; i < 100; ++i) {
    store->Poll();
    usleep(100);
  }
  EXPECT_STREQ(store->stats().ssd_state, "off") << "the disk answers, but still has the slots";
  plan_.Release();
  PollUntil(store.get(), [](const StoreStats& s) { return s.ssd_state == std::string("on"); });
  EXPECT_STREQ(store->stats().ssd_state, "on");
  store->CheckInvariants();
}

TEST_P(StoreOutageTest, ALateProbeIsAskedAgainWhenTheDiskAnswers) {
  const auto store = Open();
  Break(IoOp::kWrite, 5);
  PlayTurn(store.get(), MakeTokens(5 * kBlock, 2));
  store->Flush();
  ASSERT_EQ(plan_.fired(), 5u);
  Hold(IoOp::kWrite, 0, 1);
  clock_.Advance(30 * kSecond);
  store->Poll();
  ASSERT_EQ(plan_.fired(), 6u) << "the probe";
  clock_.Advance(3 * kSecond);
  store->Poll();
  EXPECT_EQ(store->stats().late_ios, 1u);
  clock_.Advance(1000 * kSecond);
  for (int i = 0; i < 10; ++i) store->Poll();
  EXPECT_STREQ(store->stats().ssd_state, "off");
  plan_.Release();
  PollUntil(store.get(), [](const StoreStats& s) { return s.ssd_state == std::string("on"); });
  EXPECT_STREQ(store->stats().ssd_state, "on");
}

TEST_P(StoreOutageTest, APlaceRestsAfterAFailedWrite) {
  const auto store = Open();
  Break(IoOp::kWrite, 1);
  PlayTurn(store.get(), MakeTokens(kBlock, 1));
  store->Flush();
  ASSERT_EQ(plan_.fired(), 1u);
  EXPECT_EQ(store->stats().resting_slots, 1u);
  EXPECT_EQ(Used(*store, Tier::kSsd), 1u);
  store->CheckInvariants();
  clock_.Advance(30 * kSecond);
  PlayTurn(store.get(), MakeTokens(kBlock, 2));
  store->Flush();
  EXPECT_EQ(store->stats().resting_slots, 0u);
  EXPECT_EQ(Used(*store, Tier::kSsd), 1u) << "that of the second block";
  store->CheckInvariants();
}

TEST_P(StoreOutageTest, CloseEndsOnADiskThatHangs) {
  auto store = Open();
  Hold(IoOp::kWrite, 0, 1000);
  PlayTurn(store.get(), tokens_);
  const int64_t before = clock_.NowNs();
  const Status status = store->Close();
  EXPECT_EQ(status.code(), Code::kIo) << status.message();
  EXPECT_LE(clock_.NowNs() - before, 5 * kSecond);
  ASSERT_GT(plan_.fired(), 0u);
  store.reset();
  EXPECT_EQ(FreeParkedStores(), 1u);
  EXPECT_EQ(TryOpen(40).status().code(), Code::kBusy) << "the disk may still write to the file";
  plan_.Release();
  plan_.Clear();
  while (FreeParkedStores() > 0) {
  }
  EXPECT_TRUE(TryOpen(40).ok());
}

TEST_P(StoreOutageTest, CloseEndsOnADiskThatHangsAtTheVeryEnd) {
  auto store = Open();
  PlayTurn(store.get(), tokens_);
  store->Flush();
  Hold(IoOp::kWrite, 0, 1);  // of the index
  EXPECT_EQ(store->Close().code(), Code::kIo);
  ASSERT_EQ(plan_.fired(), 1u);
  store.reset();
  EXPECT_EQ(FreeParkedStores(), 1u);
  plan_.Release();
  while (FreeParkedStores() > 0) {
  }
  EXPECT_EQ(PlayTurn(Open().get(), tokens_ + tokens_).total, tokens_.size());
}

TEST_P(StoreOutageTest, TheLastSequenceClosesAnAbandonedStore) {
  auto store = OpenOnSsd();
  Hold(IoOp::kRead, 2, 1000);
  Turn turn(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(turn.Begin());
  store.reset();
  turn.Drop();
  ASSERT_GT(plan_.fired(), 0u);
  EXPECT_EQ(FreeParkedStores(), 1u);
  plan_.Release();
  plan_.Clear();
  while (FreeParkedStores() > 0) {
  }
  EXPECT_EQ(PlayTurn(Open().get(), tokens_ + tokens_).total, tokens_.size());
}

TEST_P(StoreOutageTest, AFailedLayerCostsItsOwnSequenceTheStepAndNobodyElse) {
  const auto store = OpenOnSsd();
  PlayTurn(store.get(), MakeTokens(2 * kBlock, 8));
  // Each layer is a group of its own. The last one of the tail does not come in time.
  Hold(IoOp::kRead, 19, 1);
  Turn good(store.get(), MakeTokens(3 * kBlock, 9));
  Turn bad(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(good.Begin());
  ASSERT_TRUE(bad.Begin());
  // Both step together, layer by layer, as an engine's batch does.
  const uint32_t num_new = 5;
  ASSERT_TRUE(good.sequence()->Reserve(num_new).ok());
  ASSERT_TRUE(bad.sequence()->Reserve(num_new).ok());
  uint32_t failed_at = UINT32_MAX;
  for (uint32_t layer = 0; layer < store->layout().num_layers; ++layer) {
    ASSERT_TRUE(good.sequence()->WaitLayer(layer).ok());
    good.WriteLayer(layer, num_new);
    good.sequence()->LayerDone(layer, num_new);
    if (failed_at != UINT32_MAX) continue;
    if (!bad.sequence()->WaitLayer(layer).ok()) {
      failed_at = layer;
      continue;
    }
    bad.CheckLayer(layer, static_cast<uint32_t>(tokens_.size()));
    bad.WriteLayer(layer, num_new);
    bad.sequence()->LayerDone(layer, num_new);
  }
  ASSERT_EQ(plan_.fired(), 1u);
  EXPECT_EQ(failed_at, 3u) << "three layers had been used";
  good.sequence()->Append(std::span(good.tokens()).first(num_new));
  bad.Drop();
  store->CheckInvariants();
  good.Finish();  // checks every byte of what it computed
  EXPECT_EQ(PlayTurn(store.get(), good.tokens() + tokens_).total, good.tokens().size());
  // What it needs to compute again begins with the failed block.
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_).total, 4 * kBlock);
}

// A sequence may go at any moment of its loads, steps and saves.
TEST_P(StoreOutageTest, ATurnThatIsCancelledLeavesNothingBehind) {
  const auto store = OpenOnSsd();
  PlayTurn(store.get(), MakeTokens(5, 3));
  Forget(store.get());
  const uint32_t on_ssd = Used(*store, Tier::kSsd);
  uint32_t cancelled = 0;
  for (uint32_t stop = 0; stop < 16; ++stop) {
    SCOPED_TRACE("cancelled at moment " + std::to_string(stop));
    for (const bool held : {false, true}) {
      if (held) Hold(IoOp::kRead, stop, 2);
      Turn turn(store.get(), tokens_ + tokens_);
      ASSERT_TRUE(turn.Begin());
      const uint32_t layers = store->layout().num_layers, num_new = 2 * kBlock;
      ASSERT_TRUE(stop == 0 || turn.sequence()->Reserve(num_new).ok());
      for (uint32_t layer = 0; 1 + layer < std::min(stop, layers + 1); ++layer) {
        if (!turn.sequence()->WaitLayer(layer).ok()) break;
        turn.WriteLayer(layer, num_new);
        turn.sequence()->LayerDone(layer, num_new);
      }
      turn.Drop();
      ++cancelled;
      store->CheckInvariants();
      plan_.Release();
      plan_.Clear();
      PollUntil(store.get(), [](const StoreStats& s) { return s.quarantined_slots == 0; });
      Forget(store.get());
      EXPECT_EQ(Used(*store, Tier::kDram), 0u);
      EXPECT_EQ(Used(*store, Tier::kDevice), 0u);
      store->CheckInvariants();
      clock_.Advance(100 * kSecond);  // each for itself: no outage
      PollUntil(store.get(), [](const StoreStats& s) { return s.ssd_state == std::string("on"); });
      PlayTurn(store.get(), tokens_);  // what was lost
      Forget(store.get());
      EXPECT_EQ(Used(*store, Tier::kSsd), on_ssd);
    }
  }
  EXPECT_EQ(cancelled, 32u);
}

}  // namespace
}  // namespace cachedattn
