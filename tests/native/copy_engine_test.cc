#include "csrc/copy/copy_engine.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace cachedattn {
namespace {

class CopyEngineTest : public ::testing::TestWithParam<std::unique_ptr<CopyEngine> (*)()> {};
INSTANTIATE_TEST_SUITE_P(Host, CopyEngineTest, ::testing::Values(&NewHostCopyEngine));
INSTANTIATE_TEST_SUITE_P(Inline, CopyEngineTest, ::testing::Values(&NewInlineCopyEngine));

TEST_P(CopyEngineTest, MovesBytesInOrderPerStream) {
  constexpr size_t kCopies = 200, kBytes = 256;
  std::vector<std::byte> source(kCopies * kBytes), target(kCopies * kBytes);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 7 + i / 256);
  const auto engine = GetParam()();
  for (size_t i = 0; i < kCopies; ++i) {
    engine->Enqueue({.stream = i % 2 ? CopyStream::kSave : CopyStream::kLoad,
                     .source = source.data() + i * kBytes,
                     .target = target.data() + i * kBytes,
                     .size = kBytes,
                     .tag = i});
  }
  std::vector<uint64_t> tags;
  while (engine->in_flight() > 0) engine->Poll(&tags, 1000);
  EXPECT_EQ(target, source);
  ASSERT_EQ(tags.size(), kCopies);
  for (uint64_t stream : {0u, 1u}) {
    std::vector<uint64_t> of_stream;
    std::ranges::copy_if(tags, std::back_inserter(of_stream),
                         [&](uint64_t tag) { return tag % 2 == stream; });
    EXPECT_TRUE(std::ranges::is_sorted(of_stream));
  }
}

TEST(HostCopyEngineTest, FinishesWhatIsQueuedBeforeItGoes) {
  std::vector<std::byte> source(1 << 20, std::byte{5}), target(1 << 20);
  {
    const auto engine = NewHostCopyEngine();
    engine->Enqueue({.source = source.data(), .target = target.data(), .size = source.size()});
  }
  EXPECT_EQ(target, source);
}

TEST(HostCopyEngineTest, PollOfAnIdleEngineReturnsAtOnce) {
  const auto engine = NewHostCopyEngine();
  std::vector<uint64_t> tags;
  engine->Poll(&tags, 1'000'000'000);
  EXPECT_TRUE(tags.empty());
}

}  // namespace
}  // namespace cachedattn
