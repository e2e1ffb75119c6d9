#include "csrc/policy/hazard.h"

#include <algorithm>
#include <cmath>

#include "csrc/base/check.h"

namespace cachedattn {
namespace {

constexpr double kSecond = 1e9;  // nanoseconds
constexpr double kSlack = 1e-9;  // equal sizes are in one class however their mean is rounded

// How many of the ascending `bounds` a value has reached.
template <size_t kN>
uint32_t Reached(double value, const double (&bounds)[kN]) {
  return static_cast<uint32_t>(
      std::ranges::count_if(bounds, [value](double bound) { return value >= bound; }));
}

double LogTokens(uint32_t tokens) { return std::log(std::max(tokens, 1u)); }

// What keeping a token brings over a stretch of ages, if it is idle at the start of it.
struct Stretch {
  double hits = 0;
  double seconds = 0;  // of keeping it
  double stays = 1;    // the chance that it is idle at the end
  double ratio() const { return hits / seconds; }
};

// Of all stretches that begin at one age the one of best ratio, as that age goes down. Ends that
// are not the best for an age can be so for no earlier one either: the stretches between those that
// can have falling ratios, and the first one ends at the best.
class BestStretch {
 public:
  // REQUIRES: a new end or the hazard of the stretch before, which joins it then.
  void Prepend(double hazard, double seconds) {
    const double hits = -std::expm1(-hazard * seconds);
    Stretch first = {hits, hits / hazard, 1 - hits};
    while (size_ > 0 && first.ratio() <= later_[size_ - 1].ratio()) {
      const Stretch& next = later_[--size_];
      first.hits += first.stays * next.hits;
      first.seconds += first.stays * next.seconds;
      first.stays *= next.stays;
    }
    later_[size_++] = first;
  }
  double ratio() const { return later_[size_ - 1].ratio(); }

