// One turn after another: what was computed is found again, from every tier.
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

// The same on the CPU (block tables index DRAM) and with an emulated device pool.
class StoreTest : public ::testing::TestWithParam<bool> {
 protected:
  Sizes With(uint32_t dram, uint32_t ssd) const { return {dram, ssd, GetParam() ? 24u : 0u}; }
  std::unique_ptr<AttentionStore> Open(uint32_t dram, uint32_t ssd) {
    return MustOpenStore(TinyOptions(With(dram, ssd), dir_ / "kv"));
  }
  Tier pool() const { return GetParam() ? Tier::kDevice : Tier::kDram; }

  TempDir dir_;
};
INSTANTIATE_TEST_SUITE_P(Cpu, StoreTest, ::testing::Values(false));
INSTANTIATE_TEST_SUITE_P(Device, StoreTest, ::testing::Values(true));

TEST_P(StoreTest, HistoryComesBackFromThePool) {
  const auto store = Open(16, 0);
  const Tokens tokens = MakeTokens(5 * kBlock, 1);
  EXPECT_EQ(PlayTurn(store.get(), tokens).total, 0u);
  const CachedTokens cached = PlayTurn(store.get(), tokens + MakeTokens(20, 2));
  EXPECT_EQ(cached.total, 5 * kBlock);
  EXPECT_EQ(From(cached, pool()), 5 * kBlock);
  EXPECT_EQ(store->stats().turns, 2u);
  EXPECT_EQ(store->stats().tokens_from[static_cast<int>(pool())], 5 * kBlock);
}

TEST_P(StoreTest, HistoryComesBackFromSsd) {
  const auto store = Open(16, 16);
  const Tokens tokens = MakeTokens(5 * kBlock + 3, 1);
  PlayTurn(store.get(), tokens);
  store->Flush();
  store->DropTier(Tier::kDevice);
  store->DropTier(Tier::kDram);
  EXPECT_EQ(store->stats().tiers[static_cast<int>(Tier::kDram)].used_slots, 0u);
  const uint64_t read_before = store->stats().ssd_bytes_read;
  const CachedTokens cached = PlayTurn(store.get(), tokens + MakeTokens(20, 2));
  EXPECT_EQ(cached.total, 5 * kBlock + 3);
  EXPECT_EQ(From(cached, Tier::kSsd), 5 * kBlock + 3);
  EXPECT_EQ(store->stats().ssd_bytes_read - read_before, 6 * store->layout().host_slot_bytes());
  EXPECT_EQ(store->stats().checksum_failures, 0u);
}

TEST_P(StoreTest, HistoryComesBackAfterReopening) {
  const Tokens tokens = MakeTokens(4 * kBlock + 7, 3);
  {
    const auto store = Open(16, 16);
    PlayTurn(store.get(), tokens);
    EXPECT_TRUE(store->Close().ok());
  }
  const auto store = Open(16, 16);
  const CachedTokens cached = PlayTurn(store.get(), tokens + MakeTokens(40, 4));
  EXPECT_EQ(cached.total, 4 * kBlock + 7);
  EXPECT_EQ(From(cached, Tier::kSsd), 4 * kBlock + 7);
}

TEST_P(StoreTest, EveryBlockIsWrittenOnce) {
  const auto store = Open(16, 16);
  Tokens tokens = MakeTokens(4 * kBlock, 3);
  for (uint32_t turn = 0; turn < 3; ++turn) {
    PlayTurn(store.get(), tokens);
    store->Flush();
    EXPECT_EQ(store->stats().ssd_bytes_written,
              tokens.size() / kBlock * store->layout().host_slot_bytes());
    tokens = tokens + MakeTokens(kBlock, 10 + turn);
  }
}

