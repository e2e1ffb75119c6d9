// Tenants: separate names for the same tokens, and a quota that each keeps with its own blocks.
#include <unistd.h>

#include <random>

#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

constexpr int kDram = static_cast<int>(Tier::kDram), kSsd = static_cast<int>(Tier::kSsd);

class StoreTenantTest : public ::testing::Test {
 protected:
  std::unique_ptr<AttentionStore> Open(const Sizes& sizes, uint32_t quota_slots) {
    StoreOptions options = TinyOptions(sizes, dir_ / ("kv" + std::to_string(sizes.device)));
    options.tenant_quota_bytes = quota_slots * options.layout.host_slot_bytes();
    return MustOpenStore(options);
  }
  static std::shared_ptr<Chain> ChainOf(AttentionStore* store, const std::string& tenant,
                                        const Tokens& tokens) {
    auto chain = store->NewChain(tenant, {});
    chain->Append(tokens + MakeTokens(1, 999));
    return chain;
  }
  static CachedTokens Find(AttentionStore* store, const std::string& tenant, const Tokens& tokens) {
    return store->Lookup(*ChainOf(store, tenant, tokens));
  }
  static void Play(AttentionStore* store, const std::string& tenant, const Tokens& tokens) {
    Turn turn(store, tokens, {}, tenant);
    for (int tries = 0; tries < 100 && !turn.Begin(); ++tries) store->Flush();
    turn.Finish();
    store->CheckInvariants();
  }
  static void Settle(AttentionStore* store) {
    store->Flush();
    store->Poll();
    store->CheckInvariants();
  }

  const Tokens shared_ = MakeTokens(3 * kBlock, 1);
  TempDir dir_;
};

TEST_F(StoreTenantTest, OnlyTheOwnerHitsOnEveryTierAndAfterARestart) {
  const Sizes sizes{16, 32, 16};
  auto store = Open(sizes, 0);
  Play(store.get(), "a", shared_);
  Settle(store.get());
  const auto check = [&](Tier tier) {
    EXPECT_EQ(From(Find(store.get(), "a", shared_), tier), 3 * kBlock) << static_cast<int>(tier);
    for (const char* other : {"", "b", "A", "a "}) {
      EXPECT_EQ(Find(store.get(), other, shared_).total, 0u) << other;
    }
  };
  check(Tier::kDevice);
  store->DropTier(Tier::kDevice);
  check(Tier::kDram);
  store->DropTier(Tier::kDram);
  check(Tier::kSsd);
  store.reset();
  store = Open(sizes, 0);
  check(Tier::kSsd);
  EXPECT_EQ(store->TenantUsage("a")[kSsd], 3u);
  EXPECT_EQ(store->TenantUsage("b")[kSsd], 0u);
}

TEST_F(StoreTenantTest, UsageCountsBlocksAndRunningSequences) {
  const auto store = Open({16, 32, 0}, 0);
  Play(store.get(), "a", shared_);
  Settle(store.get());
  Turn turn(store.get(), MakeTokens(40, 2), {}, "b");
  ASSERT_TRUE(turn.Begin());
  ASSERT_TRUE(turn.Step(40).ok());
  EXPECT_EQ(store->TenantUsage("a"), (std::array<uint32_t, kNumTiers>{0, 3, 3}));
  EXPECT_EQ(store->TenantUsage("b")[kDram], 3u);
  EXPECT_EQ(store->TenantUsage("nobody"), (std::array<uint32_t, kNumTiers>{}));
  turn.Drop();
}

TEST_F(StoreTenantTest, AGreedyTenantDisplacesOnlyItself) {
  for (const uint32_t device : {0u, 24u}) {
    SCOPED_TRACE(device);
    const auto store = Open({24, 40, device}, 9);
    Play(store.get(), "modest", shared_);
    Settle(store.get());
    const auto before = store->TenantUsage("modest");
    for (uint32_t i = 0; i < 30; ++i) {
      Play(store.get(), "greedy", MakeTokens(4 * kBlock, 10 + i));
      Settle(store.get());
      EXPECT_LE(store->TenantUsage("greedy")[kDram], 9u);
      EXPECT_LE(store->TenantUsage("greedy")[kSsd], 9u);
    }
    EXPECT_EQ(store->TenantUsage("greedy")[kSsd], 9u) << "all that it may hold";
    EXPECT_EQ(store->TenantUsage("modest")[kDram], before[kDram]);
    EXPECT_EQ(store->TenantUsage("modest")[kSsd], 3u);
    EXPECT_EQ(Find(store.get(), "modest", shared_).total, 3 * kBlock);
    // The greedy tenant's last turns are there, its first ones made room.
    EXPECT_EQ(Find(store.get(), "greedy", MakeTokens(4 * kBlock, 39)).total, 4 * kBlock);
    EXPECT_EQ(Find(store.get(), "greedy", MakeTokens(4 * kBlock, 10)).total, 0u);
    ASSERT_TRUE(store->Close().ok());
  }
}

