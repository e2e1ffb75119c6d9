// The generated workload: the same as a trace of the same requests, and nothing kept of what is
// over.
#include "csrc/replay/generator.h"

#include <gtest/gtest.h>

#include "csrc/replay/optimum.h"
#include "csrc/replay/replay.h"

namespace cachedattn {
namespace {

// What a source of generated conversations plays, as a trace.
Workload AsTrace(const GeneratorOptions& options) {
  Workload workload;
  double arrival_s = 0;
  for (uint32_t i = 0; i < options.conversations; ++i) {
    Dialogue dialogue(options, i);
    arrival_s += MeanGap(options) * dialogue.gap();
    for (Dialogue::Turn turn; !turn.last;) {
      const bool first = turn.prompt == 0;
      turn = dialogue.Next(options);
      const auto before = static_cast<int32_t>(workload.size()) - 1;
      Request request{.prompt = turn.prompt, .answer = turn.answer, .session = i};
      if (first) {
        request.arrival_s = arrival_s;
      } else {
        request.parent = request.previous = before;
        request.shared = workload[before].prompt + workload[before].answer;
        request.prompt += request.shared;
        request.think_s = turn.think_s;
      }
      workload.push_back(request);
    }
  }
  return workload;
}

constexpr GeneratorOptions kGenerated = {
    .conversations = 300, .seed = 5, .turns = 4, .think_s = 30, .slots = 4, .granularity = 32};

ReplayOptions SmallStore(const char* policy) {
  return {.policy = policy,
          .dram_bytes = 200'000'000,
          .ssd_bytes = 400'000'000,
          .token_bytes = 10'000,
          .dram_reserve = 0.1,
          .ssd = {.read_bytes_s = 5e7, .write_bytes_s = 5e7}};
}

TEST(GeneratorTest, FindsWhatTheSameTraceFinds) {
  ASSERT_TRUE(Validate(kGenerated).ok());
  const Workload workload = AsTrace(kGenerated);
  ASSERT_TRUE(Validate(workload).ok());
  const TokenTree tree(workload, kGenerated.granularity, 0);
  const Schedule schedule = MakeSchedule(workload, {.slots = kGenerated.slots});
  uint64_t ideal = 0;
  for (const uint32_t tokens : IdealTokens(tree, schedule)) ideal += tokens;
  for (const char* policy : {"lookahead", "hazard+ended", "lru"}) {
    SCOPED_TRACE(policy);
    const ReplayOptions options = SmallStore(policy);
    const auto replayed = Replay(tree, schedule, options);
    ASSERT_TRUE(replayed.ok());
    const ReplayResult& trace = replayed.value();
    GeneratedSource source(kGenerated);
    const auto played = Replay(&source, options);
    ASSERT_TRUE(played.ok());
    const GeneratedSource::Found& found = source.found();
    uint64_t hits = 0, dram = 0;
    for (const uint32_t tokens : trace.hit_tokens) hits += tokens;
    for (const uint32_t tokens : trace.dram_tokens) dram += tokens;
    EXPECT_EQ(found.conversations, kGenerated.conversations);
    EXPECT_EQ(found.turns, workload.size());
    EXPECT_EQ(found.ideal_tokens, ideal);
    EXPECT_EQ(found.hit_tokens, hits);
    EXPECT_EQ(found.dram_tokens, dram);
    EXPECT_LT(hits, ideal) << "the store is to be small";
    EXPECT_LT(dram, hits);
    EXPECT_EQ(source.now_s(), schedule.completion[schedule.by_completion.back()]);
    EXPECT_EQ(played.value().ssd_bytes_read, trace.ssd_bytes_read);
    EXPECT_EQ(played.value().ssd_bytes_written, trace.ssd_bytes_written);
    EXPECT_EQ(played.value().dram_evictions, trace.dram_evictions);
    EXPECT_EQ(played.value().ssd_evictions, trace.ssd_evictions);
  }
}

TEST(GeneratorTest, MeansAndLoadAreAsAskedFor) {
  GeneratorOptions options = kGenerated;
  options.conversations = 20'000;
  options.context = 1 << 20;
  double turns = 0, prompt = 0, answer = 0, think_s = 0, gaps = 0, work_s = 0;
  for (uint64_t i = 0; i < options.conversations; ++i) {
    Dialogue dialogue(options, i);
    gaps += dialogue.gap();
    for (Dialogue::Turn turn; !turn.last; ++turns) {
      turn = dialogue.Next(options);
      prompt += turn.prompt;
      answer += turn.answer;
      think_s += turn.think_s;
      work_s += ServiceSeconds(turn.prompt, turn.answer);
    }
  }
  const auto n = static_cast<double>(options.conversations);
  EXPECT_NEAR(turns / n, options.turns, 0.1);
  EXPECT_NEAR(prompt / turns, options.prompt, 0.1 * options.prompt);
  EXPECT_NEAR(answer / turns, options.answer, 0.03 * options.answer);
  EXPECT_NEAR(think_s / (turns - n), options.think_s, 0.03 * options.think_s);
  EXPECT_NEAR(gaps / n, 1, 0.03);
  EXPECT_NEAR(work_s / (gaps * MeanGap(options) * options.slots), options.load, 0.03);
}

TEST(GeneratorTest, TheSeedSaysAll) {
  const auto hits = [](uint64_t seed) {
    GeneratorOptions options = kGenerated;
    options.seed = seed;
    GeneratedSource source(options);
    EXPECT_TRUE(Replay(&source, SmallStore("hazard")).ok());
    return std::pair(source.found().hit_tokens, source.now_s());
  };
  EXPECT_EQ(hits(1), hits(1));
  EXPECT_NE(hits(1), hits(2));
}

// What lives, and what the store holds, does not grow with the conversations that have been.
TEST(GeneratorTest, NothingIsKeptOfConversationsThatHaveEnded) {
  GeneratorOptions options = kGenerated;
  options.conversations = 10'000;
  options.granularity = 64;
  ReplayOptions store = SmallStore("hazard");
  const uint64_t block_bytes = store.token_bytes * options.granularity * TokenTree::kBlockSize;
  const uint64_t num_slots = (store.dram_bytes + store.ssd_bytes) / block_bytes;
  GeneratedSource source(options);
  const uint64_t running_blocks =
      2 * (options.slots + 1) * (source.max_context() / TokenTree::kBlockSize + 2);
  uint64_t num_reports = 0;
  store.progress = [&](const ReplayProgress& now) {
    EXPECT_LT(now.sessions, 200u);
    EXPECT_LE(now.blocks, num_slots + running_blocks);
    EXPECT_LE(now.conversations, num_slots + now.sessions);
    ++num_reports;
    return true;
  };
  EXPECT_TRUE(Replay(&source, store).ok());
  EXPECT_EQ(source.found().conversations, options.conversations);
  EXPECT_LT(source.max_live(), 200u);
  EXPECT_GT(num_reports, 100u);
}

TEST(GeneratorTest, NamesWhatIsWrong) {
  GeneratorOptions options = kGenerated;
  options.context = 100;
  EXPECT_NE(Validate(options).message().find("context"), std::string::npos);
  options = kGenerated;
  options.turns = 0.5;
  EXPECT_EQ(Validate(options).message(), "turns is out of range");
}

}  // namespace
}  // namespace cachedattn
