// Operations that the disk does not answer in time, probes, and the index of a clean close.
#include <chrono>
#include <thread>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

class HandClock final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns; }
  int64_t now_ns = 1;
};

class SsdDeadlineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    options_.io.wrap = plan_.Wrap();
    options_.clock = &clock_;
    tier_ = MustOpen(options_);
  }
  std::vector<SsdCompletion> Poll() {
    std::vector<SsdCompletion> finished;
    tier_->Poll(&finished, 0);
    return finished;
  }
  void PassDeadline() { clock_.now_ns += options_.io_deadline_us * 1000; }
  // Until something is finished; held requests come through.
  std::vector<SsdCompletion> ReleaseAndPoll() {
    plan_.Release();
    std::vector<SsdCompletion> finished;
    while (finished.empty()) tier_->Poll(&finished, 1000);
    return finished;
  }

  TempDir dir_;
  FaultPlan plan_;
  HandClock clock_;
  SsdOptions options_ = SmallStore(dir_ / "kv");
  std::unique_ptr<SsdTier> tier_;
};

TEST_F(SsdDeadlineTest, ALateReadFailsThenGivesItsBufferBack) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 1, 1).ok());
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold});
  HostSlot host;
  tier_->StartRead(1, HeaderOfBlock(1), 0, 3, host.data(), 9);
  EXPECT_TRUE(Poll().empty());
  PassDeadline();
  const auto late = Poll();
  ASSERT_EQ(late.size(), 1u);
  EXPECT_TRUE(late[0].late);
  EXPECT_EQ(late[0].tag, 9u);
  EXPECT_EQ(late[0].status.code(), Code::kIo);
  EXPECT_EQ(tier_->in_flight(), 1u);
  EXPECT_EQ(tier_->num_late(), 1u);
  EXPECT_TRUE(Poll().empty()) << "told once";
  const auto last = ReleaseAndPoll();
  ASSERT_EQ(last.size(), 1u);
  EXPECT_FALSE(last[0].late);
  EXPECT_EQ(last[0].status.code(), Code::kIo) << "its caller has given up";
  EXPECT_EQ(tier_->in_flight() + tier_->num_late(), 0u);
  EXPECT_EQ(plan_.fired(), 1u);
  EXPECT_TRUE(ReadBlock(tier_.get(), 1, 1).ok());
}

TEST_F(SsdDeadlineTest, ALateWriteMaySucceedAfterAll) {
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kHold});
  HostSlot host;
  host.Fill(SmallLayout(), 2);
  tier_->StartWrite(2, HeaderOfBlock(2), false, host.data(), 5);
  PassDeadline();
  ASSERT_TRUE(Poll().at(0).late);
  EXPECT_TRUE(ReleaseAndPoll().at(0).status.ok());
  EXPECT_TRUE(ReadBlock(tier_.get(), 2, 2).ok());
}

TEST_F(SsdDeadlineTest, APieceDoesNotWaitForALateHeader) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 1, 1).ok());
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold});
  HostSlot host;
  tier_->StartRead(1, HeaderOfBlock(1), 0, 1, host.data(), 0);
  tier_->StartRead(1, HeaderOfBlock(1), 1, 2, host.data(), 1);
  for (int i = 0; i < 100; ++i) {
    std::vector<SsdCompletion> finished;
    tier_->Poll(&finished, 1000);
    EXPECT_TRUE(finished.empty());
  }
  PassDeadline();
  const auto finished = Poll();
  ASSERT_EQ(finished.size(), 2u);
  for (const SsdCompletion& completion : finished) {
    EXPECT_EQ(completion.status.code(), Code::kIo);
    EXPECT_EQ(completion.late, completion.tag == 0) << "the other one's bytes are here";
  }
  EXPECT_EQ(tier_->in_flight(), 1u);
  ReleaseAndPoll();
  EXPECT_EQ(tier_->checksum_failures(), 0u);
}

