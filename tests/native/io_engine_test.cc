#include "csrc/io/io_engine.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "csrc/base/clock.h"
#include "csrc/io/direct_file.h"
#include "csrc/io/io_queue.h"
#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

std::shared_ptr<std::byte> Pages(size_t count) {
  return {static_cast<std::byte*>(std::aligned_alloc(kPage, count * kPage)), &std::free};
}

class IoEngineTest : public ::testing::TestWithParam<IoKind> {
 protected:
  void SetUp() override {
    directory_ = UniqueFd(::open(dir_.path().c_str(), O_RDONLY | O_DIRECTORY));
    Result<DirectFile> file = OpenDirect(directory_.get(), "file", O_RDWR | O_CREAT, dir_ / "file");
    ASSERT_TRUE(file.ok()) << file.status().message();
    file_ = std::move(file.value());
  }

  // An engine on the file, or null with the test skipped where this machine refuses io_uring.
  std::unique_ptr<IoEngine> Open(uint32_t depth) {
    return OpenOn(file_.fd.get(), {.kind = GetParam(), .depth = depth});
  }
  std::unique_ptr<IoEngine> OpenOn(int fd, const IoOptions& options) {
    Result<std::unique_ptr<IoEngine>> engine = OpenIoEngine(fd, options);
    EXPECT_TRUE(engine.ok() || GetParam() == IoKind::kUring) << engine.status().message();
    return engine.ok() ? std::move(engine.value()) : nullptr;
  }

