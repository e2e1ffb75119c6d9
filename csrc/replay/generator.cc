#include "csrc/replay/generator.h"

#include <algorithm>
#include <numbers>

#include "csrc/base/check.h"
#include "csrc/replay/token_tree.h"

namespace cachedattn {

namespace {

// Spread of the lengths, by the logarithm.
constexpr double kPromptSigma = 1.2, kAnswerSigma = 0.7;
// Means that no conversation's turns and no length exceed.
constexpr double kMostTurns = 20, kMostTokens = 8;
constexpr uint64_t kSample = 10'000;  // conversations that say what work is to be expected

uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint32_t MostTurns(const GeneratorOptions& options) {
  return static_cast<uint32_t>(std::ceil(kMostTurns * options.turns));
}

uint32_t MostTokens(const GeneratorOptions& options) {
  return static_cast<uint32_t>(std::ceil(kMostTokens * options.prompt) +
                               std::ceil(kMostTokens * options.answer));
}

}  // namespace

Status Validate(const GeneratorOptions& options) {
  const auto refuse = [](const std::string& what) {
    return Status(Code::kInvalidArgument, what + " is out of range");
  };
  if (options.conversations == 0 || options.conversations > INT32_MAX) {
    return refuse("generate: " + std::to_string(options.conversations) + " conversations");
  }
  if (!(options.turns >= 1 && options.turns <= 1000)) return refuse("turns");
  if (!(options.prompt >= 1 && options.prompt <= 1e6)) return refuse("prompt");
  if (!(options.answer >= 1 && options.answer <= 1e6)) return refuse("answer");
  if (!(options.think_s >= 0 && options.think_s <= 1e6)) return refuse("think");
  if (options.slots == 0 || options.slots > 1'000'000) return refuse("slots");
  if (!(options.load > 0 && options.load <= 100)) return refuse("load");
  if (options.granularity == 0) return refuse("granularity");
  if (options.context < MostTokens(options) || options.context > 1 << 28) {
    return Status(Code::kInvalidArgument, "context: must be from " +
                                              std::to_string(MostTokens(options)) +
                                              " (the longest turn) to 2^28 tokens");
  }
  return Status();
}

Dialogue::Dialogue(const GeneratorOptions& options, uint64_t number)
    : state_(Mix(Mix(options.seed) + number)) {
  gap_ = Exponential();
}

double Dialogue::Uniform() {
  state_ += 0x9e3779b97f4a7c15;
  return (static_cast<double>(Mix(state_) >> 11) + 1) * 0x1p-53;
}

uint32_t Dialogue::Length(double mean, double sigma) {
  const double radius = std::sqrt(2 * Exponential());
  const double normal = radius * std::cos(2 * std::numbers::pi * Uniform());
  const double length = mean * std::exp(sigma * normal - sigma * sigma / 2);
  return static_cast<uint32_t>(std::clamp(length, 1.0, kMostTokens * mean));
}

Dialogue::Turn Dialogue::Next(const GeneratorOptions& options) {
  Turn turn;
  if (turns_++ > 0) turn.think_s = options.think_s * Exponential();
  turn.prompt = Length(options.prompt, kPromptSigma);
  turn.answer = Length(options.answer, kAnswerSigma);
  tokens_ += turn.prompt + turn.answer;
  turn.last = Uniform() * options.turns <= 1 || turns_ >= MostTurns(options) ||
              tokens_ + MostTokens(options) > options.context;
  return turn;
}

double MeanGap(const GeneratorOptions& options) {
  double work_s = 0;
  for (uint64_t i = 0; i < kSample; ++i) {
    Dialogue dialogue(options, i);
    for (Dialogue::Turn turn; !turn.last;) {
      turn = dialogue.Next(options);
      work_s += ServiceSeconds(turn.prompt, turn.answer);
    }
  }
  return work_s / static_cast<double>(kSample) / (options.load * options.slots);
}

GeneratedSource::GeneratedSource(const GeneratorOptions& options)
    : options_(options), gap_s_(MeanGap(options)), server_(options.slots) {
  AddConversation(0);
}

uint32_t GeneratedSource::max_context() const {
  return options_.context / options_.granularity +
         MostTurns(options_);  // each has a token at least
}

void GeneratedSource::AddConversation(double after_s) {
  if (num_begun_ == options_.conversations) return;
  Live first;
  first.conversation = num_begun_++;
  first.dialogue = Dialogue(options_, first.conversation);
  const double arrival_s = after_s + gap_s_ * first.dialogue.gap();
  Add(std::move(first), arrival_s);
}

// Draws the turn that comes after what `turn` holds so far, to arrive at `time_s` and its think
// time.
void GeneratedSource::Add(Live turn, double time_s) {
  turn.drawn = turn.dialogue.Next(options_);
  turn.arrival_s = time_s + turn.drawn.think_s;
  turn.shared = turn.total;
  const uint32_t prompt = turn.tokens + turn.drawn.prompt;
  turn.tokens = prompt + turn.drawn.answer;
  turn.prompt = TokenTree::PromptTokens(prompt, turn.shared, options_.granularity);
  turn.total = TokenTree::TotalTokens(turn.tokens, turn.prompt, options_.granularity);
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(live_.size()));
    live_.emplace_back();
  }
  const uint32_t r = free_.back();
  free_.pop_back();
  server_.Expect(turn.arrival_s, r, ServiceSeconds(turn.drawn.prompt, turn.drawn.answer));
  live_[r] = std::move(turn);
}

Event GeneratedSource::Next() {
  const Event event = server_.Next();
  const Live& turn = live_[event.request];
  now_s_ = event.time_s;
  switch (event.kind) {
    case EventKind::kArrival:
      if (turn.before == kNoRequest) AddConversation(event.time_s);
      break;
    case EventKind::kStart:
      waited_s_ += event.time_s - turn.arrival_s;
      break;
    case EventKind::kCompletion:
      if (turn.drawn.last) break;
      Live next = turn;
      next.before = static_cast<int32_t>(event.request);
      Add(std::move(next), event.time_s);
      break;
  }
  return event;
}

Turn GeneratedSource::turn(uint32_t r) const {
  const Live& turn = live_[r];
  return {.session = turn.conversation,
          .goes_on_from = turn.before,
          .prompt = turn.prompt,
          .total = turn.total,
          .last = turn.drawn.last};
}

std::vector<TokenId> GeneratedSource::Tokens(uint32_t r, uint32_t first, uint32_t last) const {
  return std::vector<TokenId>(last - first, static_cast<TokenId>(live_[r].conversation));
}

void GeneratedSource::End(uint32_t r, const TurnResult& result) {
  const Live& turn = live_[r];
  const uint32_t ideal = turn.shared, hits = result.hit_tokens;
  ++found_.turns;
  found_.conversations += turn.drawn.last;
  found_.later_turns += turn.before != kNoRequest;
  found_.prompt_tokens += turn.tokens - turn.drawn.answer;
  found_.ideal_tokens += ideal;
  found_.hit_tokens += hits;
  found_.dram_tokens += result.dram_tokens;
  found_.half += ideal > 0 && 2 * hits >= ideal;
  found_.full += ideal > 0 && hits + TokenTree::kBlockSize > ideal;
  if (hits > result.dram_tokens) found_.ssd_wait_s += result.load_s;
  free_.push_back(r);
}

}  // namespace cachedattn
