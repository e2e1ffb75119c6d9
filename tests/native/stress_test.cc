// Turns at full speed on real engines, with faults among them: every byte that is read is right,
// nothing grows, and the files stay within their bound. Made for sanitizers (short), and for a soak
// (long):
//
//   CACHEDATTN_STRESS_OPS    block operations in all: blocks found, published, read or written
//                            (default 200,000, under a sanitizer 50,000; a soak: 50,000,000)
//   CACHEDATTN_STRESS_SEED   default 1
//
// Ends with one line. From 10 million operations on, memory must be flat: less than 1 MiB for what
// an hour brings at 2000 block operations a second.
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kOperations = 50'000;
#else
constexpr uint64_t kOperations = 200'000;
#endif

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

double RssMib() {
  uint64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return static_cast<double>(resident * kPage) / (1 << 20);
}

size_t NumFiles() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(files), end(files)));
}

// One store with its conversations.
class Load {
 public:
  Load(IoKind io, bool device, uint64_t seed) : random_(seed) {
    options_ = TinyOptions({48, 160, device ? 40u : 0u}, dir_ / "kv");
    options_.dram_reserve = 0.1;
    options_.clock = &clock_;
    options_.io = io;
    options_.io_deadline_us = 20'000'000;
    Open();
  }
  ~Load() { Close(); }