TEST_F(SsdDeadlineTest, WhatTheDiskNeverGotIsNotLate) {
  const uint32_t depth = options_.io.depth;
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kHold, .count = depth});
  HostSlot host[5];
  for (uint32_t i = 0; i <= depth; ++i) {
    host[i].Fill(SmallLayout(), i);
    tier_->StartWrite(i, HeaderOfBlock(i), false, host[i].data(), i);
  }
  PassDeadline();
  const auto finished = Poll();
  ASSERT_EQ(finished.size(), depth + 1);
  for (const SsdCompletion& completion : finished) {
    EXPECT_EQ(completion.status.code(), Code::kIo);
    EXPECT_EQ(completion.late, completion.tag < depth) << "the last one's buffer is free";
  }
  EXPECT_EQ(tier_->in_flight(), depth);
  uint32_t back = 0;
  while (back < depth) back += static_cast<uint32_t>(ReleaseAndPoll().size());
  EXPECT_EQ(plan_.fired(), depth);
  EXPECT_EQ(ReadBlock(tier_.get(), depth, depth).code(), Code::kCorrupt) << "was never written";
  EXPECT_TRUE(WriteBlock(tier_.get(), depth, depth).ok());
}

TEST_F(SsdDeadlineTest, ACallerThatWasAwayLosesNothing) {
  HostSlot host[8];
  const uint32_t most = 2 * options_.io.depth;
  for (uint32_t i = 0; i < most; ++i) {
    host[i].Fill(SmallLayout(), i);
    tier_->StartWrite(i, HeaderOfBlock(i), false, host[i].data(), i);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(500));  // the disk has done its half
  PassDeadline();
  const auto finished = Drain(tier_.get());
  EXPECT_EQ(finished.size(), most);
  for (const SsdCompletion& completion : finished) {
    EXPECT_TRUE(completion.status.ok()) << completion.status.message();
  }
}

TEST_F(SsdDeadlineTest, AFailedReadIsNotRepeatedAfterItsDeadline) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 1, 1).ok());
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError});
  HostSlot host;
  tier_->StartRead(1, HeaderOfBlock(1), 0, 3, host.data(), 9);
  PassDeadline();
  const auto finished = Poll();
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_FALSE(finished[0].late);
  EXPECT_EQ(finished[0].status.code(), Code::kIo);
}

TEST_F(SsdDeadlineTest, BusyAnswersAreTriedAgain) {
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .count = 3, .error = EAGAIN});
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError, .count = 3, .error = EINTR});
  EXPECT_TRUE(WriteBlock(tier_.get(), 1, 1).ok());
  EXPECT_TRUE(ReadBlock(tier_.get(), 1, 1).ok());
  EXPECT_EQ(plan_.fired(), 6u);
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .count = 1000, .error = EAGAIN});
  EXPECT_EQ(WriteBlock(tier_.get(), 1, 1).code(), Code::kIo) << "but not for ever";
}

TEST_F(SsdDeadlineTest, AProbeTellsWhetherTheDiskWorks) {
  const auto probe = [&] {
    tier_->StartProbe(3);
    return Drain(tier_.get()).at(0).status.code();
  };
  EXPECT_EQ(probe(), Code::kOk);
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .error = ENOSPC});
  EXPECT_EQ(probe(), Code::kIo);
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kFlip, .flip_byte = 100});
  EXPECT_EQ(probe(), Code::kIo);
  EXPECT_EQ(probe(), Code::kOk);
  EXPECT_EQ(plan_.fired(), 2u);
  EXPECT_EQ(tier_->Scan({}).value().size(), 0u) << "no slot was touched";
}

