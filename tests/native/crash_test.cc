// A process that plays turns is killed, or its disk loses power, at a random moment; then the store
// must open, and every block in it must be right or absent. Long runs:
//   crash_test --gtest_filter=Crash.Kill --cycles=10000 --seed=1
//   crash_test --gtest_filter=Crash.PowerCut --cycles=5000 --seed=1
#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <filesystem>

#include "tests/native/testing/ledger.h"
#include "tests/native/testing/loop_disk.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

uint32_t cycles_asked = 0;  // 0: as many as the test runs in CI
uint32_t seed_asked = 1;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint32_t kShare = 10;  // a process takes ten times as long to start and to die
#else
constexpr uint32_t kShare = 1;
#endif
constexpr uint32_t kLifeUs = kShare > 1 ? 200'000 : 50'000;  // a child lives at most this long
constexpr uint32_t kCyclesOfAStore = 10;                     // then it begins with an empty one

// What a child that may die at any moment leaves to its parent.
struct Testament {
  std::atomic<uint32_t> num_plays, wrong, open_failed;
  std::atomic<uint32_t> blocks_on_ssd;  // with their writes acknowledged
  std::atomic<uint64_t> bytes_written;
  Play plays[8192];
  char message[256];
};

class CrashLoop {
 public:
  // The stores lie in `directory`/kv.
  CrashLoop(const char* name, const std::string& directory, uint32_t cycles)
      : name_(name),
        directory_(directory),
        cycles_(cycles_asked != 0 ? cycles_asked : cycles / kShare),
        options_(TinyOptions({24, 64, 0}, directory + "/kv")),
        ledger_(options_.identity) {
    void* shared = ::mmap(nullptr, sizeof(Testament), PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CA_CHECK(shared != MAP_FAILED);
    testament_ = static_cast<Testament*>(shared);
  }
  ~CrashLoop() { ::munmap(testament_, sizeof(Testament)); }

  // `crash` breaks something while the child lives, then `repair` makes it good again; each returns
  // what went wrong. Returns the same.
  std::string Run(const std::function<std::string()>& crash,
                  const std::function<std::string()>& repair) {
    std::string error;
    uint32_t cycle = 0;
    for (; cycle < cycles_ && error.empty(); ++cycle) {
      if (cycle % kCyclesOfAStore == 0) Forget();
      options_.io = cycle % 3 == 0 ? IoKind::kThreads : IoKind::kAuto;
      error = KillOne(crash);
      if (error.empty()) error = repair();
      if (error.empty()) error = Check();
      if (error.empty() && cycle % 2 == 0) error = Replay();
    }
    std::printf(
        "%s: cycles=%u opened=%u writing=%u blocks_found=%lu tokens_reused=%lu lost=%lu "
        "torn=%lu wrong=%lu\n",
        name_, cycle, opened_, writing_, found_, reused_, lost_, torn_, wrong_);
    std::fflush(stdout);  // a child's end does not do it
    if (error.empty() && (wrong_ > 0 || ::testing::Test::HasFailure())) error = "wrong bytes";
    if (error.empty() && (writing_ == 0 || found_ == 0 || reused_ == 0)) {
      error = "no child was hit while it wrote, or nothing was ever found";
    }
    if (error.empty()) return "";
    return error + "; to repeat: crash_test --gtest_filter=Crash." + name_ +
           " --cycles=" + std::to_string(cycles_) + " --seed=" + std::to_string(seed_asked);
  }

  uint64_t lost() const { return lost_; }  // blocks whose writes had been acknowledged

 private:
  void Forget() {
    fs::remove_all(options_.path);
    // Else a power cut would bring the old one back.
    const UniqueFd directory(::open(directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    CA_CHECK(::syncfs(directory.get()) == 0);
    ledger_ = Ledger(options_.identity);
  }

  // A child writes until the crash.
  std::string KillOne(const std::function<std::string()>& crash) {
    testament_->num_plays = testament_->wrong = testament_->open_failed = 0;
    testament_->bytes_written = testament_->blocks_on_ssd = 0;
    const uint32_t child_seed = static_cast<uint32_t>(random_());
    const uint32_t life = static_cast<uint32_t>(random_() % kLifeUs);
    const pid_t child = ::fork();
    if (child < 0) return "fork failed";
    if (child == 0) WriteUntilDeath(child_seed);
    ::usleep(life);
    const bool failed_early = testament_->open_failed != 0;
    std::string error = crash();
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    writing_ += testament_->bytes_written > 0;
    for (uint32_t i = 0; i < testament_->num_plays; ++i) ledger_.Apply(testament_->plays[i]);
    if (!error.empty()) return error;
    if (failed_early) return std::string("the child: ") + testament_->message;
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
      return "the child ended by itself with status " + std::to_string(status);
    }
    return testament_->wrong != 0 ? "the child read wrong bytes" : "";
  }

  [[noreturn]] void WriteUntilDeath(uint32_t seed) {
    std::mt19937 random(seed);
    std::unique_ptr<AttentionStore> store;
    while (true) {
      if (store == nullptr || random() % 100 == 0) {
        if (store != nullptr) (void)store->Close();
        store.reset();
        auto opened = AttentionStore::Open(options_);
        if (!opened.ok()) {  // good after the crash only; the parent knows
          std::snprintf(testament_->message, sizeof(testament_->message), "%s",
                        opened.status().message().c_str());
          testament_->open_failed = 1;
          while (true) ::pause();
        }
        store = std::move(opened.value());
      }
      const Play play = ledger_.Next(&random);
      const uint32_t number = testament_->num_plays;
      if (number == std::size(testament_->plays)) ::pause();
      testament_->plays[number] = play;
      testament_->num_plays = number + 1;
      PlayThrough(store.get(), ledger_.Apply(play), Ledger::TruncationOf(play.conversation));
      if (random() % 20 == 0) store->DropTier(Tier::kDram);
      const StoreStats stats = store->stats();
      testament_->bytes_written += stats.ssd_bytes_written;
      testament_->blocks_on_ssd = stats.tiers[2].used_slots - stats.writes_in_flight;
      if (::testing::Test::HasFailure()) testament_->wrong = 1;
    }
  }

  // Reads every block that the tier lists.
  std::string Check() {
    const SsdOptions options = SsdOptionsOf(options_);
    auto opened = SsdTier::Open(options);
    if (!opened.ok()) return "the store does not open: " + opened.status().message();
    ++opened_;
    SsdTier* tier = opened.value().get();
    auto scanned = tier->Scan({});
    if (!scanned.ok()) return "the store cannot be scanned: " + scanned.status().message();
    torn_ += tier->damaged().size();
    // At most four writes were under way, into places whose blocks had to go.
    const auto recovered = static_cast<uint32_t>(scanned.value().size());
    lost_ += testament_->blocks_on_ssd - std::min(+testament_->blocks_on_ssd, recovered + 4);
    HostSlot host(options.layout);
    for (const auto& [slot, header] : scanned.value()) {
      const Ledger::Block* block = ledger_.Find(header.key);
      if (block == nullptr || block->parent != header.parent || block->depth != header.depth ||
          block->hashes.size() != header.num_tokens) {
        ++wrong_;
        return "slot " + std::to_string(slot) + " holds a block that was never written";
      }
      tier->StartRead(slot, header, 0, options.layout.num_layers, host.data(), 1);
      const Status status = Drain(tier).at(0).status;
      if (!status.ok()) {
        ++torn_;
      } else if (Ledger::CountWrong(*block, host.data()) != 0) {
        ++wrong_;
        return "slot " + std::to_string(slot) + " holds wrong bytes under a right checksum";
      } else {
        ++found_;
      }
    }
    return "";
  }

  // Every conversation goes on, with every byte of its history checked, then a clean close.
  std::string Replay() {
    auto store = AttentionStore::Open(options_);
    if (!store.ok()) return "the store does not open again: " + store.status().message();
    for (uint32_t c = 0; c < Ledger::kConversations; ++c) {
      if (ledger_.history(c).empty()) continue;
      const Play play{c, 0, 1, static_cast<uint32_t>(random_() % 1000)};
      reused_ += PlayThrough(store.value().get(), ledger_.Apply(play), Ledger::TruncationOf(c));
      store.value()->CheckInvariants();
    }
    const Status closed = store.value()->Close();
    return closed.ok() ? "" : "the store does not close: " + closed.message();
  }

  const char* const name_;
  const std::string directory_;
  const uint32_t cycles_;
  StoreOptions options_;
  Ledger ledger_;
  Testament* testament_;
  std::mt19937 random_{seed_asked};
  uint32_t opened_ = 0, writing_ = 0;
  uint64_t found_ = 0, reused_ = 0, lost_ = 0, torn_ = 0, wrong_ = 0;
};

TEST(Crash, Kill) {
  TempDir dir;
  const auto nothing = [] { return std::string(); };
  CrashLoop loop("Kill", dir.path(), 500);
  EXPECT_EQ(loop.Run(nothing, nothing), "");
  EXPECT_EQ(loop.lost(), 0u) << "what the kernel has taken outlives the process";
}

TEST(Crash, PowerCut) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    const auto cut = [&] { return std::string(disk.CutPower() ? "" : "the power stays on"); };
    const auto power_on = [&] { return disk.PowerOn(); };
    CrashLoop loop("PowerCut", disk.path(), 300);
    error = loop.Run(cut, power_on);
    if (error.empty() && loop.lost() == 0) error = "no power cut lost anything: none was one";
    return error;
  });
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.starts_with("--cycles=")) {
      cachedattn::cycles_asked = static_cast<uint32_t>(std::stoul(argument.substr(9)));
    } else if (argument.starts_with("--seed=")) {
      cachedattn::seed_asked = static_cast<uint32_t>(std::stoul(argument.substr(7)));
    } else {
      std::fprintf(stderr, "unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  return RUN_ALL_TESTS();
}
