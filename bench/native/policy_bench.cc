// What the placement policy costs as conversations grow from ten thousand to ten million: memory
// for each, a decision (who goes next, and it has nothing more that may go), and a turn (one that
// begins, and ends in a class that is learnt from).
//
//   policy_bench [MOST [KIND]]    conversations, 10,000,000 if not said; all kinds if not said
//
// Time passes so that all of them have a turn in about 2,000 s, however many there are: the idle
// ones grow old over the same bins. The median of batches says what is usual, the slowest batch
// whether anything grows in steps.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string_view>
#include <vector>

#include "csrc/base/check.h"
#include "csrc/policy/policy.h"

namespace cachedattn {
namespace {

constexpr int64_t kRoundNs = 2'000'000'000'000;
constexpr int kBatch = 2000;  // decisions, and then as many turns

struct StepClock final : Clock {
  int64_t now_ns = 0;
  int64_t NowNs() const override { return now_ns; }
};

// Other load must not count.
double CpuNs() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return 1e9 * static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec);
}

class Run {
 public:
  Run(PolicyKind kind, uint32_t num_conversations)
      : step_ns_(kRoundNs / num_conversations), policy_(Policy::Make({.kind = kind}, &clock_)) {
    for (uint32_t i = 0; i < num_conversations; ++i) {
      const Conversation id = policy_->Hold(i + 1, 0);
      policy_->SetEvictable(id, Tier::kSsd, true);
      Turn(id);
    }
  }

  struct Cost {
    double decision_ns = 0, turn_ns = 0;
  };
  Cost Batch(int n) {
    gone_.clear();
    const double start = CpuNs();
    for (int i = 0; i < n; ++i) {
      gone_.push_back(policy_->Victim(Tier::kDram));
      policy_->SetEvictable(gone_.back(), Tier::kDram, false);
    }
    const double decided = CpuNs();
    for (int i = 0; i < n; ++i) {
      const bool back = i % 2 == 0;  // one that has gone, or anyone
      Turn(back ? gone_[i] : static_cast<Conversation>(random_() % policy_->num_conversations()));
      if (!back) policy_->SetEvictable(gone_[i], Tier::kDram, true);
    }
    return {(decided - start) / n, (CpuNs() - decided) / n};
  }
  double bytes() const {
    return static_cast<double>(policy_->bytes()) /
           static_cast<double>(policy_->num_conversations());
  }

 private:
  void Turn(Conversation id) {
    policy_->Begin(id);
    clock_.now_ns += step_ns_;
    const auto bits = static_cast<uint32_t>(random_());
    const TurnEnd turn = {static_cast<Finish>(bits % 3), 100 + (bits >> 8) % 10000,
                          10 + (bits >> 4) % 500};
    policy_->End(id, &turn);
    policy_->SetEvictable(id, Tier::kDram, true);
  }

  const int64_t step_ns_;
  StepClock clock_;
  std::unique_ptr<Policy> policy_;
  std::mt19937_64 random_{1};
  std::vector<Conversation> gone_;
};

void Measure(const char* name, PolicyKind kind, uint32_t num_conversations) {
  Run run(kind, num_conversations);
  // Half of the turns of a round, for the order to become that of random turns.
  for (uint32_t i = 0; i < std::max(num_conversations / 2, 20u * kBatch); i += kBatch) {
    run.Batch(kBatch);
  }
  std::vector<double> decisions, turns;
  for (int i = 0; i < 200; ++i) {
    const Run::Cost cost = run.Batch(kBatch);
    decisions.push_back(cost.decision_ns);
    turns.push_back(cost.turn_ns);
  }
  std::ranges::sort(decisions);
  std::ranges::sort(turns);
  std::printf("%-10s %14u %12.0f %12.0f %12.0f %12.0f %20.0f\n", name, num_conversations,
              decisions[decisions.size() / 2], decisions.back(), turns[turns.size() / 2],
              turns.back(), run.bytes());
  std::fflush(stdout);
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) {
  using cachedattn::PolicyKind;
  const uint64_t most = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10'000'000;
  std::printf("%-10s %14s %12s %12s %12s %12s %20s\n", "kind", "conversations", "decision ns",
              "slowest ns", "turn ns", "slowest ns", "bytes/conversation");
  const std::pair<const char*, PolicyKind> kinds[] = {{"lookahead", PolicyKind::kLookahead},
                                                      {"lru", PolicyKind::kLru},
                                                      {"fifo", PolicyKind::kFifo},
                                                      {"hazard", PolicyKind::kHazard}};
  for (const auto& [name, kind] : kinds) {
    if (argc > 2 && std::string_view(argv[2]) != name) continue;
    for (uint64_t n = 10'000; n <= most; n *= 10) {
      cachedattn::Measure(name, kind, static_cast<uint32_t>(n));
    }
  }
  return 0;
}