TEST_F(SsdDeadlineTest, ADiskThatDoesNotAnswerEndsSync) {
  struct Ticking final : Clock {
    int64_t NowNs() const override { return now_ns += step_ns; }
    mutable int64_t now_ns = 1;
    int64_t step_ns = 0;
  } ticking;
  tier_.reset();
  options_.clock = &ticking;
  options_.io_deadline_us = 1000;
  tier_ = MustOpen(options_);
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kHold});
  ticking.step_ns = 100'000'000;
  const Status status = tier_->Sync({}, {});
  EXPECT_EQ(status.code(), Code::kIo);
  EXPECT_NE(status.message().find("does not answer"), std::string::npos) << status.message();
  EXPECT_EQ(plan_.fired(), 1u);
  plan_.Release();
}

TEST_F(SsdDeadlineTest, ACleanCloseLeavesAnIndex) {
  std::vector<ScannedBlock> blocks;
  for (SlotId slot : {2u, 5u}) {
    ASSERT_TRUE(WriteBlock(tier_.get(), slot, slot).ok());
    blocks.push_back({slot, HeaderOfBlock(slot)});
  }
  ASSERT_TRUE(tier_->Sync({}, blocks).ok());
  tier_.reset();
  const uint64_t generation = ReadRaw<Superblock>(BlocksFile(options_.directory), 0).generation;
  tier_ = MustOpen(options_);
  ASSERT_NE(tier_->index(), nullptr);
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError, .count = 1000});
  const auto found = tier_->Scan({}).value();
  EXPECT_EQ(plan_.fired(), 0u) << "no header was read";
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].slot, 2u);
  EXPECT_TRUE(found[1].header == HeaderOfBlock(5));
  plan_ = FaultPlan();

  tier_.reset();
  tier_ = MustOpen(options_);
  EXPECT_EQ(tier_->index(), nullptr) << "the last owner did not close it";
  EXPECT_EQ(tier_->Scan({}).value().size(), 2u);
  EXPECT_GT(ReadRaw<Superblock>(BlocksFile(options_.directory), 0).generation, generation);
}

// A page of the index that a crash, or a lost write, left as an earlier close wrote it.
TEST_F(SsdDeadlineTest, AnEarlierIndexIsNotUsed) {
  const uint64_t index = IndexOffset(SmallLayout(), 8);
  const std::string file = BlocksFile(options_.directory);
  ASSERT_TRUE(WriteBlock(tier_.get(), 3, 3).ok());
  ASSERT_TRUE(tier_->Sync({}, std::vector<ScannedBlock>{{3, HeaderOfBlock(3)}}).ok());
  const auto earlier = ReadRaw<IndexPage>(file, index);
  tier_.reset();
  tier_ = MustOpen(options_);
  ASSERT_TRUE(WriteBlock(tier_.get(), 3, 4, 2).ok());
  ASSERT_TRUE(tier_->Sync({}, std::vector<ScannedBlock>{{3, HeaderOfBlock(4, 2)}}).ok());
  WriteRaw(file, index, earlier);
  tier_.reset();
  tier_ = MustOpen(options_);
  EXPECT_EQ(tier_->index(), nullptr);
  ASSERT_EQ(tier_->Scan({}).value().size(), 1u);
  EXPECT_TRUE(tier_->Scan({}).value()[0].header == HeaderOfBlock(4, 2));
}

TEST_F(SsdDeadlineTest, ADamagedIndexIsNotUsed) {
  ASSERT_TRUE(WriteBlock(tier_.get(), 3, 3).ok());
  const std::string file = BlocksFile(options_.directory);
  const uint64_t index = IndexOffset(SmallLayout(), 8);
  for (uint64_t byte : {uint64_t{0}, 3 * sizeof(IndexEntry) + 80, kPage - 1}) {
    ASSERT_TRUE(tier_->Sync({}, std::vector<ScannedBlock>{{3, HeaderOfBlock(3)}}).ok());
    tier_.reset();
    FlipByte(file, index + byte);
    tier_ = MustOpen(options_);
    EXPECT_EQ(tier_->index(), nullptr) << byte;
    EXPECT_EQ(tier_->Scan({}).value().size(), 1u) << byte;
  }
}

}  // namespace
}  // namespace cachedattn
