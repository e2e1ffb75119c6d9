// The simulated disk does what it says, a seed repeats a run, and what the simulation has found.
#include "tests/native/testing/sim_world.h"
#include "tests/native/testing/ssd_fixture.h"

namespace cachedattn {
namespace {

class SimDiskTest : public ::testing::Test {
 protected:
  SimDiskTest() {
    options_.clock = &clock_;
    disk_.Format(7, /*hostile=*/false);
  }

  // Writes `pages` pages, one request each, whose bytes are all `value`.
  void WritePages(IoEngine* engine, uint32_t pages, uint8_t value) {
    HostSlot page;
    std::memset(page.data(), value, kPage);
    for (uint32_t i = 0; i < pages; ++i) Run(engine, {IoOp::kWrite, i * kPage, page.data(), kPage});
  }
  int32_t Run(IoEngine* engine, const IoRequest& request) {
    engine->Submit(request);
    IoCompletion done;
    while (engine->Poll(std::span(&done, 1), 1000) == 0) {
    }
    return done.result;
  }
  uint8_t ByteOf(uint64_t offset) { return static_cast<uint8_t>(disk_.medium()[offset]); }

  Result<std::unique_ptr<SsdTier>> Open() {
    auto file = disk_.OpenFile();
    if (!file.ok()) return file.status();
    return SsdTier::OpenOn(options_, std::move(file.value()));
  }

  SimClock clock_;
  SimKeys keys_;
  SimDisk disk_{&clock_};
  SsdOptions options_ = SmallStore("simulated");
};

TEST_F(SimDiskTest, ACrashKeepsOrLosesWholeWritesSinceTheLastSync) {
  auto file = disk_.OpenFile();
  ASSERT_TRUE(file.value()->Resize(100 * kPage).ok());
  auto engine = file.value()->OpenEngine({.depth = 4});
  WritePages(engine.value().get(), 100, 1);
  EXPECT_EQ(Run(engine.value().get(), {.op = IoOp::kSync}), 0);
  WritePages(engine.value().get(), 50, 2);
  disk_.Crash();
  HostSlot page;
  EXPECT_EQ(Run(engine.value().get(), {IoOp::kRead, 0, page.data(), kPage}), -EIO);
  uint32_t kept = 0;
  for (uint32_t i = 0; i < 100; ++i) {
    const uint8_t value = ByteOf(i * kPage);
    for (uint64_t at = 0; at < kPage; ++at) ASSERT_EQ(ByteOf(i * kPage + at), value);
    ASSERT_TRUE(value == 1 || (value == 2 && i < 50)) << "page " << i;
    kept += value == 2;
  }
  EXPECT_GT(kept, 10u);
  EXPECT_EQ(disk_.fired(DiskFault::kCrashLost), 50 - kept);
}

TEST_F(SimDiskTest, ASeedRepeatsARun) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    uint64_t requests[2], failed[2];
    int64_t took[2];
    for (int run = 0; run < 2; ++run) {
      const int64_t start = clock_.NowNs();
      const WorldReport report = SimWorld(RandomWorld(seed, true), &clock_, &disk_, &keys_).Play();
      EXPECT_EQ(report.wrong, "");
      requests[run] = disk_.num_requests();
      failed[run] = report.failed_turns;
      took[run] = clock_.NowNs() - start;
    }
    EXPECT_EQ(requests[0], requests[1]) << "seed " << seed;
    EXPECT_EQ(failed[0], failed[1]) << "seed " << seed;
    EXPECT_EQ(took[0], took[1]) << "seed " << seed;
  }
}

// The older copy says clean, and the index of that close is still there.
TEST_F(SimDiskTest, AnUnreadableSuperblockBringsNoOldIndexBack) {
  for (uint64_t unreadable : {0, 1}) {
    disk_.Format(7, false);
    auto tier = Open();
    ASSERT_TRUE(WriteBlock(tier.value().get(), 0, 1).ok());
    const ScannedBlock old{0, HeaderOfBlock(1)};
    ASSERT_TRUE(tier.value()->Sync({}, std::span(&old, 1)).ok());
    tier.value().reset();
    tier = Open();
    ASSERT_TRUE(WriteBlock(tier.value().get(), 0, 2, 2).ok());
    tier.value().reset();
    disk_.faults().rule = DiskFault::kEio;
    disk_.faults().rule_from = unreadable;
    tier = Open();
    EXPECT_EQ(disk_.fired(DiskFault::kEio), 1u);
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    const auto blocks = tier.value()->Scan({});
    ASSERT_TRUE(blocks.ok());
    ASSERT_EQ(blocks.value().size(), 1u);
    EXPECT_EQ(blocks.value()[0].header, HeaderOfBlock(2, 2)) << "copy " << unreadable;
  }
}

TEST_F(SimDiskTest, OpenEndsOnADiskThatHangs) {
  Open().value().reset();
  const int64_t deadline_ns = options_.io_deadline_us * 1000;
  for (uint64_t k = 0;; ++k) {
    const uint64_t before = disk_.fired(DiskFault::kHang);
    disk_.StopFaults();
    disk_.faults().hang_ns = 50 * deadline_ns;
    disk_.faults().rule = DiskFault::kHang;
    disk_.faults().rule_from = k;
    disk_.RestartRule();
    clock_.set_limit(clock_.NowNs() + 40 * deadline_ns);
    auto tier = Open();
    const bool scanned = tier.ok() && tier.value()->Scan({}).ok();
    if (tier.ok()) tier.value().reset();
    clock_.set_limit(INT64_MAX);
    if (disk_.fired(DiskFault::kHang) == before) {
      EXPECT_TRUE(scanned);
      EXPECT_GT(k, 6u) << "superblock, its sync and the headers";
      break;
    }
    EXPECT_FALSE(scanned) << "request " << k;
    EXPECT_EQ(SsdTier::FreeAbandoned(), 1u);
    EXPECT_EQ(Open().status().code(), Code::kBusy);
    clock_.Advance(25'000 * deadline_ns);
    EXPECT_EQ(SsdTier::FreeAbandoned(), 0u);
  }
}

}  // namespace
}  // namespace cachedattn