TEST_P(StoreTest, TwoConversationsShareAPrefix) {
  const auto store = Open(20, 0);
  const Tokens prefix = MakeTokens(3 * kBlock, 1);
  PlayTurn(store.get(), prefix);
  Turn a(store.get(), prefix + MakeTokens(20, 2));
  Turn b(store.get(), prefix + MakeTokens(20, 3));
  ASSERT_TRUE(a.Begin());
  ASSERT_TRUE(b.Begin());
  EXPECT_EQ(a.cached().total, 3 * kBlock);
  EXPECT_EQ(b.cached().total, 3 * kBlock);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(a.sequence()->block_table()[i], b.sequence()->block_table()[i]);
  }
  EXPECT_EQ(store->stats().tiers[static_cast<int>(pool())].pinned_slots, 3u);
  a.Finish(7);
  b.Finish(9);
  store->Flush();  // a save pins what it reads
  store->CheckInvariants();
  EXPECT_EQ(store->stats().tiers[static_cast<int>(pool())].pinned_slots, 0u);
}

TEST_P(StoreTest, SequencesThatComputeTheSameBothFinish) {
  const auto store = Open(20, 0);
  const Tokens tokens = MakeTokens(3 * kBlock + 5, 1);
  Turn a(store.get(), tokens), b(store.get(), tokens);
  ASSERT_TRUE(a.Begin());
  ASSERT_TRUE(b.Begin());
  while (a.sequence()->num_computed_tokens() < tokens.size()) {
    ASSERT_TRUE(a.Step(10).ok());
    ASSERT_TRUE(b.Step(10).ok());
    store->CheckInvariants();
  }
  a.Commit();
  b.Commit();
  store->Flush();
  store->CheckInvariants();
  EXPECT_EQ(PlayTurn(store.get(), tokens + tokens).total, tokens.size());
}

TEST_P(StoreTest, PartFilledTailIsExtendedAndReplaced) {
  const auto store = Open(16, 16);
  Tokens tokens = MakeTokens(2 * kBlock + 5, 1);
  PlayTurn(store.get(), tokens);
  for (uint32_t turn = 0; turn < 4; ++turn) {
    store->Flush();
    const auto before = static_cast<uint32_t>(tokens.size());
    tokens = tokens + MakeTokens(4, 50 + turn);
    EXPECT_EQ(PlayTurn(store.get(), tokens).total, before);
  }
  store->Flush();
  // 53 tokens: three full blocks and one tail; the shorter tails are gone.
  EXPECT_EQ(tokens.size(), 53u);
  EXPECT_EQ(store->stats().tiers[static_cast<int>(Tier::kSsd)].used_slots, 4u);
}

TEST_P(StoreTest, UnusedPlacesOfATailAreZeroOnDisk) {
  const auto store = Open(4, 16);
  PlayTurn(store.get(), MakeTokens(3 * kBlock, 1));  // leaves bytes in the slots
  store->DropTier(Tier::kDevice);
  store->DropTier(Tier::kDram);
  const Tokens tokens = MakeTokens(5, 2);
  PlayTurn(store.get(), tokens);
  store->Flush();
  store->DropTier(Tier::kDevice);
  store->DropTier(Tier::kDram);
  Turn turn(store.get(), tokens + tokens);
  ASSERT_TRUE(turn.Begin());
  ASSERT_EQ(turn.cached_from(Tier::kSsd), 5u);
  for (uint32_t layer = 0; layer < store->layout().num_layers; ++layer) {
    ASSERT_TRUE(turn.sequence()->WaitLayer(layer).ok());
    for (uint32_t place = 5; place < kBlock; ++place) {
      ForToken(store.get(), turn.sequence()->block_table(), place, layer, 0,
               [](const uint16_t* element, uint16_t) { ASSERT_EQ(*element, 0); });
    }
  }
}

TEST_P(StoreTest, LeavesOneTokenToCompute) {
  const auto store = Open(16, 0);
  const Tokens tokens = MakeTokens(3 * kBlock, 1);
  PlayTurn(store.get(), tokens);
  EXPECT_EQ(PlayTurn(store.get(), tokens).total, 2 * kBlock);
  Turn turn(store.get(), tokens);
  ASSERT_TRUE(turn.Begin(kBlock + 3));
  EXPECT_EQ(turn.cached().total, kBlock);
  turn.Finish();
}