 private:
  std::array<Stretch, 2 * HazardTables::kNumBins> later_;  // the first one last
  size_t size_ = 0;
};

}  // namespace

HazardTables::HazardTables(bool per_token) : per_token_(per_token), rows_(kNumClasses) {}

const std::array<int64_t, HazardTables::kNumBins + 1>& HazardTables::edges_ns() {
  static const auto edges = [] {
    std::array<int64_t, kNumBins + 1> ns{};
    for (uint32_t i = 1; i <= kNumBins; ++i) {
      ns[i] = std::llround(0.5 * kSecond * std::pow(2.0, 0.5 * (i - 1.0)));
    }
    return ns;
  }();
  return edges;
}

uint8_t HazardTables::BinOf(int64_t age_ns) {
  const auto& edges = edges_ns();
  const auto above = std::upper_bound(edges.begin() + 1, edges.end() - 1, age_ns);
  return static_cast<uint8_t>(above - edges.begin() - 1);
}

uint8_t HazardTables::GapOf(int64_t age_ns) {
  return static_cast<uint8_t>(1 + Reached(static_cast<double>(age_ns), {15e9, 120e9}));
}

uint16_t HazardTables::ClassOf(const TurnEnd& turn, uint32_t turn_number, uint8_t gap) {
  const double prompt = LogTokens(turn.prompt_tokens), answer = LogTokens(turn.answer_tokens);
  sum_log_prompt_ += prompt;
  sum_log_answer_ += answer;
  ++turns_;
  const double turns = static_cast<double>(turns_);
  const uint32_t prompt_size =
      Reached(std::exp(prompt - sum_log_prompt_ / turns) + kSlack, {1.0 / 4, 1.0, 4.0});
  const uint32_t answer_size =
      Reached(std::exp(answer - sum_log_answer_ / turns) + kSlack, {0.5, 2.0});
  const uint32_t number = Reached(turn_number, {2, 4, 11});
  const uint32_t group = static_cast<uint32_t>(turn.finish) * 4 + number;
  const auto turn_class =
      static_cast<uint16_t>(((group * 4 + gap) * 4 + prompt_size) * 3 + answer_size);
  const uint64_t tokens = uint64_t{turn.prompt_tokens} + turn.answer_tokens;
  tokens_ += tokens;
  if (rows_[turn_class] == nullptr) rows_[turn_class] = std::make_unique<Row>();
  ++rows_[turn_class]->turns;
  rows_[turn_class]->tokens += tokens;
  return turn_class;
}

bool HazardTables::Use(uint16_t turn_class) {
  if (rows_[turn_class] != nullptr && rows_[turn_class]->used) return false;
  if (rows_[turn_class] == nullptr) rows_[turn_class] = std::make_unique<Row>();
  rows_[turn_class]->used = true;
  used_.push_back(turn_class);
  return true;
}

void HazardTables::Enter(uint16_t turn_class, uint8_t bin, int64_t since_ns) {
  Bin& at = rows_[turn_class]->bins[bin];
  ++at.count;
  at.sum_since_ns += since_ns;
}

void HazardTables::Leave(uint16_t turn_class, uint8_t bin, int64_t since_ns, int64_t at_ns) {
  Bin& at = rows_[turn_class]->bins[bin];
  --at.count;
  at.sum_since_ns -= since_ns;
  AddExposure(turn_class, LowerEdge(bin), at_ns - since_ns);
}

void HazardTables::AddExposure(uint16_t turn_class, int64_t from_age_ns, int64_t to_age_ns) {
  for (uint32_t bin = BinOf(from_age_ns); from_age_ns < to_age_ns; ++bin) {
    const int64_t end_ns = bin + 1 < kNumBins ? std::min(UpperEdge(bin), to_age_ns) : to_age_ns;
    rows_[turn_class]->bins[bin].exposure_ns += end_ns - from_age_ns;
    from_age_ns = end_ns;
  }
}

uint64_t HazardTables::events(uint16_t turn_class, uint32_t bin) const {
  return rows_[turn_class] == nullptr ? 0 : rows_[turn_class]->bins[bin].events;
}

uint32_t HazardTables::count(uint16_t turn_class, uint32_t bin) const {
  return rows_[turn_class] == nullptr ? 0
                                      : static_cast<uint32_t>(rows_[turn_class]->bins[bin].count);
}

double HazardTables::exposure_s(uint16_t turn_class, uint32_t bin, int64_t now_ns) const {
  if (rows_[turn_class] == nullptr) return 0;
  const Bin& at = rows_[turn_class]->bins[bin];
  const Wide running = static_cast<Wide>(at.count) * (now_ns - LowerEdge(bin)) - at.sum_since_ns;
  return static_cast<double>(at.exposure_ns + running) / kSecond;
}

double HazardTables::MeanTokens(uint16_t turn_class) const {
  if (!per_token_ || turns_ == 0) return 1;
  const Row& row = *rows_[turn_class];
  const bool own = row.turns > 0;
  const double tokens = static_cast<double>(own ? row.tokens : tokens_);
  return std::max(tokens / static_cast<double>(own ? row.turns : turns_), 1.0);
}

HazardTables::Sums HazardTables::SumsOf(uint16_t turn_class, int64_t now_ns) const {
  Sums sums;
  for (uint32_t bin = 0; bin < kNumBins; ++bin) {
    sums.events[bin] = static_cast<double>(events(turn_class, bin));
    sums.exposure_s[bin] = exposure_s(turn_class, bin, now_ns);
  }
  return sums;
}

// The mean of a Gamma distribution that was worth `prior_events` events before any were seen.
HazardTables::Hazards HazardTables::Shrink(const Sums& seen, double prior_events,
                                           const Hazards& prior) {
  Hazards hazards;
  for (uint32_t bin = 0; bin < kNumBins; ++bin) {
    hazards[bin] =
        (seen.events[bin] + prior_events) / (seen.exposure_s[bin] + prior_events / prior[bin]);
  }
  return hazards;
}

void HazardTables::Recompute(int64_t now_ns) {
  std::vector<Sums> of_class;
  std::vector<Sums> of_group(kNumGroups);
  Sums all;
  for (const uint16_t turn_class : used_) {
    const Sums& sums = of_class.emplace_back(SumsOf(turn_class, now_ns));
    if (turn_class == kNoTurn) continue;
    Sums& group = of_group[turn_class / (kNumClasses / kNumGroups)];
    for (uint32_t bin = 0; bin < kNumBins; ++bin) {
      group.events[bin] += sums.events[bin];
      group.exposure_s[bin] += sums.exposure_s[bin];
      all.events[bin] += sums.events[bin];
      all.exposure_s[bin] += sums.exposure_s[bin];
    }
  }
  Hazards unknown;
  for (uint32_t bin = 0; bin < kNumBins; ++bin) {
    const auto middle_ns = static_cast<double>(LowerEdge(bin) + UpperEdge(bin)) / 2;
    unknown[bin] = kReturnsPerFold * kSecond / middle_ns;
  }
  const Hazards of_all = Shrink(all, kAllPrior, unknown);
  for (size_t i = 0; i < used_.size(); ++i) {
    const uint32_t group = used_[i] == kNoTurn ? 0 : used_[i] / (kNumClasses / kNumGroups);
    const Hazards hazards = Shrink(of_group[group], kGroupPrior, of_all);
    Row* row = rows_[used_[i]].get();
    SetIndex(used_[i] == kNoTurn ? hazards : Shrink(of_class[i], kClassPrior, hazards), row);
    const auto tokens = static_cast<float>(MeanTokens(used_[i]));
    for (float& index : row->index) index /= tokens;
  }
}

// From the middle of each bin, over the ends of it and of all later ones.
void HazardTables::SetIndex(const Hazards& hazards, Row* row) {
  BestStretch best;
  for (uint32_t bin = kNumBins; bin-- > 0;) {
    const double half_s = static_cast<double>(UpperEdge(bin) - LowerEdge(bin)) / kSecond / 2;
    best.Prepend(hazards[bin], half_s);
    row->index[bin] = static_cast<float>(best.ratio());
    best.Prepend(hazards[bin], half_s);
  }
}

}  // namespace cachedattn
