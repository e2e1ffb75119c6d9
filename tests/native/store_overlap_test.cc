// A cold turn: how long its layers wait for the disk, in the time of a modelled disk that moves a
// given number of bytes a second, first come, first served.
#include <gtest/gtest.h>

#include <deque>
#include <filesystem>

#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

// Does what it is asked on the real file at once, and says so when the modelled disk would.
class ModelledDisk final : public IoEngine {
 public:
  ModelledDisk(std::unique_ptr<IoEngine> inner, double* now)
      : inner_(std::move(inner)), now_(*now) {}

  void Submit(const IoRequest& request) override {
    inner_->Submit(request);
    IoCompletion done;
    while (inner_->Poll(std::span(&done, 1), 1'000'000) == 0) {
    }
    free_at_ = std::max(free_at_, now_) + request.size;
    finished_.emplace_back(free_at_, done);
  }
  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override {
    if (timeout_us > 0 && !finished_.empty()) now_ = std::max(now_, finished_.front().first);
    size_t count = 0;
    while (count < out.size() && !finished_.empty() && finished_.front().first <= now_) {
      out[count++] = finished_.front().second;
      finished_.pop_front();
    }
    return count;
  }
  uint32_t depth() const override { return inner_->depth(); }
  uint32_t in_flight() const override { return static_cast<uint32_t>(finished_.size()); }
  const char* name() const override { return inner_->name(); }
  const std::string& why() const override { return inner_->why(); }

 private:
  std::unique_ptr<IoEngine> inner_;
  double& now_;  // in bytes that the disk could have moved
  double free_at_ = 0;
  std::deque<std::pair<double, IoCompletion>> finished_;
};

// A byte takes a nanosecond.
class DiskClock final : public Clock {
 public:
  explicit DiskClock(const double* now) : now_(*now) {}
  int64_t NowNs() const override { return static_cast<int64_t>(now_); }

 private:
  const double& now_;
};

class OverlapTest : public ::testing::Test {
 protected:
  // Leaves a history of `num_blocks` blocks on the SSD alone.
  void Fill(const KvLayout& layout, uint32_t num_blocks) {
    StoreOptions options;
    options.layout = layout;
    options.dram_bytes = (num_blocks + 2) * layout.host_slot_bytes();
    options.ssd_bytes = SsdFileBytes(layout, num_blocks + 1);
    options.path = dir_ / "kv";
    options.dram_reserve = 0;
    options.clock = &clock_;
    SsdOptions ssd = SsdOptionsOf(options);
    ssd.io.wrap = [this](std::unique_ptr<IoEngine> engine) {
      return std::make_unique<ModelledDisk>(std::move(engine), &now_);
    };
    auto tier = SsdTier::Open(ssd);
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    auto store = OpenStoreOn(options, std::move(tier.value()), nullptr);
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(store.value());
    tokens_ = MakeTokens(num_blocks * layout.block_size + 1, 1);
    const auto sequence = Begin();
    const auto count = static_cast<uint32_t>(tokens_.size() - 1);
    ASSERT_TRUE(sequence->Reserve(count).ok());
    sequence->Append(std::span(tokens_).first(count));
    sequence->Commit();
    bytes_ = num_blocks * layout.host_slot_bytes();
  }
  std::unique_ptr<Sequence> Begin() {
    auto chain = store_->NewChain("t", {});
    chain->Append(tokens_);
    return std::move(store_->Begin(std::move(chain), UINT32_MAX).value());
  }

  // A cold turn whose layers take `compute` x the reading of the whole history together. The time
  // that they wait, by the time of reading it all; `first`: that of the first of them.
  double Stall(double compute, double* first) {
    store_->DropTier(Tier::kDram);
    const uint32_t num_layers = store_->layout().num_layers;
    const StoreStats before_turn = store_->stats();
    const double begin = now_;
    const auto sequence = Begin();
    double waited = 0, loaded = 0;
    for (uint32_t layer = 0; layer < num_layers; ++layer) {
      const double before = now_;
      EXPECT_TRUE(sequence->WaitLayer(layer).ok());
      waited += now_ - before;
      if (layer == 0) *first = waited / bytes_;
      if (loaded == 0 && !sequence->loading()) loaded = now_ - begin;
      now_ += compute * bytes_ / num_layers;
    }
    EXPECT_FALSE(sequence->loading());
    // What the store tells of it, to a nanosecond for each look.
    const StoreStats stats = store_->stats();
    EXPECT_NEAR(sequence->stalls().ssd_ns, waited, 100);
    EXPECT_EQ(sequence->stalls().copy_ns, 0);
    EXPECT_EQ(stats.stalls.ssd_ns - before_turn.stalls.ssd_ns, sequence->stalls().ssd_ns);
    EXPECT_NEAR(stats.loading_ns - before_turn.loading_ns, loaded, 100);
    return waited / bytes_;
  }

  TempDir dir_;
  std::unique_ptr<AttentionStore> store_;
  Tokens tokens_;
  double now_ = 0, bytes_ = 0;
  const DiskClock clock_{&now_};
};

TEST_F(OverlapTest, AColdTurnWaitsForWhatComputingCannotHide) {
  // SmolLM2-135M, as many layers of 256 KiB slices, and a history of many small ones.
  const KvLayout layouts[] = {{30, 3, 64, 64}, {30, 16, 64, 64}, {30, 1, 16, 64}};
  for (const KvLayout& layout : layouts) {
    Fill(layout, 2'000'000 / layout.slice_stride());
    const double layer = 1.0 / layout.num_layers;
    for (const double compute : {0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 3.0}) {
      double first = 0;
      const double stall = Stall(compute, &first);
      const double left = std::max(0.0, 1 - compute);
      SCOPED_TRACE("compute " + std::to_string(compute) + ": stall " + std::to_string(stall));
      EXPECT_LT(first, 2 * layer);  // the header page comes with the first layer
      EXPECT_LE(stall, left + 5 * layer);
      if (compute <= 0.6) {
        EXPECT_LE(stall, 1.15 * left);
      }
      if (compute >= 1.5) {
        EXPECT_LT(stall, 3 * layer);
      }
    }
    store_.reset();
    std::filesystem::remove_all(dir_ / "kv");
  }
}

}  // namespace
}  // namespace cachedattn
