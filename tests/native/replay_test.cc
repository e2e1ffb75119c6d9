// The replay: schedules and stores worked out by hand, and the optimum against every choice.
#include "csrc/replay/replay.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

#include "csrc/replay/optimum.h"

namespace cachedattn {
namespace {

constexpr uint32_t kBlock = TokenTree::kBlockSize;

// A first turn that takes `service_s`, or a later one that continues `previous`.
Request First(uint32_t session, double arrival_s, uint32_t prompt, uint32_t answer) {
  Request request;
  request.prompt = prompt;
  request.answer = answer;
  request.session = session;
  request.arrival_s = arrival_s;
  request.service_s = 1;
  return request;
}
Request Next(const Workload& workload, int32_t previous, double think_s, uint32_t more,
             uint32_t answer) {
  const Request& before = workload[previous];
  Request request = First(before.session, 0, before.prompt + before.answer + more, answer);
  request.parent = request.previous = previous;
  request.shared = before.prompt + before.answer;
  request.think_s = think_s;
  return request;
}

Schedule OneSlot(const Workload& workload) { return MakeSchedule(workload, {.slots = 1}); }

TEST(ScheduleTest, TimesOfAServerWithoutQueue) {
  Workload workload = {First(0, 10, 8000, 100)};
  workload[0].service_s = -1;
  workload.push_back(Next(workload, 0, 5, 4000, 0));
  workload[1].service_s = -1;
  const Schedule schedule = OneSlot(workload);
  EXPECT_DOUBLE_EQ(schedule.completion[0], 10 + 0.05 + 1 + 3);
  EXPECT_DOUBLE_EQ(schedule.arrival[1], schedule.completion[0] + 5);
  EXPECT_DOUBLE_EQ(schedule.completion[1], schedule.start[1] + 0.05 + 0.5);
}

TEST(ScheduleTest, FirstComeFirstServed) {
  const Workload workload = {First(0, 0, 1, 1), First(1, 0.5, 1, 1), First(2, 0.25, 1, 1)};
  const Schedule schedule = MakeSchedule(workload, {.slots = 1, .span_s = 3});
  EXPECT_EQ(schedule.by_arrival, (std::vector<uint32_t>{0, 2, 1}));
  EXPECT_EQ(schedule.start, (std::vector<double>{0, 2, 1}));
  EXPECT_DOUBLE_EQ(schedule.mean_queue, (0.75 + 1.5) / 3);
}

TEST(ScheduleTest, LoadAndRateSetTheFactor) {
  const Workload workload = {First(0, 0, 1, 1), First(1, 1, 1, 1), First(2, 2, 1, 1)};
  EXPECT_DOUBLE_EQ(MakeSchedule(workload, {.slots = 2, .span_s = 6, .load = 0.5}).factor, 2);
  EXPECT_DOUBLE_EQ(MakeSchedule(workload, {.slots = 2, .turns_per_second = 0.5}).factor, 4);
}

TEST(TokenTreeTest, SharesIdsAlongTheTree) {
  Workload workload = {First(0, 0, 40, 9)};
  workload.push_back(Next(workload, 0, 0, 11, 4));
  Request branch = First(1, 0, 30, 2);
  branch.parent = 1;
  branch.shared = 20;
  workload.push_back(branch);
  ASSERT_TRUE(Validate(workload).ok());
  const TokenTree tree(workload, 2, 0);
  EXPECT_EQ(tree.total(0), 24u);
  EXPECT_EQ(tree.shared(1), 24u);
  EXPECT_EQ(tree.prompt(1), 30u);
  const auto tokens = tree.Tokens(1, 0, tree.total(1));
  EXPECT_TRUE(std::ranges::equal(tree.Tokens(0, 0, 24), std::span(tokens).first(24)));
  const auto other = tree.Tokens(2, 0, tree.total(2));
  EXPECT_TRUE(std::ranges::equal(std::span(tokens).first(10), std::span(other).first(10)));
  for (uint32_t i = 10; i < other.size(); ++i) EXPECT_EQ(std::ranges::count(tokens, other[i]), 0);
}

TEST(TokenTreeTest, DropsTheOldestHalfOfTheWindow) {
  const Workload workload = {First(0, 0, 200, 1)};
  const TokenTree tree(workload, 1, 4 * kBlock);
  EXPECT_EQ(tree.NumDropped(4 * kBlock), 0u);
  EXPECT_EQ(tree.NumDropped(4 * kBlock + 1), 2 * kBlock);
  EXPECT_EQ(tree.NumDropped(6 * kBlock + 1), 4 * kBlock);
}

TEST(WorkloadTest, NamesWhatIsWrong) {
  Workload workload = {First(0, 0, 10, 1), First(1, 0, 10, 1)};
  workload[1].shared = 1;
  const Status status = Validate(workload);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("request 1: shared"), std::string::npos);
}

TEST(ModelSsdTest, OneDeviceInOrder) {
  VirtualClock clock;
  const int64_t begin = clock.NowNs();
  ModelSsd ssd({.read_bytes_s = 1e9, .write_bytes_s = 5e8, .latency_s = 1e-3}, 4, 1000, &clock);
  BlockHeader header;
  header.num_tokens = 16;  // 16,000 bytes: 16 us to read, 32 us to write
  ssd.StartWrite(0, header, false, nullptr, 1);
  ssd.StartRead(1, header, 0, 1, nullptr, 2);
  std::vector<SsdCompletion> done;
  ssd.Poll(&done, 0);
  EXPECT_TRUE(done.empty());
  EXPECT_EQ(ssd.next_ns() - begin, 32'000 + 1'000'000);
  ssd.Poll(&done, 1);  // waits: the clock moves
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].tag, 1u);
  EXPECT_EQ(clock.NowNs() - begin, 1'032'000);
  EXPECT_EQ(ssd.next_ns() - begin, 1'048'000);
  EXPECT_EQ(ssd.bytes_written(), 16'000u);
}

TEST(ModelCopyTest, StreamsDoNotWaitForEachOther) {
  VirtualClock clock;
  const int64_t begin = clock.NowNs();
  ModelCopy copy(1e9, 1000, &clock);
  copy.Enqueue({.stream = CopyStream::kLoad, .tag = 1});
  copy.Enqueue({.stream = CopyStream::kLoad, .tag = 2});
  copy.Enqueue({.stream = CopyStream::kSave, .tag = 3});
  clock.MoveTo(begin + 1000);
  std::vector<uint64_t> tags;
  copy.Poll(&tags, 0);
  EXPECT_EQ(tags, (std::vector<uint64_t>{1, 3}));
  EXPECT_EQ(copy.next_ns() - begin, 2000);
}

// Two sessions of two turns, each of 4 blocks and then 2 more; the server runs one at a time.
struct TwoSessions {
  Workload workload = {First(0, 0, 3 * kBlock, kBlock), First(1, 10, 3 * kBlock, kBlock)};
  TwoSessions() {
    workload.push_back(Next(workload, 0, 19, kBlock, kBlock));  // arrives at 20
    workload.push_back(Next(workload, 1, 19, kBlock, kBlock));  // arrives at 30
  }
};

ReplayResult PlayOk(const TokenTree& tree, const Schedule& schedule, const ReplayOptions& options) {
  auto played = Replay(tree, schedule, options);
  EXPECT_TRUE(played.ok()) << played.status().message();
  return std::move(played.value());
}

TEST(ReplayTest, FindsWhatFits) {
  const TwoSessions two;
  const TokenTree tree(two.workload, 1, 0);
  const Schedule schedule = OneSlot(two.workload);
  ReplayOptions options{.policy = "lru", .dram_bytes = 100 * kBlock * 1000, .token_bytes = 1000};
  EXPECT_EQ(PlayOk(tree, schedule, options).hit_tokens,
            (std::vector<uint32_t>{0, 0, 4 * kBlock, 4 * kBlock}));
  EXPECT_EQ(IdealTokens(tree, schedule), (std::vector<uint32_t>{0, 0, 4 * kBlock, 4 * kBlock}));
  // Six blocks: session 1 pushes the two deepest of session 0 out; the turn of session 0 then
  // needs six, so that nothing is left of session 1.
  options.dram_bytes = 6 * kBlock * 1000;
  EXPECT_EQ(PlayOk(tree, schedule, options).hit_tokens,
            (std::vector<uint32_t>{0, 0, 2 * kBlock, 0}));
}

TEST(ReplayTest, TimesOfTheSsd) {
  const TwoSessions two;
  const TokenTree tree(two.workload, 1, 0);
  const Schedule schedule = OneSlot(two.workload);
  // DRAM holds a session and a half; a block takes 16 ms to write and 16 ms to read.
  ReplayOptions options{.policy = "lru",
                        .dram_bytes = 6 * kBlock * 1000,
                        .ssd_bytes = 100 * kBlock * 1000,
                        .token_bytes = 1000,
                        .ssd = {.read_bytes_s = 1e6, .write_bytes_s = 1e6, .latency_s = 0}};
  const ReplayResult result = PlayOk(tree, schedule, options);
  EXPECT_EQ(result.hit_tokens, (std::vector<uint32_t>{0, 0, 4 * kBlock, 4 * kBlock}));
  EXPECT_EQ(result.dram_tokens[2], 2 * kBlock);
  EXPECT_NEAR(result.load_s[2], 4 * 0.016, 1e-6) << "two writes make the room for two reads";
  EXPECT_LE(result.ssd_bytes_written, 12u * kBlock * 1000) << "no block more than once";
  EXPECT_EQ(result.without_history, 0u);
  // With the queue known, what waits is in DRAM when its turn comes.
  options.policy = "lookahead";
  Workload busy = two.workload;
  busy.insert(busy.begin() + 2, First(2, 19.5, kBlock, 0));
  busy[3].session = 0;
  const TokenTree busy_tree(busy, 1, 0);
  const ReplayResult ahead = PlayOk(busy_tree, OneSlot(busy), options);
  EXPECT_EQ(ahead.dram_tokens[3], 4 * kBlock);
  EXPECT_EQ(ahead.load_s[3], 0);
}

// Random sessions with branches; some run at one time.
Workload RandomWorkload(uint32_t seed, int num_requests, uint32_t unit) {
  std::mt19937 random(seed);
  const auto upto = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  Workload workload;
  std::map<uint32_t, int32_t> last;
  for (int i = 0; i < num_requests; ++i) {
    const uint32_t session = upto(3);
    if (last.contains(session)) {
      workload.push_back(Next(workload, last[session], upto(8), unit * (1 + upto(2)), unit));
    } else {
      workload.push_back(First(session, upto(10), unit * (1 + upto(2)), unit));
      if (i > 0) {
        workload[i].parent = static_cast<int32_t>(upto(static_cast<uint32_t>(i)));
        workload[i].shared = std::min(workload[i].prompt, unit);
      }
    }
    workload[i].service_s = 1 + upto(5);
    last[session] = i;
  }
  return workload;
}

TEST(ReplayTest, SameTwice) {
  const Workload workload = RandomWorkload(7, 60, 40);
  const TokenTree tree(workload, 1, 0);
  const Schedule schedule = MakeSchedule(workload, {.slots = 2});
  for (const char* policy : {"lookahead", "lru", "fifo"}) {
    const ReplayOptions options{.policy = policy,
                                .dram_bytes = 2'000'000,
                                .ssd_bytes = 4'000'000,
                                .token_bytes = 1000,
                                .dram_reserve = 0.1};
    const ReplayResult a = PlayOk(tree, schedule, options), b = PlayOk(tree, schedule, options);
    EXPECT_EQ(a.hit_tokens, b.hit_tokens);
    EXPECT_EQ(a.load_s, b.load_s);
    EXPECT_EQ(a.ssd_bytes_written, b.ssd_bytes_written);
    EXPECT_EQ(a.not_saved, 0u);
    const auto ideal = IdealTokens(tree, schedule);
    for (size_t r = 0; r < ideal.size(); ++r) EXPECT_LE(a.hit_tokens[r], ideal[r]);
  }
}

TEST(ReplayTest, WindowedSessionsFindTheirContext) {
  Workload workload = {First(0, 0, 30, 10)};
  for (int i = 0; i < 12; ++i) workload.push_back(Next(workload, i, 1, 30, 10));
  const TokenTree tree(workload, 1, 8 * kBlock);
  const Schedule schedule = OneSlot(workload);
  const ReplayOptions options{.dram_bytes = 1'000'000, .token_bytes = 1000};
  const auto ideal = IdealTokens(tree, schedule);
  EXPECT_LE(*std::ranges::max_element(ideal), 8 * kBlock);
  EXPECT_EQ(PlayOk(tree, schedule, options).hit_tokens, ideal);
  EXPECT_EQ(OptimalTokens(tree, schedule, 8 * kBlock + 10), ideal);
}

TEST(ReplayTest, RefusesWhatIsNoStore) {
  const TwoSessions two;
  const TokenTree tree(two.workload, 1, 0);
  const Schedule schedule = OneSlot(two.workload);
  ReplayOptions options{.policy = "belady", .dram_bytes = 1 << 30, .token_bytes = 1000};
  EXPECT_EQ(Replay(tree, schedule, options).status().message(),
            "policy: 'belady' is none of lookahead, hazard, lru, fifo");
  options.policy = "lru";
  options.dram_bytes = 1;
  EXPECT_EQ(Replay(tree, schedule, options).status().code(), Code::kInvalidArgument);
}

// Tries every set of tokens to keep, at every event.
class BruteForce {
 public:
  BruteForce(const TokenTree& tree, const Schedule& schedule, size_t capacity)
      : tree_(tree), schedule_(schedule), capacity_(capacity) {
    for (uint32_t r = 0; r < tree.size(); ++r) {
      events_.push_back({schedule.start[r], true, r});
      events_.push_back({schedule.completion[r], false, r});
    }
    std::ranges::sort(events_);
  }

