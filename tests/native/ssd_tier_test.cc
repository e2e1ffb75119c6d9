// The SSD tier's work: blocks in, blocks out, the index after a restart, faults of the disk.
#include "csrc/tier/ssd_tier.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

class SsdTierTest : public ::testing::TestWithParam<IoKind> {
 protected:
  void SetUp() override {
    options_ = SmallStore(dir_ / "kv");
    options_.io.kind = GetParam();
    Open();
  }
  void Open() {
    tier_.reset();
    Result<std::unique_ptr<SsdTier>> tier = SsdTier::Open(options_);
    if (!tier.ok() && GetParam() == IoKind::kUring) GTEST_SKIP() << tier.status().message();
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    tier_ = std::move(tier.value());
  }
  // Opens the store with `plan_` around its engine.
  void OpenFaulty() {
    options_.io.wrap = plan_.Wrap();
    Open();
  }
  std::vector<ScannedBlock> Scan() {
    Result<std::vector<ScannedBlock>> blocks = tier_->Scan({});
    EXPECT_TRUE(blocks.ok());
    return std::move(blocks.value());
  }

  TempDir dir_;
  SsdOptions options_;
  FaultPlan plan_;
  std::unique_ptr<SsdTier> tier_;
};

TEST_P(SsdTierTest, RoundTripInOnePiece) {
  EXPECT_EQ(tier_->num_slots(), 8u);
  ASSERT_TRUE(WriteBlock(tier_.get(), 5, 1).ok());
  EXPECT_TRUE(ReadBlock(tier_.get(), 5, 1).ok());
  EXPECT_EQ(tier_->bytes_written(), options_.layout.host_slot_bytes());
  EXPECT_EQ(tier_->bytes_read(), options_.layout.host_slot_bytes());
  EXPECT_EQ(tier_->checksum_failures(), 0u);
}

TEST_P(SsdTierTest, LayersLandOneByOne) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  HostSlot host, expected;
  expected.Fill(SmallLayout(), 1);
  for (uint32_t layer = 0; layer < 3; ++layer) {
    tier_->StartRead(0, HeaderOfBlock(1), layer, 1, host.data(), 10 + layer);
  }
  EXPECT_EQ(tier_->in_flight(), 3u);
  std::vector<SsdCompletion> finished = Drain(tier_.get());
  ASSERT_EQ(finished.size(), 3u);
  for (const SsdCompletion& completion : finished) {
    EXPECT_TRUE(completion.status.ok()) << completion.status.message();
  }
  EXPECT_TRUE(host.SamePayload(expected));
}

// A group that starts long after the first one uses the header that is in the host slot.
TEST_P(SsdTierTest, ALaterGroupFindsItsHeader) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  HostSlot host;
  tier_->StartRead(0, HeaderOfBlock(1), 0, 1, host.data(), 1);
  EXPECT_TRUE(Drain(tier_.get()).at(0).status.ok());
  tier_->StartRead(0, HeaderOfBlock(1), 1, 2, host.data(), 2);
  EXPECT_TRUE(Drain(tier_.get()).at(0).status.ok());
}

TEST_P(SsdTierTest, AGroupThatOvertakesTheHeaderWaitsForIt) {
  OpenFaulty();
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  HostSlot host, expected;
  expected.Fill(SmallLayout(), 1);
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold});
  tier_->StartRead(0, HeaderOfBlock(1), 0, 1, host.data(), 1);
  tier_->StartRead(0, HeaderOfBlock(1), 1, 2, host.data(), 2);
  ASSERT_EQ(plan_.fired(), 1u);
  std::vector<SsdCompletion> finished;
  while (tier_->bytes_read() < 2 * SmallLayout().slice_stride()) tier_->Poll(&finished, 100'000);
  EXPECT_TRUE(finished.empty()) << "layers 1 and 2 are not verified yet";
  EXPECT_EQ(tier_->in_flight(), 2u);
  plan_.Release();
  finished = Drain(tier_.get());
  ASSERT_EQ(finished.size(), 2u);
  EXPECT_TRUE(finished[0].status.ok() && finished[1].status.ok());
  EXPECT_TRUE(host.SamePayload(expected));
}