  static int32_t RunOne(IoEngine* engine, const IoRequest& request) {
    engine->Submit(request);
    IoCompletion completion;
    while (engine->Poll({&completion, 1}, 100'000) == 0) {
    }
    EXPECT_EQ(completion.tag, request.tag);
    return completion.result;
  }

  TempDir dir_;
  UniqueFd directory_;
  DirectFile file_;
};

#define OPEN_OR_SKIP(engine, ...)  \
  auto engine = Open(__VA_ARGS__); \
  if (engine == nullptr) GTEST_SKIP() << "io_uring is refused on this machine"

TEST_P(IoEngineTest, RoundTripAtFullDepth) {
  constexpr uint32_t kDepth = 8, kRequests = 32;
  auto out = Pages(kRequests), in = Pages(kRequests);
  for (size_t i = 0; i < kRequests * kPage; ++i) out.get()[i] = static_cast<std::byte>(i * 31 / 7);
  OPEN_OR_SKIP(engine, kDepth);
  EXPECT_FALSE(engine->why().empty());
  for (IoOp op : {IoOp::kWrite, IoOp::kRead}) {
    std::byte* data = op == IoOp::kWrite ? out.get() : in.get();
    std::set<uint64_t> tags;
    for (uint32_t next = 0; tags.size() < kRequests;) {
      while (next < kRequests && engine->in_flight() < engine->depth()) {
        engine->Submit({op, next * kPage, data + next * kPage, kPage, 1000 + next});
        ++next;
      }
      IoCompletion finished[4];
      const size_t count = engine->Poll(finished, 100'000);
      for (size_t i = 0; i < count; ++i) {
        EXPECT_EQ(finished[i].result, static_cast<int32_t>(kPage));
        EXPECT_TRUE(tags.insert(finished[i].tag).second) << "completed twice";
      }
    }
    EXPECT_EQ(engine->in_flight(), 0u);
    EXPECT_EQ(*tags.begin(), 1000u);
    EXPECT_EQ(*tags.rbegin(), 1000u + kRequests - 1);
  }
  EXPECT_EQ(std::memcmp(out.get(), in.get(), kRequests * kPage), 0);
}

TEST_P(IoEngineTest, ShortReadAtTheEndOfTheFile) {
  ASSERT_EQ(::ftruncate(file_.fd.get(), 6000), 0);
  auto data = Pages(2);
  OPEN_OR_SKIP(engine, 2);
  EXPECT_EQ(RunOne(engine.get(), {IoOp::kRead, 0, data.get(), 2 * kPage, 1}), 6000);
  EXPECT_EQ(RunOne(engine.get(), {IoOp::kRead, 2 * kPage, data.get(), kPage, 2}), 0);
}

TEST_P(IoEngineTest, ReadsKeepToTheirLimit) {
  constexpr uint32_t kReads = 8;
  constexpr int64_t kDueNs = 200'000'000;  // all of them
  ASSERT_EQ(::ftruncate(file_.fd.get(), kReads * kPage), 0);
  auto data = Pages(kReads + 1);
  auto engine =
      OpenOn(file_.fd.get(), {.kind = GetParam(),
                              .depth = 2 * kReads,
                              .read_bytes_per_s = kReads * kPage * 1'000'000'000 / kDueNs});
  if (engine == nullptr) GTEST_SKIP() << "io_uring is refused on this machine";
  for (const bool polled : {true, false}) {
    const int64_t begin_ns = SystemClock().NowNs();
    for (uint32_t i = 0; i < kReads; ++i) {
      engine->Submit({IoOp::kRead, i * kPage, data.get() + i * kPage, kPage, i});
    }
    engine->Submit({IoOp::kWrite, 0, data.get() + kReads * kPage, kPage, kReads});
    // Who does not look for a long time finds all at once; only reads are held up.
    if (!polled) std::this_thread::sleep_for(std::chrono::nanoseconds(2 * kDueNs));
    uint32_t reads = 0;
    while (engine->in_flight() > 0) {
      IoCompletion done[2 * kReads];
      const size_t count = engine->Poll(done, polled ? 1'000'000 : 0);
      const int64_t spent_ns = SystemClock().NowNs() - begin_ns;
      for (size_t i = 0; i < count; ++i) {
        EXPECT_EQ(done[i].result, static_cast<int32_t>(kPage));
        if (done[i].tag == kReads) continue;
        EXPECT_GE(spent_ns, ++reads * kDueNs / kReads);
      }
      if (!polled) {
        EXPECT_EQ(count, kReads + 1);
      }
    }
    EXPECT_EQ(reads, kReads);
  }
}

TEST_P(IoEngineTest, AnErrorIsAResult) {
  auto data = Pages(1);
  auto engine = OpenOn(-1, {.kind = GetParam(), .depth = 2});
  if (engine == nullptr) GTEST_SKIP() << "io_uring is refused on this machine";
  EXPECT_EQ(RunOne(engine.get(), {IoOp::kRead, 0, data.get(), kPage, 1}), -EBADF);
  EXPECT_EQ(RunOne(engine.get(), {IoOp::kWrite, 0, data.get(), kPage, 2}), -EBADF);
}

TEST_P(IoEngineTest, PollOfAnIdleEngineReturns) {
  OPEN_OR_SKIP(engine, 2);
  IoCompletion finished[1];
  EXPECT_EQ(engine->Poll(finished, 0), 0u);
  EXPECT_EQ(engine->Poll(finished, 1000), 0u);
}

TEST_P(IoEngineTest, DestructorWaitsForWhatIsInFlight) {
  auto data = Pages(8);
  std::memset(data.get(), 0x5a, 8 * kPage);
  {
    OPEN_OR_SKIP(engine, 8);
    for (uint32_t i = 0; i < 8; ++i) {
      engine->Submit({IoOp::kWrite, i * kPage, data.get() + i * kPage, kPage, i});
    }
  }
  EXPECT_EQ(::lseek(file_.fd.get(), 0, SEEK_END), static_cast<off_t>(8 * kPage));
}

TEST_P(IoEngineTest, SignalsDoNotLoseRequests) {
  static volatile sig_atomic_t signals = 0;
  struct sigaction action = {};
  struct sigaction old = {};
  action.sa_handler = [](int) { signals = signals + 1; };  // no SA_RESTART: calls see EINTR
  ASSERT_EQ(::sigaction(SIGALRM, &action, &old), 0);
  const itimerval every_ms{{0, 500}, {0, 500}}, off{};
  auto data = Pages(1);
  std::memset(data.get(), 1, kPage);
  OPEN_OR_SKIP(engine, 4);
  ::setitimer(ITIMER_REAL, &every_ms, nullptr);
  int rounds = 0;
  for (; rounds < 20 || (signals < 5 && rounds < 100'000); ++rounds) {
    ASSERT_EQ(RunOne(engine.get(), {IoOp::kWrite, 0, data.get(), kPage, 1}),
              static_cast<int32_t>(kPage));
  }
  ::setitimer(ITIMER_REAL, &off, nullptr);
  ::sigaction(SIGALRM, &old, nullptr);
  EXPECT_GE(signals, 5);
}

TEST_P(IoEngineTest, DepthIsChecked) {
  for (uint32_t depth : {0u, 4097u}) {
    Result<std::unique_ptr<IoEngine>> engine =
        OpenIoEngine(file_.fd.get(), {.kind = GetParam(), .depth = depth});
    ASSERT_FALSE(engine.ok());
    EXPECT_EQ(engine.status().code(), Code::kInvalidArgument);
    EXPECT_NE(engine.status().message().find(std::to_string(depth)), std::string::npos);
  }
}

// The double itself: what the fault tests rely on.
TEST_P(IoEngineTest, FaultyEngineBreaksTheChosenRequests) {
  FaultPlan plan;
  auto out = Pages(1), in = Pages(1);
  std::memset(out.get(), 3, kPage);
  auto engine = OpenOn(file_.fd.get(), {.kind = GetParam(), .depth = 4, .wrap = plan.Wrap()});
  if (engine == nullptr) GTEST_SKIP() << "io_uring is refused on this machine";
  plan.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .skip = 1, .error = ENOSPC});
  plan.Add({.op = IoOp::kRead, .kind = FaultKind::kShort});
  plan.Add({.op = IoOp::kRead, .kind = FaultKind::kFlip, .flip_byte = 9});
  const IoRequest write{IoOp::kWrite, 0, out.get(), kPage, 1};
  const IoRequest read{IoOp::kRead, 0, in.get(), kPage, 2};
  EXPECT_EQ(RunOne(engine.get(), write), static_cast<int32_t>(kPage));
  EXPECT_EQ(RunOne(engine.get(), write), -ENOSPC);
  EXPECT_EQ(RunOne(engine.get(), read), static_cast<int32_t>(kPage / 2));
  EXPECT_EQ(RunOne(engine.get(), read), static_cast<int32_t>(kPage));
  EXPECT_EQ(in.get()[9], std::byte{2});
  EXPECT_EQ(RunOne(engine.get(), read), static_cast<int32_t>(kPage));
  EXPECT_EQ(in.get()[9], std::byte{3});
  EXPECT_EQ(plan.fired(), 3u);
  plan.Add({.op = IoOp::kRead, .kind = FaultKind::kHold});
  engine->Submit(read);
  IoCompletion finished[1];
  EXPECT_EQ(engine->Poll(finished, 1000), 0u);
  plan.Release();
  EXPECT_EQ(engine->Poll(finished, 1'000'000), 1u);
}

INSTANTIATE_TEST_SUITE_P(Engines, IoEngineTest,
                         ::testing::Values(IoKind::kUring, IoKind::kThreads, IoKind::kInline),
                         [](const auto& info) {
                           return info.param == IoKind::kUring     ? "Uring"
                                  : info.param == IoKind::kThreads ? "Threads"
                                                                   : "Inline";
                         });

TEST(DirectFile, ReportsARefusalOfODirect) {
  UniqueFd directory(::open("/proc/self", O_RDONLY | O_DIRECTORY));
  Result<DirectFile> file = OpenDirect(directory.get(), "status", O_RDONLY, "/proc/self/status");
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_FALSE(file.value().direct);
  char byte;
  EXPECT_EQ(::read(file.value().fd.get(), &byte, 1), 1);
}

TEST(DirectFile, RefusesWhatIsNotARegularFile) {
  TempDir dir;
  UniqueFd directory(::open(dir.path().c_str(), O_RDONLY | O_DIRECTORY));
  ASSERT_EQ(::symlink("/etc/hostname", (dir / "link").c_str()), 0);
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  const auto message = [&](const char* name) {
    return OpenDirect(directory.get(), name, O_RDWR, dir / name).status().message();
  };
  EXPECT_NE(message("link").find("symbolic link"), std::string::npos) << message("link");
  EXPECT_NE(message("fifo").find("not a regular file"), std::string::npos) << message("fifo");
  EXPECT_NE(message("absent").find("No such file"), std::string::npos) << message("absent");
}

// Says what it was given, and finishes nothing.
class IdleEngine final : public IoEngine {
 public:
  void Submit(const IoRequest& request) override { tags.push_back(request.tag); }
  size_t Poll(std::span<IoCompletion>, int64_t) override { return 0; }
  uint32_t depth() const override { return 64; }
  uint32_t in_flight() const override { return static_cast<uint32_t>(tags.size()); }
  const char* name() const override { return "idle"; }
  const std::string& why() const override { return why_; }

  std::vector<uint64_t> tags;

 private:
  const std::string why_;
};

TEST(IoQueue, ReadsOvertakeWritesButLeaveThemAThird) {
  constexpr uint32_t kSize = IoQueue::kFirstBytes;
  IdleEngine engine;
  IoQueue queue(&engine);
  const auto push = [&](IoOp op, uint64_t tag) { queue.Push({op, 0, nullptr, kSize, tag}); };
  push(IoOp::kWrite, 1);
  queue.Submit();
  push(IoOp::kWrite, 2);
  push(IoOp::kWrite, 3);
  for (uint64_t tag = 4; tag < 9; ++tag) push(IoOp::kRead, tag);
  EXPECT_EQ(queue.Submit().size(), 0u) << "the engine has its fill";
  for (int i = 0; i < 7; ++i) {
    queue.Release(kSize);
    queue.Submit();
  }
  EXPECT_EQ(engine.tags, (std::vector<uint64_t>{1, 4, 5, 2, 6, 7, 3, 8})) << "a third are writes";
  for (uint64_t tag = 9; tag < 13; ++tag) push(IoOp::kWrite, tag);
  queue.Submit();
  EXPECT_TRUE(queue.Drop(12));
  EXPECT_FALSE(queue.Drop(12)) << "it is gone";
}

}  // namespace
}  // namespace cachedattn
