// A store that is closed at any point of its work ends at once, lets go of its file, and is whole
// when it opens again.
#include <random>

#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kCycles = 50;
#else
constexpr int kCycles = 250;
#endif

// Whether there is a device.
class StoreCloseTest : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Cpu, StoreCloseTest, ::testing::Values(false));
INSTANTIATE_TEST_SUITE_P(Device, StoreCloseTest, ::testing::Values(true));

TEST_P(StoreCloseTest, AtAnyPointOfItsWork) {
  TempDir dir;
  StoreOptions options = TinyOptions({24, 64, GetParam() ? 40u : 0u}, dir / "kv");
  options.dram_reserve = 0.25;
  std::mt19937 random(1);
  int reading = 0, writing = 0, running = 0;
  uint64_t found = 0;
  for (int cycle = 0; cycle < kCycles && !HasFailure(); ++cycle) {
    SCOPED_TRACE(cycle);
    options.io = cycle % 2 == 0 ? IoKind::kAuto : IoKind::kThreads;
    auto store = MustOpenStore(options);
    std::vector<std::unique_ptr<Turn>> turns;
    for (uint32_t work = random() % 40; work > 0; --work) {
      if (turns.empty() || random() % 3 == 0) {
        const uint32_t count = 1 + random() % (10 * kBlock);
        auto turn = std::make_unique<Turn>(store.get(), MakeTokens(count, random() % 20));
        if (turn->Begin()) turns.push_back(std::move(turn));
        continue;
      }
      std::unique_ptr<Turn>& turn = turns[random() % turns.size()];
      if (!turn->finished()) (void)turn->Step(1 + random() % 40);  // there may be no room
      if (turn->finished()) {
        if (random() % 2 == 0) turn->Commit();
        std::swap(turn, turns.back());
        turns.pop_back();
      }
      if (random() % 2 == 0) store->Poll();
    }
    if (random() % 2 == 0) store->DropTier(Tier::kDevice);
    running += !turns.empty();
    turns.clear();
    const StoreStats stats = store->stats();
    found += stats.tokens_from[static_cast<int>(Tier::kSsd)];
    reading += stats.reads_in_flight > 0;
    writing += stats.writes_in_flight > 0 || stats.saves_waiting > 0;
    EXPECT_EQ(stats.checksum_failures, 0u);
    const Status status = store->Close();
    EXPECT_TRUE(status.ok()) << status.message();
    store.reset();
    EXPECT_EQ(FreeParkedStores(), 0u);
  }
  std::printf("cycles=%d reading=%d writing=%d with_turns=%d tokens_from_ssd=%lu\n", kCycles,
              reading, writing, running, found);
  EXPECT_GT(reading, 0);
  EXPECT_GT(writing, 0);
  EXPECT_GT(running, 0);
  EXPECT_GT(found, 0u);
}

}  // namespace
}  // namespace cachedattn