TEST_P(SsdTierTest, ScanAfterReopen) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 6, 11, 1).ok());
  ASSERT_TRUE(WriteBlock(tier_.get(), 2, 12, 2).ok());
  StoreCounters counters;
  counters.turns = 3;
  counters.tokens_requested = 100;
  counters.tokens_from_device = 1;
  counters.tokens_from_dram = 2;
  counters.tokens_from_ssd = 4;
  ASSERT_TRUE(tier_
                  ->Sync(counters, std::vector<ScannedBlock>{{6, HeaderOfBlock(11, 1)},
                                                             {2, HeaderOfBlock(12, 2)}})
                  .ok());
  Open();
  EXPECT_EQ(tier_->counters().turns, 3u);
  EXPECT_EQ(tier_->counters().tokens_requested, 100u);
  EXPECT_EQ(tier_->counters().tokens_from_device, 1u);
  EXPECT_EQ(tier_->counters().tokens_from_dram, 2u);
  EXPECT_EQ(tier_->counters().tokens_from_ssd, 4u);
  uint64_t last_done = 0, last_total = 0;
  Result<std::vector<ScannedBlock>> blocks = tier_->Scan([&](uint64_t done, uint64_t total) {
    EXPECT_GT(done, last_done);
    last_done = done;
    last_total = total;
  });
  EXPECT_EQ(last_done, 8u);
  EXPECT_EQ(last_total, 8u);
  ASSERT_EQ(blocks.value().size(), 2u);
  EXPECT_EQ(blocks.value()[0].slot, 2u);
  EXPECT_TRUE(blocks.value()[0].header == HeaderOfBlock(12, 2));
  EXPECT_EQ(blocks.value()[1].slot, 6u);
  EXPECT_TRUE(blocks.value()[1].header == HeaderOfBlock(11, 1));
  EXPECT_TRUE(ReadBlock(tier_.get(), 2, 12, 2).ok());
  EXPECT_TRUE(ReadBlock(tier_.get(), 6, 11, 1).ok());
}

TEST_P(SsdTierTest, TheNewerOfTwoSlotsWithOneKeyWins) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 1, 7, 5).ok());
  ASSERT_TRUE(WriteBlock(tier_.get(), 3, 7, 9).ok());
  ASSERT_TRUE(WriteBlock(tier_.get(), 4, 7, 8).ok());
  const std::vector<ScannedBlock> blocks = Scan();
  ASSERT_EQ(blocks.size(), 1u);
  EXPECT_EQ(blocks[0].slot, 3u);
}

TEST_P(SsdTierTest, TakesTwiceItsDepth) {
  HostSlot host[8];
  const uint32_t most = 2 * options_.io.depth;  // the engine checks that it gets half of them
  for (uint32_t i = 0; i < most; ++i) {
    ASSERT_TRUE(tier_->can_submit());
    host[i].Fill(SmallLayout(), i);
    tier_->StartWrite(i, HeaderOfBlock(i), false, host[i].data(), i);
  }
  EXPECT_FALSE(tier_->can_submit());
  EXPECT_EQ(tier_->in_flight(), most);
  const std::vector<SsdCompletion> finished = Drain(tier_.get());
  EXPECT_EQ(finished.size(), most);
  EXPECT_TRUE(tier_->can_submit());
  for (uint32_t i = 0; i < most; ++i) EXPECT_TRUE(ReadBlock(tier_.get(), i, i).ok());
}

TEST_P(SsdTierTest, AReadErrorIsReadAgainOnce) {
  OpenFaulty();
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  for (FaultKind kind : {FaultKind::kError, FaultKind::kShort, FaultKind::kFlip}) {
    const uint64_t failures = tier_->checksum_failures();
    const uint32_t fired = plan_.fired();
    plan_.Add({.op = IoOp::kRead, .kind = kind, .flip_byte = kPage + 5});
    EXPECT_TRUE(ReadBlock(tier_.get(), 0, 1).ok());
    EXPECT_EQ(plan_.fired(), fired + 1);
    EXPECT_EQ(tier_->checksum_failures(), failures + (kind == FaultKind::kFlip ? 1 : 0));
  }
}

