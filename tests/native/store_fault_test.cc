// Damage, errors and delays below the store: a miss, never wrong bytes, never a dead request.
#include <unistd.h>

#include <fstream>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

struct World {
  bool device;
  bool encrypt;
};

class StoreFaultTest : public ::testing::TestWithParam<World> {
 protected:
  std::unique_ptr<AttentionStore> Open(uint32_t dram = 16, uint32_t ssd = 16) {
    StoreOptions options = TinyOptions({dram, ssd, GetParam().device ? 20u : 0u}, dir_ / "kv");
    if (GetParam().encrypt) {
      WriteMasterKey(dir_ / "key");
      options.master_key_file = dir_ / "key";
    }
    SsdOptions ssd_options = SsdOptionsOf(options);
    ssd_options.io.wrap = plan_.Wrap();
    auto tier = SsdTier::Open(ssd_options);
    EXPECT_TRUE(tier.ok()) << tier.status().message();
    auto store = OpenStoreOn(options, std::move(tier.value()), NewHostCopyEngine());
    EXPECT_TRUE(store.ok()) << store.status().message();
    return std::move(store.value());
  }

  // A store whose only copies of `tokens_` are on SSD.
  std::unique_ptr<AttentionStore> OpenOnSsd() {
    auto store = Open();
    PlayTurn(store.get(), tokens_);
    store->Flush();
    store->DropTier(Tier::kDevice);
    store->DropTier(Tier::kDram);
    return store;
  }

  // Waits for every layer; the first status that is not ok.
  static Status WaitAll(Turn* turn, AttentionStore* store) {
    for (uint32_t layer = 0; layer < store->layout().num_layers; ++layer) {
      if (Status status = turn->sequence()->WaitLayer(layer); !status.ok()) return status;
    }
    return Status();
  }

  // Flips one byte of payload in the slot of the file that holds block `depth` of the chain.
  void FlipByteOfBlock(uint32_t depth) {
    const KvLayout layout = TinyLayout();
    std::fstream file(dir_ / "kv/blocks", std::ios::in | std::ios::out | std::ios::binary);
    ASSERT_TRUE(file.is_open());
    const uint64_t at =
        kFirstSlot + depth * layout.host_slot_bytes() + layout.host_slice_offset(2) + 77;
    file.seekg(static_cast<int64_t>(at));
    const char byte = static_cast<char>(file.get() ^ 4);
    file.seekp(static_cast<int64_t>(at));
    file.put(byte);
    ASSERT_TRUE(file.good());
  }

  const Tokens tokens_ = MakeTokens(4 * kBlock + 3, 1);
  TempDir dir_;
  FaultPlan plan_;
};
INSTANTIATE_TEST_SUITE_P(Cpu, StoreFaultTest, ::testing::Values(World{false, false}));
INSTANTIATE_TEST_SUITE_P(Device, StoreFaultTest, ::testing::Values(World{true, false}));
INSTANTIATE_TEST_SUITE_P(Encrypted, StoreFaultTest,
                         ::testing::Values(World{false, true}, World{true, true}));

TEST_P(StoreFaultTest, ACorruptBlockEndsTheHistoryBeforeIt) {
  ASSERT_TRUE(OpenOnSsd()->Close().ok());
  FlipByteOfBlock(2);  // a new file is filled from its first slot on
  const auto store = Open();
  {
    Turn turn(store.get(), tokens_ + tokens_);
    ASSERT_TRUE(turn.Begin());
    EXPECT_EQ(turn.cached().total, tokens_.size());
    EXPECT_EQ(WaitAll(&turn, store.get()).code(), Code::kCorrupt);
    store->CheckInvariants();
  }
  EXPECT_EQ(store->stats().failed_loads, 1u);
  EXPECT_GT(store->stats().checksum_failures, 0u);
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_).total, 2 * kBlock);
  store->Flush();
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_ + tokens_).total, 2 * tokens_.size());
}

TEST_P(StoreFaultTest, AReadErrorReachesEveryWaiter) {
  const auto store = OpenOnSsd();
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kError, .skip = 6, .count = 1000});
  Turn a(store.get(), tokens_ + tokens_), b(store.get(), tokens_ + MakeTokens(9, 5));
  ASSERT_TRUE(a.Begin());
  ASSERT_TRUE(b.Begin());
  const Status status_a = WaitAll(&a, store.get()), status_b = WaitAll(&b, store.get());
  ASSERT_GT(plan_.fired(), 0u);
  ASSERT_GT(store->stats().failed_loads, 0u);
  EXPECT_FALSE(status_a.ok());
  EXPECT_FALSE(status_b.ok());
  a.Drop();
  store->CheckInvariants();
  b.Drop();
  store->DropTier(Tier::kDram);
  store->CheckInvariants();
  EXPECT_LT(store->Lookup(*a.chain()).total, tokens_.size());
}

TEST_P(StoreFaultTest, AFlipOnTheWayIsReadAgain) {
  const auto store = OpenOnSsd();
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kFlip, .skip = 3, .flip_byte = 5});
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + tokens_).total, tokens_.size());
  EXPECT_EQ(plan_.fired(), 1u);
  EXPECT_EQ(store->stats().failed_loads, 0u);
  EXPECT_GT(store->stats().checksum_failures, 0u);
}

