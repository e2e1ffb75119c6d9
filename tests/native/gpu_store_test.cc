// The store over a GPU whose queues are threads: what is not ordered by a mark comes out of order.
#include <gtest/gtest.h>

#include <filesystem>

#include "csrc/copy/pinner.h"
#include "tests/native/testing/fake_gpu.h"
#include "tests/native/testing/master_key.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

// A turn whose computing runs later, on the GPU.
class GpuTurn {
 public:
  GpuTurn(AttentionStore* store, FakeGpu* gpu, std::atomic<uint64_t>* wrong, Tokens tokens,
          const Truncation& truncation)
      : store_(store),
        gpu_(gpu),
        wrong_(wrong),
        tokens_(std::move(tokens)),
        reference_(truncation, kBlock) {
    chain_ = store->NewChain("t", truncation);
    chain_->Append(tokens_);
  }

  bool Begin() {
    auto begun = store_->Begin(chain_, UINT32_MAX);
    if (!begun.ok()) return false;
    sequence_ = std::move(begun.value());
    for (uint32_t i = 0; i < sequence_->num_computed_tokens(); ++i) reference_.Push(tokens_[i]);
    return true;
  }

  // A step of at most `most` tokens, up to `end_layer`. False: there was no room for it.
  bool Step(uint32_t most, uint32_t end_layer = UINT32_MAX) {
    if (sequence_->room() == 0) sequence_->Truncate();
    const uint32_t done = sequence_->num_computed_tokens();
    const uint32_t count =
        std::min({most, static_cast<uint32_t>(tokens_.size()) - done, sequence_->room()});
    if (!sequence_->Reserve(count).ok()) return false;
    const uint32_t context = sequence_->context_len();
    for (uint32_t i = 0; i < count; ++i) reference_.Push(tokens_[done + i]);
    const auto hashes = std::make_shared<std::vector<uint64_t>>();
    for (uint32_t position : reference_.positions()) hashes->push_back(reference_.hash(position));
    const auto table = sequence_->block_table();
    const auto slots = std::make_shared<std::vector<int32_t>>(table.begin(), table.end());
    const uint32_t num_layers = store_->layout().num_layers;
    for (uint32_t layer = 0; layer < std::min(num_layers, end_layer); ++layer) {
      if (sequence_->loading() && !sequence_->WaitLayer(layer).ok()) {
        ADD_FAILURE() << "layer " << layer << " was not loaded";
        return false;
      }
      gpu_->Compute([store = store_, wrong = wrong_, hashes, slots, layer, context] {
        for (uint32_t place = 0; place < hashes->size(); ++place) {
          ForToken(store, *slots, place, layer, (*hashes)[place],
                   [&](uint16_t* element, uint16_t value) {
                     if (place >= context) *element = value;
                     *wrong += *element != value;
                   });
        }
      });
      sequence_->LayerDone(layer, count);
    }
    if (end_layer < num_layers) return true;
    sequence_->Append(std::span(tokens_).subspan(done, count));
    return true;
  }

  // Of the history; the error of a layer that did not come.
  Status WaitForAll() {
    Status status;
    for (uint32_t layer = 0; status.ok() && layer < store_->layout().num_layers; ++layer) {
      status = sequence_->WaitLayer(layer);
    }
    return status;
  }

  bool finished() const { return sequence_->num_computed_tokens() == tokens_.size(); }
  void Commit() { sequence_->Commit(); }
  const CachedTokens& cached() const { return sequence_->cached(); }
  Stalls stalls() const { return sequence_->stalls(); }

 private:
  AttentionStore* const store_;
  FakeGpu* const gpu_;
  std::atomic<uint64_t>* const wrong_;
  const Tokens tokens_;
  ReferenceContext reference_;
  std::shared_ptr<Chain> chain_;
  std::unique_ptr<Sequence> sequence_;
};

class GpuStoreTest : public ::testing::TestWithParam<uint64_t> {
 protected:
  void Open(const Sizes& sizes, bool poison, uint64_t seed, bool encrypt = false) {
    StoreOptions options = TinyOptions(sizes, dir_ / "kv");
    options.poison = poison;
    if (encrypt) WriteMasterKey(options.master_key_file = dir_ / "key");
    auto ssd = SsdTier::Open(SsdOptionsOf(options));
    ASSERT_TRUE(ssd.ok()) << ssd.status().message();
    auto gpu = std::make_unique<FakeGpu>(seed);
    gpu_ = gpu.get();
    auto store = OpenStoreOnGpu(options, std::move(ssd.value()), std::move(gpu));
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(store.value());
  }
  std::unique_ptr<GpuTurn> NewTurn(Tokens tokens, const Truncation& truncation = {}) {
    return std::make_unique<GpuTurn>(store_.get(), gpu_, &wrong_, std::move(tokens), truncation);
  }
  // One turn from its beginning to its end.
  CachedTokens Play(const Tokens& tokens) {
    const auto turn = NewTurn(tokens);
    EXPECT_TRUE(turn->Begin());
    const CachedTokens cached = turn->cached();
    while (turn->Step(24) && !turn->finished()) {
    }
    EXPECT_TRUE(turn->finished());
    turn->Commit();
    gpu_->Synchronize();
    EXPECT_EQ(wrong_, 0u);
    return cached;
  }