TEST_P(StoreTest, TenantsDoNotShare) {
  const auto store = Open(16, 0);
  const Tokens tokens = MakeTokens(3 * kBlock, 1);
  PlayTurn(store.get(), tokens);
  Turn other(store.get(), tokens + tokens, {}, "other");
  ASSERT_TRUE(other.Begin());
  EXPECT_EQ(other.cached().total, 0u);
}

TEST_P(StoreTest, NoRoomChangesNothing) {
  const uint32_t slots = GetParam() ? 24 : 8;
  const auto store = Open(slots, 0);
  const Tokens tokens = MakeTokens((slots - 2) * kBlock, 1);
  Turn running(store.get(), tokens);
  ASSERT_TRUE(running.Begin());
  ASSERT_TRUE(running.sequence()->Reserve((slots - 2) * kBlock).ok());
  Turn second(store.get(), MakeTokens(5 * kBlock, 2));
  ASSERT_TRUE(second.Begin());
  EXPECT_EQ(second.sequence()->Reserve(3 * kBlock).code(), Code::kExhausted);
  EXPECT_EQ(second.sequence()->block_table().size(), 0u);
  EXPECT_TRUE(second.sequence()->Reserve(2 * kBlock).ok());
  EXPECT_EQ(store->stats().tiers[static_cast<int>(pool())].used_slots, slots);
  store->CheckInvariants();
}

TEST_P(StoreTest, CloseIsRefusedWhileASequenceRuns) {
  const auto store = Open(8, 8);
  Turn turn(store.get(), MakeTokens(20, 1));
  ASSERT_TRUE(turn.Begin());
  EXPECT_EQ(store->Close().code(), Code::kBusy);
  turn.Finish();
  EXPECT_TRUE(store->Close().ok());
  EXPECT_TRUE(store->Close().ok());
  EXPECT_EQ(store->Begin(turn.chain(), 5).status().code(), Code::kClosed);
}

TEST_P(StoreTest, ASequenceMayOutliveItsStore) {
  auto store = Open(8, 8);
  Turn turn(store.get(), MakeTokens(20, 1));
  ASSERT_TRUE(turn.Begin());
  store.reset();
  turn.Drop();
}

TEST_P(StoreTest, ASequenceWithoutCommitLeavesItsFullBlocks) {
  const auto store = Open(8, 0);
  const Tokens tokens = MakeTokens(2 * kBlock + 5, 1);
  {
    Turn turn(store.get(), tokens);
    ASSERT_TRUE(turn.Begin());
    ASSERT_TRUE(turn.Step(100).ok());
  }
  store->Flush();
  store->CheckInvariants();
  EXPECT_EQ(PlayTurn(store.get(), tokens).total, 2 * kBlock);
}

TEST(StoreOptionsTest, BadOptionsAreNamed) {
  const auto message = [](StoreOptions options) {
    auto store = AttentionStore::Open(options);
    EXPECT_EQ(store.status().code(), Code::kInvalidArgument);
    return store.status().message();
  };
  StoreOptions options = TinyOptions({8, 0, 0});
  options.dram_bytes = 100;
  EXPECT_NE(message(options).find("dram_bytes"), std::string::npos);
  options = TinyOptions({8, 0, 0});
  options.device_bytes = 100;
  EXPECT_NE(message(options).find("device_bytes"), std::string::npos);
  options = TinyOptions({8, 0, 0});
  options.dram_reserve = 0.9;
  EXPECT_NE(message(options).find("dram_reserve"), std::string::npos);
  options = TinyOptions({8, 8, 0});
  EXPECT_NE(message(options).find("path"), std::string::npos);
  options.path = "x";
  options.io_depth = 0;
  EXPECT_NE(message(options).find("io_depth"), std::string::npos);
  options.layout.num_layers = 0;
  EXPECT_NE(message(options).find("num_layers"), std::string::npos);
}

}  // namespace
}  // namespace cachedattn