  uint32_t Best() { return Best(0, 0); }

 private:
  using Set = uint64_t;                              // of token ids
  using Event = std::tuple<double, bool, uint32_t>;  // completions first

  uint32_t Best(size_t event, Set kept) {
    if (event == events_.size()) return 0;
    const auto [it, added] = known_.try_emplace({event, kept}, 0);
    if (!added) return it->second;
    const auto [time, starts, r] = events_[event];
    uint32_t best = 0;
    if (starts) {
      uint32_t hits = 0;
      for (TokenId id : tree_.Tokens(r, 0, tree_.shared(r))) {
        if (!(kept >> id & 1)) break;
        ++hits;
      }
      best = hits + Best(event + 1, kept);
    } else {
      Set all = kept;
      for (TokenId id : tree_.Tokens(r, 0, tree_.total(r))) all |= Set{1} << id;
      for (Set some = all;; some = (some - 1) & all) {
        const auto size = static_cast<size_t>(__builtin_popcountll(some));
        const bool full = size == std::min<size_t>(capacity_, __builtin_popcountll(all));
        if (full) best = std::max(best, Best(event + 1, some));
        if (some == 0) break;
      }
    }
    return known_[{event, kept}] = best;
  }

  const TokenTree& tree_;
  const Schedule& schedule_;
  const size_t capacity_;
  std::vector<Event> events_;
  std::map<std::pair<size_t, Set>, uint32_t> known_;
};

TEST(OptimumTest, NoChoiceFindsMore) {
  for (uint32_t seed = 0; seed < 150; ++seed) {
    const Workload workload = RandomWorkload(seed, 5, 1);
    ASSERT_TRUE(Validate(workload).ok());
    const TokenTree tree(workload, 1, 0);
    const Schedule schedule = MakeSchedule(workload, {.slots = 2});
    for (size_t capacity : {1, 2, 4, 6}) {
      uint32_t sum = 0;
      for (uint32_t tokens : OptimalTokens(tree, schedule, capacity)) sum += tokens;
      EXPECT_EQ(sum, BruteForce(tree, schedule, capacity).Best())
          << "seed " << seed << ", capacity " << capacity;
    }
  }
}

}  // namespace
}  // namespace cachedattn