  void Step() {
    const uint32_t i = Random(kConversations);
    if (running_[i] != nullptr) {
      Advance(i);
    } else {
      Start(i);
    }
    if (Random(3) == 0) store_->Poll();
    if (Random(200) == 0) Drop(Tier::kDram);
    if (Random(200) == 0) Drop(Tier::kDevice);
    if (Random(20'000) == 0) {
      Close();
      Open();
    }
    if (Random(500) == 0) Break();
    if (Random(1000) == 0) Check();
    clock_.Advance(ManualClock::kSecond / 10);
  }

  // Since the beginning, closed stores included.
  uint64_t block_operations() const { return operations_ + Moved(); }
  uint64_t faults() const { return plan_.fired(); }
  uint64_t outages() const { return outages_ + store_->stats().outages; }

 private:
  static constexpr uint32_t kConversations = 6;

  uint32_t Random(uint32_t below) { return static_cast<uint32_t>(random_() % below); }

  void Open() {
    SsdOptions ssd = SsdOptionsOf(options_);
    ssd.io.kind = options_.io;
    ssd.io.wrap = plan_.Wrap();
    auto tier = SsdTier::Open(ssd);
    ASSERT_TRUE(tier.ok()) << tier.status().message();
    auto store = OpenStoreOn(options_, std::move(tier.value()), NewHostCopyEngine());
    ASSERT_TRUE(store.ok()) << store.status().message();
    store_ = std::move(store.value());
  }

  void Close() {
    for (auto& turn : running_) turn.reset();
    plan_.Clear();
    plan_.Release();
    store_->CheckInvariants();
    operations_ += Moved();
    outages_ += store_->stats().outages;
    const Status status = store_->Close();
    EXPECT_TRUE(status.ok() || store_->stats().late_ios > 0) << status.message();
    store_.reset();
    while (FreeParkedStores() > 0) usleep(100);
  }

  uint64_t Moved() const {
    const StoreStats stats = store_->stats();
    return (stats.ssd_bytes_read + stats.ssd_bytes_written) / options_.layout.host_slot_bytes();
  }

  void Start(uint32_t i) {
    if (histories_[i].empty() || histories_[i].size() > 10 * kBlock) {
      histories_[i] = MakeTokens(2 * kBlock, Random(4));  // beginnings that some share
    }
    Tokens tokens = histories_[i] + MakeTokens(1 + Random(60), 1000 + Random(1'000'000));
    auto turn = std::make_unique<Turn>(store_.get(), std::move(tokens));
    if (!turn->Begin()) return;
    operations_ += turn->sequence()->block_table().size();
    running_[i] = std::move(turn);
  }

  void Advance(uint32_t i) {
    std::unique_ptr<Turn>& turn = running_[i];
    const size_t before = turn->sequence()->context_len() / kBlock;
    if (Random(20) == 0 || !turn->Step(1 + Random(40)).ok()) {
      turn.reset();  // cancelled, preempted, or its history was lost
      return;
    }
    operations_ += turn->sequence()->context_len() / kBlock - before;
    if (!turn->finished()) return;
    histories_[i] = turn->tokens();
    turn->Commit();
    turn.reset();
    ++operations_;
  }

  void Drop(Tier tier) { store_->DropTier(tier); }

  void Check() {
    store_->CheckInvariants();
    uint64_t on_disk = 0;
    for (const auto& file : std::filesystem::directory_iterator(options_.path)) {
      struct stat facts;
      ASSERT_EQ(::stat(file.path().c_str(), &facts), 0);
      on_disk += static_cast<uint64_t>(facts.st_blocks) * 512;
    }
    EXPECT_LE(on_disk, options_.ssd_bytes + kPage) << "and the page of LOCK";
  }

  void Break() {
    plan_.Add({.op = Random(2) ? IoOp::kRead : IoOp::kWrite,
               .kind = static_cast<FaultKind>(Random(3)),
               .skip = Random(5),
               .count = 1 + Random(2),
               .flip_byte = Random(20000)});
  }

  TempDir dir_;
  ManualClock clock_;
  FaultPlan plan_;
  std::mt19937_64 random_;
  StoreOptions options_;
  std::unique_ptr<AttentionStore> store_;
  Tokens histories_[kConversations];
  std::unique_ptr<Turn> running_[kConversations];
  uint64_t operations_ = 0, outages_ = 0;
};

TEST(StressTest, NothingIsWrongAndNothingGrows) {
  const uint64_t wanted = FromEnvironment("CACHEDATTN_STRESS_OPS", kOperations);
  const uint64_t seed = FromEnvironment("CACHEDATTN_STRESS_SEED", 1);
  SCOPED_TRACE("CACHEDATTN_STRESS_SEED=" + std::to_string(seed) +
               " CACHEDATTN_STRESS_OPS=" + std::to_string(wanted));
  const auto start = std::chrono::steady_clock::now();
  uint64_t done = 0, faults = 0, outages = 0;
  double settled_mib = 0, last_mib = 0;
  uint64_t settled_at = 0;
  size_t files = 0;
  {
    std::vector<std::unique_ptr<Load>> loads;
    for (const IoKind io : {IoKind::kAuto, IoKind::kThreads}) {
      for (const bool device : {false, true}) {
        loads.push_back(std::make_unique<Load>(io, device, seed + loads.size()));
      }
    }
    const auto sum = [&](uint64_t (Load::*count)() const) {
      uint64_t all = 0;
      for (const auto& load : loads) all += (*load.*count)();
      return all;
    };
    files = NumFiles();
    while (done < wanted && !::testing::Test::HasFailure()) {
      for (int i = 0; i < 1000; ++i) loads[static_cast<size_t>(i) % loads.size()]->Step();
      done = sum(&Load::block_operations);
      if (settled_at == 0 && done > wanted / 4) {
        settled_at = done;
        settled_mib = RssMib();
      }
    }
    faults = sum(&Load::faults);
    outages = sum(&Load::outages);
    last_mib = RssMib();
    EXPECT_EQ(NumFiles(), files);
  }
  const double growth = last_mib - settled_mib;
  const double hours = static_cast<double>(done - settled_at) / (2000.0 * 3600);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf(
      "operations=%llu seconds=%.0f faults=%llu outages=%llu rss_mib=%.1f "
      "mib_per_hour=%.2f files=%zu\n",
      static_cast<unsigned long long>(done), seconds, static_cast<unsigned long long>(faults),
      static_cast<unsigned long long>(outages), last_mib, growth / hours, files);
  EXPECT_GT(faults, 0u);
  EXPECT_TRUE(done < 10'000'000 || growth < hours);
}

}  // namespace
}  // namespace cachedattn