  TempDir dir_;
  std::atomic<uint64_t> wrong_ = 0;
  FakeGpu* gpu_ = nullptr;
  std::unique_ptr<AttentionStore> store_;
};

TEST_F(GpuStoreTest, TellsHowLongComputingWaited) {
  Open({.dram = 32, .ssd = 64, .device = 16}, false, 1);
  const Tokens tokens = MakeTokens(6 * kBlock, 3);
  (void)Play(tokens);
  store_->Flush();
  const uint64_t block = store_->layout().payload_bytes();
  EXPECT_EQ(store_->stats().bytes_saved, 6 * block);
  for (const Tier dropped : {Tier::kDevice, Tier::kDram}) {
    store_->DropTier(Tier::kDevice);
    if (dropped == Tier::kDram) store_->DropTier(Tier::kDram);
    const StoreStats before = store_->stats();
    gpu_->Delay(Gpu::Queue::kLoad, std::chrono::milliseconds(200));
    const auto turn = NewTurn(tokens + MakeTokens(3, 4));
    ASSERT_TRUE(turn->Begin());
    ASSERT_TRUE(turn->Step(24));
    gpu_->Synchronize(Gpu::Queue::kLoad);
    gpu_->Synchronize();
    store_->Poll();
    const StoreStats after = store_->stats();
    const int64_t waited_ns = turn->stalls().copy_ns + turn->stalls().ssd_ns;
    EXPECT_GT(waited_ns, 50'000'000);
    EXPECT_EQ(after.stalls.copy_ns - before.stalls.copy_ns, turn->stalls().copy_ns);
    EXPECT_EQ(after.stalls.ssd_ns - before.stalls.ssd_ns, turn->stalls().ssd_ns);
    if (dropped == Tier::kDevice) {
      EXPECT_EQ(turn->stalls().ssd_ns, 0);
    }
    EXPECT_EQ(after.bytes_loaded - before.bytes_loaded, 6 * block);
    EXPECT_GT(after.loading_ns, before.loading_ns);
    turn->Commit();
  }
}

TEST_F(GpuStoreTest, HistoryComesBackFromEveryTier) {
  Open({.dram = 32, .ssd = 64, .device = 16}, true, 1);
  const Tokens tokens = MakeTokens(5 * kBlock + 7, 3);
  EXPECT_EQ(Play(tokens).total, 0u);
  store_->Flush();
  EXPECT_EQ(From(Play(tokens + MakeTokens(4, 5)), Tier::kDevice), 5 * kBlock);
  store_->Flush();
  store_->DropTier(Tier::kDevice);
  EXPECT_EQ(From(Play(tokens + MakeTokens(9, 6)), Tier::kDram), 5 * kBlock);
  store_->DropTier(Tier::kDevice);
  store_->DropTier(Tier::kDram);
  EXPECT_GE(From(Play(tokens + MakeTokens(9, 7)), Tier::kSsd), 5 * kBlock);
  EXPECT_EQ(store_->stats().checksum_failures, 0u);
  EXPECT_TRUE(store_->Close().ok());
}

// Blocks, whole ones and a tail, that were saved wrong: the disk's copy is none.
TEST_F(GpuStoreTest, WhatWasNotComputedIsNotSealedIn) {
  for (const bool encrypt : {false, true}) {
    SCOPED_TRACE(encrypt);
    store_.reset();
    std::filesystem::remove_all(dir_ / "kv");
    Open({.dram = 32, .ssd = 64, .device = 16}, true, 1, encrypt);
    for (const uint32_t length : {2 * kBlock, 7u}) {
      const Tokens tokens = MakeTokens(length, 10 + length);
      store_->Flush();
      gpu_->spoil_next_save_ = true;
      (void)Play(tokens);
      store_->Flush();
      EXPECT_FALSE(gpu_->spoil_next_save_);
      store_->DropTier(Tier::kDevice);
      store_->DropTier(Tier::kDram);
      const uint64_t before = store_->stats().checksum_failures;
      {
        const auto turn = NewTurn(tokens + MakeTokens(3, 4));
        ASSERT_TRUE(turn->Begin());
        EXPECT_EQ(From(turn->cached(), Tier::kSsd), length);
        EXPECT_FALSE(turn->WaitForAll().ok());
      }
      EXPECT_GT(store_->stats().checksum_failures, before);
      EXPECT_LT(Play(tokens + MakeTokens(3, 4)).total, length);
    }
    EXPECT_TRUE(store_->Close().ok());
  }
}