TEST_P(SsdTierTest, ALastingReadErrorIsAResult) {
  OpenFaulty();
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  const auto fails_as = [&](FaultKind kind, uint64_t flip_byte, Code code, const char* text) {
    const uint32_t fired = plan_.fired();
    plan_.Add({.op = IoOp::kRead, .kind = kind, .count = 2, .flip_byte = flip_byte});
    const Status status = ReadBlock(tier_.get(), 0, 1);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
    EXPECT_EQ(plan_.fired(), fired + 2);
    EXPECT_EQ(tier_->in_flight(), 0u);
  };
  fails_as(FaultKind::kError, 0, Code::kIo, "Input/output error");
  fails_as(FaultKind::kShort, 0, Code::kIo, "moved 8192 of 16384");
  fails_as(FaultKind::kFlip, 0, Code::kCorrupt, "no block header");
  fails_as(FaultKind::kFlip, 20, Code::kCorrupt, "header's checksum");
  fails_as(FaultKind::kFlip, kPage + 1, Code::kCorrupt, "checksum of layer 0");
  fails_as(FaultKind::kFlip, 3 * kPage, Code::kCorrupt, "checksum of layer 2");
  EXPECT_TRUE(ReadBlock(tier_.get(), 0, 1).ok()) << "the faults are over";
}

// The first group fails for good: the others must not be vouched for by what it left behind.
TEST_P(SsdTierTest, WithoutAHeaderNoLayerIsVerified) {
  OpenFaulty();
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  HostSlot host;
  tier_->StartRead(0, HeaderOfBlock(1), 0, 3, host.data(), 1);
  ASSERT_TRUE(Drain(tier_.get()).at(0).status.ok());  // a whole header is in the host slot now
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold});
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError, .skip = 1});
  tier_->StartRead(0, HeaderOfBlock(1, 2), 0, 1, host.data(), 1);  // another generation: corrupt
  tier_->StartRead(0, HeaderOfBlock(1, 2), 1, 2, host.data(), 2);
  plan_.Release();
  std::vector<SsdCompletion> finished = Drain(tier_.get());
  ASSERT_EQ(finished.size(), 2u);
  for (const SsdCompletion& completion : finished) EXPECT_FALSE(completion.status.ok());
  EXPECT_EQ(plan_.fired(), 2u);
  tier_->StartRead(0, HeaderOfBlock(1), 2, 1, host.data(), 3);
  EXPECT_EQ(Drain(tier_.get()).at(0).status.code(), Code::kCorrupt);
}

TEST_P(SsdTierTest, AWriteErrorIsAResult) {
  OpenFaulty();
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .error = ENOSPC});
  EXPECT_EQ(WriteBlock(tier_.get(), 0, 1).code(), Code::kIo);
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kShort});
  EXPECT_EQ(WriteBlock(tier_.get(), 0, 1).code(), Code::kIo);
  EXPECT_EQ(plan_.fired(), 2u);
  EXPECT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
}

TEST_P(SsdTierTest, AWrongWriteIsFoundWhenRead) {
  OpenFaulty();
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kFlip, .flip_byte = 2 * kPage + 77});
  ASSERT_TRUE(WriteBlock(tier_.get(), 0, 1).ok());
  ASSERT_EQ(plan_.fired(), 1u);
  EXPECT_EQ(ReadBlock(tier_.get(), 0, 1).code(), Code::kCorrupt);
  EXPECT_EQ(tier_->checksum_failures(), 2u);
}

TEST_P(SsdTierTest, ScanLeavesOutWhatItCannotRead) {
  OpenFaulty();
  for (uint32_t slot = 0; slot < 3; ++slot) ASSERT_TRUE(WriteBlock(tier_.get(), slot, slot).ok());
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError});
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kFlip, .flip_byte = 16});
  const std::vector<ScannedBlock> blocks = Scan();
  EXPECT_EQ(plan_.fired(), 2u);
  ASSERT_EQ(blocks.size(), 1u);
  EXPECT_EQ(blocks[0].slot, 2u);
  EXPECT_EQ(SlotsOf(tier_->damaged()), (std::vector<SlotId>{0, 1}));
  EXPECT_EQ(tier_->checksum_failures(), 1u) << "the other one could not be read";
  EXPECT_EQ(Scan().size(), 3u);
  EXPECT_TRUE(tier_->damaged().empty());
}

INSTANTIATE_TEST_SUITE_P(Engines, SsdTierTest, ::testing::Values(IoKind::kUring, IoKind::kThreads),
                         [](const auto& info) {
                           return info.param == IoKind::kUring ? "Uring" : "Threads";
                         });

}  // namespace
}  // namespace cachedattn
