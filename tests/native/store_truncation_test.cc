// Overflow cuts: what stays, stays valid on every tier, and is found again.
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

struct Case {
  Truncation truncation;
  bool device;
};

class StoreTruncationTest : public ::testing::TestWithParam<Case> {
 protected:
  std::unique_ptr<AttentionStore> Open(uint32_t dram, uint32_t ssd) {
    const uint32_t device = GetParam().device ? 20 : 0;
    return MustOpenStore(TinyOptions({dram, ssd, device}, dir_ / "kv"));
  }
  TempDir dir_;
};

INSTANTIATE_TEST_SUITE_P(
    Windows, StoreTruncationTest,
    ::testing::Values(Case{{4 * kBlock, 0.5, 0}, false}, Case{{4 * kBlock, 0.5, 4}, false},
                      Case{{6 * kBlock + 5, 0.3, 20}, false}, Case{{3 * kBlock, 1.0, 0}, false},
                      Case{{4 * kBlock, 0.5, 0}, true}, Case{{5 * kBlock, 0.5, 4}, true}));

TEST_P(StoreTruncationTest, OverflowsInARowKeepTheRightBytes) {
  const auto store = Open(40, 0);
  PlayTurn(store.get(), MakeTokens(20 * kBlock + 7, 1), GetParam().truncation);
}

TEST_P(StoreTruncationTest, TurnsAcrossOverflowsNeverRecompute) {
  const auto store = Open(60, 60);
  Tokens tokens = MakeTokens(30, 1);
  for (uint32_t turn = 0; turn < 12; ++turn) {
    PlayTurn(store.get(), tokens, GetParam().truncation);
    store->Flush();
    if (turn % 2 == 1) {
      store->DropTier(Tier::kDevice);
      store->DropTier(Tier::kDram);
    }
    const auto before = static_cast<uint32_t>(tokens.size());
    tokens = tokens + MakeTokens(29, 100 + turn);
    Turn next(store.get(), tokens, GetParam().truncation);
    ASSERT_TRUE(next.Begin());
    EXPECT_EQ(next.cached().total, before) << "turn " << turn;
    next.Drop();
  }
}

TEST_P(StoreTruncationTest, DroppedBlocksNeedNotBeThere) {
  const Tokens tokens = MakeTokens(15 * kBlock + 7, 1);
  const Truncation& truncation = GetParam().truncation;
  // The DRAM holds little more than the window: dropped blocks make room for new ones.
  const uint32_t window = truncation.window / kBlock;
  const auto store = Open(window + 2, 0);
  PlayTurn(store.get(), Tokens(tokens.begin(), tokens.end() - 7), truncation);
  store->Flush();  // else the tail may find no slot
  PlayTurn(store.get(), tokens, truncation);
  store->Flush();
  EXPECT_GT(store->stats().evictions[static_cast<int>(Tier::kDram)], 0u);
  const CachedTokens cached = PlayTurn(store.get(), tokens + MakeTokens(5, 2), truncation);
  EXPECT_EQ(cached.total, tokens.size());
  EXPECT_LT(From(cached, Tier::kDram) + From(cached, Tier::kDevice), tokens.size());
}

TEST_P(StoreTruncationTest, OtherCutsDoNotShareLaterBlocks) {
  const auto store = Open(60, 0);
  const Tokens tokens = MakeTokens(10 * kBlock, 1);
  PlayTurn(store.get(), tokens, GetParam().truncation);
  const CachedTokens plain = PlayTurn(store.get(), tokens + tokens);
  EXPECT_EQ(plain.total, GetParam().truncation.window / kBlock * kBlock);
}

}  // namespace
}  // namespace cachedattn