// Nothing of its own can make room for a sequence that is longer than the quota.
TEST_F(StoreTenantTest, ARunningSequenceMayExceedTheQuotaUntilItEnds) {
  const auto store = Open({24, 40, 0}, 4);
  Turn turn(store.get(), MakeTokens(8 * kBlock, 3), {}, "a");
  ASSERT_TRUE(turn.Begin());
  turn.Finish(8 * kBlock);
  Settle(store.get());
  EXPECT_EQ(store->TenantUsage("a")[kDram], 4u);
  EXPECT_EQ(store->TenantUsage("a")[kSsd], 4u);
  // The head; more when DRAM and SSD kept other blocks.
  EXPECT_GE(Find(store.get(), "a", MakeTokens(8 * kBlock, 3)).total, 4 * kBlock);
}

TEST_F(StoreTenantTest, PrefetchKeepsTheQuota) {
  const auto store = Open({24, 64, 0}, 6);
  const Tokens a = MakeTokens(6 * kBlock, 4), b = MakeTokens(3 * kBlock, 5);
  Play(store.get(), "a", a);
  Play(store.get(), "b", b);
  store->DropTier(Tier::kDram);
  ASSERT_EQ(store->TenantUsage("a")[kSsd], 6u);
  Turn running(store.get(), MakeTokens(4 * kBlock, 6), {}, "a");
  ASSERT_TRUE(running.Begin());
  ASSERT_TRUE(running.Step(4 * kBlock).ok());  // leaves room for two
  const auto chain_a = ChainOf(store.get(), "a", a), chain_b = ChainOf(store.get(), "b", b);
  const std::shared_ptr<Chain> waiting[] = {chain_a, chain_b};
  store->SetQueue(waiting);
  for (int i = 0; i < 100'000 && From(store->Lookup(*chain_b), Tier::kDram) < 3 * kBlock; ++i) {
    store->Poll();
    usleep(100);
    EXPECT_LE(store->TenantUsage("a")[kDram], 6u);
  }
  EXPECT_EQ(From(store->Lookup(*chain_b), Tier::kDram), 3 * kBlock) << "it did not wait behind a";
  EXPECT_GT(From(store->Lookup(*chain_a), Tier::kDram), 0u);
  running.Drop();
}

TEST_F(StoreTenantTest, ASmallerQuotaHoldsFromTheNextOpenOn) {
  const Sizes sizes{24, 40, 0};
  auto store = Open(sizes, 0);
  Play(store.get(), "a", MakeTokens(10 * kBlock, 7));
  Play(store.get(), "b", shared_);
  store.reset();
  store = Open(sizes, 4);
  EXPECT_EQ(store->TenantUsage("a")[kSsd], 4u);
  EXPECT_EQ(store->TenantUsage("b")[kSsd], 3u);
  EXPECT_EQ(Find(store.get(), "a", MakeTokens(10 * kBlock, 7)).total, 4 * kBlock);
  store->CheckInvariants();
}

TEST_F(StoreTenantTest, AQuotaBelowOneBlockIsRefused) {
  StoreOptions options = TinyOptions({16, 0, 0});
  options.tenant_quota_bytes = options.layout.host_slot_bytes() - 1;
  const auto store = AttentionStore::Open(options);
  EXPECT_EQ(store.status().code(), Code::kInvalidArgument);
  EXPECT_NE(store.status().message().find("tenant_quota"), std::string::npos);
}

// Any mix of tenants, with and without a device tier: quotas hold whenever nothing runs.
TEST_F(StoreTenantTest, QuotasHoldUnderLoad) {
  for (const uint32_t device : {0u, 20u}) {
    const auto store = Open({24, 40, device}, 8);
    std::mt19937 random(5);
    uint64_t hits = 0;
    for (int step = 0; step < 300; ++step) {
      const std::string tenant(1, static_cast<char>('a' + random() % 5));
      Turn turn(store.get(),
                MakeTokens(kBlock * (1 + random() % 5) + random() % kBlock, random() % 6), {},
                tenant);
      if (!turn.Begin()) {
        Settle(store.get());
        continue;
      }
      hits += turn.cached().total;
      turn.Finish();
      if (random() % 3 == 0) {
        const auto chain = ChainOf(store.get(), tenant, MakeTokens(5 * kBlock, random() % 6));
        const std::shared_ptr<Chain> waiting[] = {chain};
        store->SetQueue(waiting);
      }
      Settle(store.get());
      for (const char* name : {"a", "b", "c", "d", "e"}) {
        ASSERT_LE(store->TenantUsage(name)[kDram], 8u) << "step " << step << " " << name;
        ASSERT_LE(store->TenantUsage(name)[kSsd], 8u) << "step " << step << " " << name;
      }
    }
    EXPECT_GT(hits, 1000u);
    ASSERT_TRUE(store->Close().ok());
  }
}

}  // namespace
}  // namespace cachedattn
