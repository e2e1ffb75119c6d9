// What a replay costs: requests whose histories are some hundred blocks deep, through the store.
//
//   replay_bench [REQUESTS [DEPTH [POLICY]]]    100,000, 160 blocks and lookahead, if not said
//
// Sessions of ten turns come at random, about 600 at a time, and find a store with room for 1,000:
// DRAM alone, then 100 in DRAM and the others on an SSD. CPU time, since other load must not count.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "csrc/base/check.h"
#include "csrc/replay/replay.h"

namespace cachedattn {
namespace {

constexpr uint32_t kTurns = 10;  // of a session
constexpr uint32_t kMore = 37;   // tokens that prompt and answer add, each: tails are part-filled
constexpr uint64_t kTokenBytes = 1000;

double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Prompts of `depth` blocks on average.
Workload MakeWorkload(uint32_t num_requests, uint32_t depth) {
  std::mt19937_64 random(1);
  std::exponential_distribution<double> gap(0.95), think(1.0 / 60);
  const uint32_t mean = depth * TokenTree::kBlockSize;
  const uint32_t first = std::max(mean, kTurns * kMore) - (kTurns - 1) * kMore;
  Workload workload;
  double arrival_s = 0;
  for (uint32_t r = 0; r < num_requests; ++r) {
    Request request{.prompt = first, .answer = kMore, .session = r / kTurns, .service_s = 1};
    if (r % kTurns == 0) {
      request.arrival_s = arrival_s += gap(random);
    } else {
      const Request& before = workload.back();
      request.parent = request.previous = static_cast<int32_t>(r) - 1;
      request.shared = before.prompt + before.answer;
      request.prompt = request.shared + kMore;
      request.think_s = think(random);
    }
    workload.push_back(request);
  }
  return workload;
}

void Measure(const TokenTree& tree, const Schedule& schedule, uint64_t dram, uint64_t ssd,
             const std::string& policy) {
  const double begin_s = CpuSeconds();
  auto played = Replay(tree, schedule,
                       {.policy = policy,
                        .dram_bytes = dram * kTokenBytes,
                        .ssd_bytes = ssd * kTokenBytes,
                        .token_bytes = kTokenBytes,
                        .dram_reserve = ssd ? 0.1 : 0});
  CA_CHECK(played.ok());
  const double took_s = CpuSeconds() - begin_s;
  uint64_t hits = 0, blocks = 0;
  for (uint32_t tokens : played.value().hit_tokens) hits += tokens;
  for (size_t r = 0; r < tree.size(); ++r) blocks += tree.prompt(r) / TokenTree::kBlockSize;
  const auto n = static_cast<double>(tree.size());
  std::printf("%-6s %10.1f %12.1f %12.1f %12.3f\n", ssd ? "ssd" : "dram", took_s, 1e6 * took_s / n,
              static_cast<double>(hits) / TokenTree::kBlockSize / n,
              1e6 * took_s / static_cast<double>(blocks));
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) {
  using namespace cachedattn;
  const auto number = [&](int i, uint32_t otherwise) {
    return argc > i ? static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)) : otherwise;
  };
  const uint32_t num_requests = number(1, 100'000), depth = number(2, 160);
  const std::string policy = argc > 3 ? argv[3] : "lookahead";
  const Workload workload = MakeWorkload(num_requests, depth);
  CA_CHECK(Validate(workload).ok());
  const TokenTree tree(workload, 1, 0);
  const Schedule schedule = MakeSchedule(workload, {.slots = kTurns});  // 95 % busy
  const uint64_t session = tree.max_context();
  std::printf("%s, %u requests\n%-6s %10s %12s %12s %12s\n", policy.c_str(), num_requests, "tiers",
              "seconds", "us/request", "blocks found", "us/block");
  Measure(tree, schedule, 1000 * session, 0, policy);
  Measure(tree, schedule, 100 * session, 900 * session, policy);
  return 0;
}
