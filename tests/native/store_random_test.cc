// Random turns of several conversations against a dictionary of what a store may know: hits are
// always right bytes, caps hold, and the invariants hold after every step.
#include <unistd.h>

#include <random>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

struct World {
  uint32_t seed;
  PolicyKind policy;
  Sizes sizes;
  Truncation truncation;
  bool faults;
  bool encrypt = false;
  bool keep_on_device = true;
};

class StoreRandomTest : public ::testing::TestWithParam<World> {
 protected:
  static constexpr int kConversations = 6;

  void Open() {
    StoreOptions options = TinyOptions(GetParam().sizes, dir_ / "kv");
    options.policy.kind = GetParam().policy;
    options.dram_reserve = 0.1;
    options.keep_on_device = GetParam().keep_on_device;
    if (GetParam().faults) options.clock = &clock_;
    if (GetParam().encrypt) {
      WriteMasterKey(dir_ / "key");
      options.master_key_file = dir_ / "key";
    }
    std::unique_ptr<SsdTier> ssd;
    if (options.ssd_bytes != 0) {
      SsdOptions ssd_options = SsdOptionsOf(options);
      if (GetParam().faults) ssd_options.io.wrap = plan_.Wrap();
      auto tier = SsdTier::Open(ssd_options);
      ASSERT_TRUE(tier.ok()) << tier.status().message();
      ssd = std::move(tier.value());
    }
    auto store = OpenStoreOn(options, std::move(ssd), NewHostCopyEngine());
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(store.value());
  }

  uint32_t Random(uint32_t below) { return std::uniform_int_distribution(0u, below - 1)(random_); }

  // A running turn steps, ends, or is dropped.
  void Advance(int i) {
    std::unique_ptr<Turn>& turn = running_[i];
    if (Random(12) == 0) {
      turn.reset();
      return;
    }
    const Status status = turn->Step(1 + Random(30));
    if (status.code() == Code::kExhausted) {
      turn.reset();  // preempted
      return;
    }
    if (!status.ok()) {
      ASSERT_TRUE(GetParam().faults) << status.message();
      turn.reset();
      ++failed_;
      return;
    }
    if (turn->sequence()->num_computed_tokens() < turn->tokens().size()) return;
    histories_[i] = turn->tokens();
    turn->Commit();
    turn.reset();
  }

  // The next turn of a conversation, or its first one over again.
  void Start(int i) {
    if (histories_[i].size() > 14 * kBlock) {
      histories_[i] = MakeTokens(2 * kBlock, 1);  // a shared beginning
    }
    const uint32_t count = 1 + Random(40);
    Tokens tokens = histories_[i] + MakeTokens(count, 1000 + Random(1000000));
    auto turn = std::make_unique<Turn>(store_.get(), tokens, GetParam().truncation);
    const CachedTokens seen = store_->Lookup(*turn->chain());
    if (!turn->Begin()) return;
    EXPECT_EQ(turn->cached().total, seen.total);
    hits_ += turn->cached().total;
    running_[i] = std::move(turn);
  }

  void Queue() {
    std::vector<std::shared_ptr<Chain>> chains;
    for (int i = 0; i < kConversations; ++i) {
      if (running_[i] != nullptr || histories_[i].empty()) continue;
      chains.push_back(store_->NewChain("t", GetParam().truncation));
      chains.back()->Append(histories_[i] + MakeTokens(3, 5));
    }
    store_->SetQueue(chains);
  }

  void Reopen() {
    for (auto& turn : running_) turn.reset();
    plan_.Clear();  // opening and closing use the disk too
    outages_ += store_->stats().outages;
    Close();
    Open();
  }

  // Operations may be late then, and come back after it.
  void Close() {
    const Status status = store_->Close();
    EXPECT_TRUE(status.ok() || GetParam().faults) << status.message();
    store_.reset();
    while (FreeParkedStores() > 0) usleep(100);
  }

  void CheckCaps() {
    const StoreStats stats = store_->stats();
    const Sizes& sizes = GetParam().sizes;
    const uint32_t caps[] = {sizes.device, sizes.dram, sizes.ssd};
    for (uint32_t t = 0; t < kNumTiers; ++t) {
      EXPECT_LE(stats.tiers[t].used_slots, stats.tiers[t].capacity_slots);
      EXPECT_EQ(stats.tiers[t].capacity_slots, caps[t]);
    }
  }

  TempDir dir_;
  FaultPlan plan_;
  std::mt19937 random_{GetParam().seed};
  std::unique_ptr<AttentionStore> store_;
  Tokens histories_[kConversations];
  std::unique_ptr<Turn> running_[kConversations];
  ManualClock clock_;
  uint64_t hits_ = 0, outages_ = 0;
  uint32_t failed_ = 0;
};

INSTANTIATE_TEST_SUITE_P(
    Worlds, StoreRandomTest,
    ::testing::Values(World{1, PolicyKind::kLookahead, {24, 40, 0}, {}, false},
                      World{2, PolicyKind::kLru, {16, 0, 0}, {}, false},
                      World{3, PolicyKind::kLookahead, {20, 40, 24}, {}, false},
                      World{4, PolicyKind::kLookahead, {24, 40, 0}, {6 * kBlock, 0.5, 4}, false},
                      World{5, PolicyKind::kFifo, {20, 30, 24}, {5 * kBlock, 0.5, 0}, false},
                      World{6, PolicyKind::kLookahead, {16, 60, 0}, {}, true},
                      World{7, PolicyKind::kLru, {14, 60, 16}, {}, true},
                      World{8, PolicyKind::kLookahead, {20, 40, 24}, {}, false, true},
                      World{9, PolicyKind::kLookahead, {16, 60, 0}, {}, true, true},
                      World{10, PolicyKind::kLru, {20, 40, 24}, {}, false, false, false}));

TEST_P(StoreRandomTest, WhatIsFoundIsRight) {
  Open();
  for (Tokens& history : histories_) history = MakeTokens(2 * kBlock, 1);
  for (int step = 0; step < 2000; ++step) {
    SCOPED_TRACE("seed " + std::to_string(GetParam().seed) + ", step " + std::to_string(step));
    const int i = static_cast<int>(Random(kConversations));
    if (running_[i] != nullptr) {
      Advance(i);
    } else {
      Start(i);
    }
    if (Random(4) == 0) Queue();
    if (Random(3) == 0) store_->Poll();
    if (Random(60) == 0) store_->DropTier(Tier::kDram);
    if (Random(60) == 0) store_->DropTier(Tier::kDevice);
    if (Random(400) == 0) Reopen();
    if (GetParam().faults && Random(25) == 0) {
      plan_.Add({.op = Random(2) ? IoOp::kRead : IoOp::kWrite,
                 .kind = static_cast<FaultKind>(Random(3)),
                 .skip = Random(5),
                 .count = 1 + Random(3),
                 .flip_byte = Random(20000)});
    }
    clock_.Advance(ManualClock::kSecond);  // two of these are the I/O deadline
    store_->CheckInvariants();
    CheckCaps();
    ASSERT_FALSE(HasFailure());
  }
  EXPECT_GT(hits_, 10000u);
  if (GetParam().faults) {
    EXPECT_GT(plan_.fired(), 0u);
    EXPECT_GT(failed_ + outages_ + store_->stats().outages, 0u);
  } else {
    EXPECT_EQ(store_->stats().checksum_failures, 0u);
  }
  for (auto& turn : running_) turn.reset();
  Close();
}

}  // namespace
}  // namespace cachedattn