TEST_F(GpuStoreTest, TheDramSlabIsPinnedInTheBackground) {
  Open({.dram = 32, .ssd = 64, .device = 16}, false, 1);
  const uint64_t slab = store_->stats().tiers[static_cast<int>(Tier::kDram)].capacity_bytes;
  while (store_->stats().pinned_bytes < slab) std::this_thread::yield();
  EXPECT_EQ(gpu_->pinned_, slab);
  EXPECT_EQ(store_->stats().pin_failure, "");
}

TEST(PinnerTest, StopsWhereNoMoreCanBePinnedAndSaysSo) {
  FakeGpu gpu(1);
  gpu.fail_pin_after_ = 2;
  constexpr uint64_t kSlot = 200 << 20;  // never touched
  auto slab = MapHostSlab(5 * kSlot);
  ASSERT_TRUE(slab.ok());
  {
    const Pinner pinner(&gpu, slab.value()->bytes(), kSlot);
    while (pinner.failure().empty()) std::this_thread::yield();
    EXPECT_EQ(pinner.pinned_bytes(), 2 * kSlot);
    EXPECT_EQ(pinner.failure(), "cannot pin more");
  }
  EXPECT_EQ(gpu.pinned_, 0u);
}

// Conversations that grow, are cut, branch, are given up in the middle of a step, and take each
// other's places; the host runs ahead of the GPU as far as it likes.
TEST_P(GpuStoreTest, NothingOvertakes) {
  const uint64_t seed = GetParam();
  SimRandom random(seed);
  Open({.dram = 24, .ssd = 48, .device = 20}, random.OneIn(4), seed);
  const Truncation truncations[] = {{}, {.window = 6 * kBlock, .ratio = 0.5, .keep_first = 4}};
  std::vector<Tokens> conversations(6);
  uint32_t from[kNumTiers] = {};
  for (uint32_t round = 0; round < 60; ++round) {
    std::vector<std::pair<std::unique_ptr<GpuTurn>, uint32_t>> running;
    for (uint32_t i = 0; i < 1 + random.Below(3); ++i) {
      const uint32_t which = random.Below(conversations.size());
      Tokens& tokens = conversations[which];
      if (tokens.size() > 8 * kBlock) tokens.resize(random.Below(3 * kBlock));
      tokens = tokens + MakeTokens(1 + random.Below(2 * kBlock), random.Below(1000));
      auto turn = NewTurn(tokens, truncations[which % 2]);
      if (!turn->Begin()) continue;
      for (uint32_t t = 0; t < kNumTiers; ++t) from[t] += turn->cached().by_tier[t];
      running.emplace_back(std::move(turn), random.OneIn(6) ? random.Below(4) : UINT32_MAX);
    }
    while (!running.empty()) {
      const uint32_t i = random.Below(running.size());
      auto& [turn, end_layer] = running[i];
      const bool stepped = turn->Step(1 + random.Below(24), end_layer);
      const bool ended = !stepped || end_layer != UINT32_MAX || turn->finished();
      if (stepped && end_layer == UINT32_MAX && turn->finished()) turn->Commit();
      if (ended) running.erase(running.begin() + i);
      if (random.OneIn(3)) store_->Poll();
      if (random.OneIn(5)) gpu_->Synchronize();
    }
    if (random.OneIn(8)) store_->DropTier(random.OneIn(2) ? Tier::kDevice : Tier::kDram);
    store_->CheckInvariants();
  }
  gpu_->Synchronize();
  EXPECT_EQ(wrong_, 0u) << "seed " << seed;
  for (uint32_t tokens : from) EXPECT_GT(tokens, 0u);
  EXPECT_GT(gpu_->compute_waits(), 0u);  // the host did run ahead
  EXPECT_GT(gpu_->save_waits(), 0u);
  EXPECT_EQ(store_->stats().checksum_failures, 0u);
  EXPECT_TRUE(store_->Close().ok());
}
INSTANTIATE_TEST_SUITE_P(Seeds, GpuStoreTest, ::testing::Range<uint64_t>(1, 37),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace cachedattn
