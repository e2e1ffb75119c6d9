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

// Whoever does not wait sees a completion only now and then, so that work is in flight at most
// moments however fast the disk is.
class SlowEngine : public IoEngine {
 public:
  SlowEngine(std::unique_ptr<IoEngine> inner, std::mt19937* random)
      : inner_(std::move(inner)), random_(random) {}
  void Submit(const IoRequest& request) override { inner_->Submit(request); }
  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override {
    return timeout_us == 0 && (*random_)() % 64 != 0 ? 0 : inner_->Poll(out, timeout_us);
  }
  uint32_t depth() const override { return inner_->depth(); }
  uint32_t in_flight() const override { return inner_->in_flight(); }
  const char* name() const override { return inner_->name(); }
  const std::string& why() const override { return inner_->why(); }

 private:
  const std::unique_ptr<IoEngine> inner_;
  std::mt19937* const random_;
};

std::unique_ptr<AttentionStore> OpenSlowStore(const StoreOptions& options, IoKind io,
                                              std::mt19937* random) {
  SsdOptions ssd = SsdOptionsOf(options);
  ssd.io.kind = io;
  ssd.io.wrap = [random](std::unique_ptr<IoEngine> inner) {
    return std::make_unique<SlowEngine>(std::move(inner), random);
  };
  auto tier = SsdTier::Open(ssd);
  EXPECT_TRUE(tier.ok()) << tier.status().message();
  auto store = OpenStoreOn(options, std::move(tier.value()), NewHostCopyEngine());
  EXPECT_TRUE(store.ok()) << store.status().message();
  return std::move(store.value());
}

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
    auto store = OpenSlowStore(options, cycle % 2 == 0 ? IoKind::kAuto : IoKind::kThreads, &random);
    std::vector<std::unique_ptr<Turn>> turns;
    for (uint32_t work = 1 + random() % 40; work > 0; --work) {
      if (turns.empty() || work == 1 || random() % 3 == 0) {
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