TEST_P(StoreFaultTest, AFailedWriteLeavesTheDramCopyAndIsNotTriedAgain) {
  const auto store = Open();
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .count = 4, .error = ENOSPC});
  PlayTurn(store.get(), tokens_);
  store->Flush();
  EXPECT_EQ(plan_.fired(), 4u);
  EXPECT_EQ(store->stats().failed_saves, 4u);
  EXPECT_EQ(store->stats().resting_slots, 4u);
  EXPECT_EQ(PlayTurn(store.get(), tokens_ + MakeTokens(3, 2)).total, tokens_.size());
  for (int i = 0; i < 50; ++i) store->Poll();
  store->Flush();
  EXPECT_EQ(store->stats().failed_saves, 4u);
  // One of the first five blocks, and the new tail.
  EXPECT_EQ(store->stats().ssd_bytes_written, 2 * TinyLayout().host_slot_bytes());
  store->CheckInvariants();
}

TEST_P(StoreFaultTest, FailedWritesDoNotHoldTheirSlots) {
  const auto store = Open(/*dram=*/8);
  plan_.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .count = 4, .error = EIO});
  PlayTurn(store.get(), tokens_);
  store->Flush();
  ASSERT_EQ(store->stats().failed_saves, 4u);
  PlayTurn(store.get(), MakeTokens(6 * kBlock, 7));  // needs room in DRAM
  store->Flush();
  EXPECT_GT(store->stats().evictions[static_cast<int>(Tier::kDram)], 0u);
  EXPECT_EQ(store->stats().failed_saves, 4u) << "each block was tried once";
  store->CheckInvariants();
}

TEST_P(StoreFaultTest, ASequenceMayEndWhileItsLoadsAreUnderWay) {
  const auto store = OpenOnSsd();
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold, .skip = 2, .count = 3});
  Turn turn(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(turn.Begin());
  store->Poll();
  ASSERT_EQ(plan_.fired(), 3u);
  turn.Drop();
  store->CheckInvariants();
  // Slots that bytes are still landing in belong to nobody else.
  Turn other(store.get(), MakeTokens(6 * kBlock, 9));
  ASSERT_TRUE(other.Begin());
  ASSERT_TRUE(other.Step(6 * kBlock).ok());
  plan_.Release();
  Turn again(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(again.Begin());
  EXPECT_EQ(again.cached().total, tokens_.size());
  ASSERT_TRUE(again.Step(7).ok());
  other.CheckLayer(1, 6 * kBlock);
  other.Drop();
  again.Drop();
  store->DropTier(Tier::kDevice);
  store->DropTier(Tier::kDram);
  store->CheckInvariants();
  EXPECT_EQ(store->stats().tiers[static_cast<int>(Tier::kDram)].used_slots, 0u);
}

TEST_P(StoreFaultTest, ASequenceMayOutliveItsStoreWithLoadsUnderWay) {
  auto store = OpenOnSsd();
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold, .skip = 2, .count = 3});
  Turn turn(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(turn.Begin());
  store.reset();
  ASSERT_EQ(plan_.fired(), 3u);
  plan_.Release();
  turn.Drop();
  EXPECT_EQ(PlayTurn(Open().get(), tokens_ + tokens_).total, tokens_.size());
}

TEST_P(StoreFaultTest, ALayerComputesWhileTheNextIsBeingRead) {
  const auto store = OpenOnSsd();
  // Each layer is a group. Layer 0 of the five blocks passes, the rest is held.
  plan_.Add({.op = IoOp::kRead, .kind = FaultKind::kHold, .skip = 5, .count = 15});
  store->EnableTrace(true);
  Turn turn(store.get(), tokens_ + tokens_);
  ASSERT_TRUE(turn.Begin());
  ASSERT_TRUE(turn.sequence()->Reserve(4).ok());
  for (uint32_t layer = 0; layer < store->layout().num_layers; ++layer) {
    ASSERT_TRUE(turn.sequence()->WaitLayer(layer).ok());
    if (layer == 0) {
      EXPECT_EQ(plan_.fired(), 15u) << "all other reads have started";
      EXPECT_TRUE(turn.sequence()->loading());
    }
    turn.CheckLayer(layer, static_cast<uint32_t>(tokens_.size()));
    turn.sequence()->LayerDone(layer, 4);
    if (layer == 0) plan_.Release();
  }
  turn.Drop();
  int64_t computed_0 = 0;
  uint32_t reads_during_compute = 0;
  for (const TraceEvent& event : store->TakeTrace()) {
    if (event.kind == TraceKind::kComputeEnd && event.first_layer == 0) computed_0 = event.time_ns;
    if (event.kind == TraceKind::kReadEnd && event.first_layer > 0) {
      EXPECT_GT(event.time_ns, computed_0);
      EXPECT_GT(computed_0, 0);
      ++reads_during_compute;
    }
  }
  EXPECT_EQ(reads_during_compute, 15u);
}

TEST_P(StoreFaultTest, SavesLeaveWhileLaterLayersCompute) {
  if (!GetParam().device) GTEST_SKIP() << "on the CPU a block is saved in place";
  const auto store = Open();
  store->EnableTrace(true);
  Turn turn(store.get(), MakeTokens(2 * kBlock, 1));
  ASSERT_TRUE(turn.Begin());
  ASSERT_TRUE(turn.Step(2 * kBlock).ok());
  std::vector<TraceKind> kinds;
  for (const TraceEvent& event : store->TakeTrace()) {
    const bool compute = event.kind == TraceKind::kComputeEnd;
    if (compute || event.kind == TraceKind::kSaveStart) kinds.push_back(event.kind);
  }
  // Each layer's end is followed by the saves of that layer of both blocks.
  ASSERT_EQ(kinds.size(), 12u);
  for (size_t i = 0; i < kinds.size(); ++i) {
    EXPECT_EQ(kinds[i], i % 3 == 0 ? TraceKind::kComputeEnd : TraceKind::kSaveStart);
  }
  turn.Commit();
  store->Flush();
  store->CheckInvariants();
}

}  // namespace
}  // namespace cachedattn
