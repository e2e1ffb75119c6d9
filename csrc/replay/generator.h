// A generated workload: any number of conversations, drawn as they come up.
//
// Conversations arrive at random (Poisson), as often as the load asks for. Each has a geometric
// number of turns; what a turn's prompt adds and its answer are lognormal, the time to think before
// a later turn exponential. All of a conversation is drawn from a hash of the seed and its number,
// so nothing is kept of one that has ended or has yet to come.
#pragma once

#include <cmath>

#include "csrc/replay/source.h"

namespace cachedattn {

// Lengths in tokens of the model; all but the counts are means.
struct GeneratorOptions {
  uint64_t conversations = 0;
  uint64_t seed = 0;
  double turns = 3;
  double prompt = 300, answer = 500;
  double think_s = 60;
  uint32_t context = 32768;  // a conversation ends when another turn might not fit
  uint32_t slots = 24;
  double load = 0.95;
  uint32_t granularity = 1;
};

// kInvalidArgument names the option that is out of range.
CA_API Status Validate(const GeneratorOptions& options);

// The turns of one conversation, one after the other.
class CA_API Dialogue {
 public:
  struct Turn {
    uint32_t prompt = 0, answer = 0;  // tokens that it adds
    double think_s = 0;               // before it
    bool last = false;
  };

  Dialogue() = default;
  Dialogue(const GeneratorOptions& options, uint64_t number);

  // From the arrival of the conversation before to that of this one, in mean gaps.
  double gap() const { return gap_; }
  Turn Next(const GeneratorOptions& options);  // REQUIRES: there was no last one

 private:
  double Uniform();  // in (0, 1]
  double Exponential() { return -std::log(Uniform()); }
  uint32_t Length(double mean, double sigma);

  uint64_t state_ = 0;
  double gap_ = 0;
  uint32_t turns_ = 0, tokens_ = 0;  // so far
};

// Seconds between arrivals of conversations.
CA_API double MeanGap(const GeneratorOptions& options);

class CA_API GeneratedSource final : public Source {
 public:
  // What the turns that have ended found. A history is known: it is all of the turns before.
  struct Found {
    uint64_t conversations = 0, turns = 0, later_turns = 0;
    uint64_t prompt_tokens = 0;                                  // of the model
    uint64_t ideal_tokens = 0, hit_tokens = 0, dram_tokens = 0;  // of the store
    uint64_t half = 0;  // turns that found half of a history or more
    uint64_t full = 0;  // later turns that found all of it but for a block
    double ssd_wait_s = 0;
  };

  // REQUIRES: Validate(options).
  explicit GeneratedSource(const GeneratorOptions& options);

  double next_s() const override { return server_.next_s(); }
  Event Next() override;
  Turn turn(uint32_t r) const override;
  // Every token of a conversation is its number: a key stands for all tokens before it, too.
  std::vector<TokenId> Tokens(uint32_t r, uint32_t first, uint32_t last) const override;
  void End(uint32_t r, const TurnResult& result) override;
  uint32_t granularity() const override { return options_.granularity; }
  Truncation truncation() const override { return {}; }
  uint32_t max_context() const override;
  uint32_t max_running() const override { return options_.slots; }

  const Found& found() const { return found_; }
  double mean_queue() const { return now_s_ > 0 ? waited_s_ / now_s_ : 0; }
  double now_s() const { return now_s_; }  // of the last event
  // The most turns at one time that had been drawn and had not ended.
  size_t max_live() const { return live_.size(); }

 private:
  // A turn from when it is drawn until it has ended.
  struct Live {
    uint64_t conversation = 0;
    Dialogue dialogue;
    Dialogue::Turn drawn;
    int32_t before = kNoRequest;  // the turn before
    double arrival_s = 0;
    uint32_t tokens = 0;                         // of the model, prompt and answer
    uint32_t shared = 0, prompt = 0, total = 0;  // of the store
  };

  void Add(Live turn, double time_s);
  void AddConversation(double after_s);

  const GeneratorOptions options_;
  const double gap_s_;
  Server server_;
  uint64_t num_begun_ = 0;
  std::vector<Live> live_;      // by request
  std::vector<uint32_t> free_;  // of live_
  double now_s_ = 0, waited_s_ = 0;
  Found found_;
};

}  // namespace cachedattn
