// A store that serves turns while its disk is in trouble: every byte of every history is checked,
// and how long each turn takes is known.
#pragma once

#include <linux/fs.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <memory>

#include "csrc/base/clock.h"
#include "csrc/io/direct_file.h"
#include "tests/native/testing/child.h"
#include "tests/native/testing/ledger.h"

namespace cachedattn {

// The system's clock, some time ahead.
class JumpClock final : public Clock {
 public:
  int64_t NowNs() const override { return SystemClock().NowNs() + ahead_ns_; }
  void Jump(int64_t seconds) { ahead_ns_ += seconds * 1'000'000'000; }

 private:
  int64_t ahead_ns_ = 0;
};

class Service {
 public:
  static constexpr int64_t kDeadlineUs = 200'000;

  explicit Service(const std::string& path, uint32_t ssd_slots = 64)
      : options_(TinyOptions({24, ssd_slots, 0}, path + "/kv")), ledger_(options_.identity) {
    options_.io_deadline_us = kDeadlineUs;
    options_.clock = &clock_;
  }

  Status Open() {
    auto opened = AttentionStore::Open(options_);
    if (!opened.ok()) return opened.status();
    store_ = std::move(opened.value());
    return Status();
  }
  Status Close() {
    const int64_t begin = SystemClock().NowNs();
    const Status status = store_->Close();
    store_.reset();
    longest_ms_ = std::max(longest_ms_, (SystemClock().NowNs() - begin) / 1'000'000);
    return status;
  }

  // Plays turns. Returns the tokens that were reused.
  uint32_t Serve(int turns) {
    uint32_t reused = 0;
    for (int i = 0; i < turns; ++i) {
      const Play play = ledger_.Next(&random_);
      const Tokens& tokens = ledger_.Apply(play);
      const int64_t begin = SystemClock().NowNs();
      reused += PlayThrough(store_.get(), tokens, Ledger::TruncationOf(play.conversation));
      longest_ms_ = std::max(longest_ms_, (SystemClock().NowNs() - begin) / 1'000'000);
      store_->CheckInvariants();
    }
    return reused;
  }

  // Serves until the SSD tier is in `state`; true when it came to be.
  bool ServeUntil(const std::string& state, int turns = 300) {
    for (int i = 0; i < turns && stats().ssd_state != state; ++i) {
      Serve(1);
      store_->Poll();
    }
    return stats().ssd_state == state;
  }

  // The time of the next probe comes; true when it finds the disk well.
  bool ComesBack(int patience_ms = 5000) {
    clock_.Jump(31);
    return PollUntil(patience_ms,
                     [](const StoreStats& now) { return std::string(now.ssd_state) == "on"; });
  }
  // True when every late operation has given its slot back.
  bool HasNothingLate() {
    return PollUntil(5000, [](const StoreStats& now) { return now.quarantined_slots == 0; });
  }

  // While the disk is bad: turns are served, with history from DRAM alone.
  void ExpectServiceFromDram() {
    const StoreStats before = stats();
    EXPECT_GT(Serve(40), 0u);
    const StoreStats after = stats();
    EXPECT_GT(after.tokens_from[1], before.tokens_from[1]);
    EXPECT_EQ(after.tokens_from[2], before.tokens_from[2]);
    EXPECT_EQ(after.ssd_bytes_written, before.ssd_bytes_written);
  }

  // With a good disk: what is written is found there again.
  void ExpectServiceFromSsd() {
    const StoreStats before = stats();
    Serve(20);
    store_->DropTier(Tier::kDram);
    Serve(20);
    const StoreStats after = stats();
    EXPECT_GT(after.tokens_from[2], before.tokens_from[2]);
    EXPECT_GT(after.ssd_bytes_written, before.ssd_bytes_written);
  }

  // What a test of a child says in the end.
  static std::string Verdict() {
    return ::testing::Test::HasFailure() ? "the expectations above" : "";
  }

  StoreStats stats() const { return store_->stats(); }
  StoreOptions& options() { return options_; }
  AttentionStore* store() { return store_.get(); }
  void ForgetTimes() { longest_ms_ = 0; }
  int64_t longest_ms() const { return longest_ms_; }  // of a turn, and of Close

 private:
  bool PollUntil(int patience_ms, bool (*done)(const StoreStats&)) {
    for (int i = 0; i < patience_ms && !done(stats()); ++i) {
      store_->Poll();
      ::usleep(1000);
    }
    return done(stats());
  }

  JumpClock clock_;
  StoreOptions options_;
  Ledger ledger_;
  std::mt19937 random_{1};
  std::unique_ptr<AttentionStore> store_;
  int64_t longest_ms_ = 0;
};

// A frozen file system: writes to it hang. Whatever happens to this process, it thaws: one that
// waits for a frozen file system cannot even be killed.
class Frozen {
 public:
  explicit Frozen(const std::string& path)
      : root_(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    CA_CHECK(::pipe2(pipe_, O_CLOEXEC) == 0);
    guard_ = ::fork();
    if (guard_ == 0) {
      ::close(pipe_[1]);
      pollfd end = {pipe_[0], POLLIN, 0};
      ::poll(&end, 1, 60'000);
      Thaw();
      ::_exit(0);
    }
    ok_ = ::ioctl(root_.get(), FIFREEZE, 0) == 0;
  }
  ~Frozen() {
    Thaw();
    ::close(pipe_[1]);
    ::close(pipe_[0]);
    ::waitpid(guard_, nullptr, 0);
  }
  Frozen(const Frozen&) = delete;
  Frozen& operator=(const Frozen&) = delete;

  bool ok() const { return ok_; }
  void Thaw() const { (void)::ioctl(root_.get(), FITHAW, 0); }

 private:
  UniqueFd root_;
  int pipe_[2];
  pid_t guard_ = 0;
  bool ok_ = false;
};

}  // namespace cachedattn
