// PolicyModel: the rules of csrc/policy/policy.h over again, in plain vectors and with searches
// over everything. What is learnt is computed from a log of all idle times.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <vector>

#include "csrc/policy/policy.h"

namespace cachedattn {

class PolicyModel {
 public:
  static constexpr int kBins = 42;
  // Finish, turn number, gap, prompt, answer; finish -1: no turn yet.
  using Class = std::array<int, 5>;
  static constexpr Class kNoTurn = {-1, 0, 0, 0, 0};

  struct Talk {
    uint64_t name = 0;
    uint32_t tenant = 0;
    int holders = 0, in_service = 0, turns = 0;
    bool ghost = false, teaches = false;
    int place_in_queue = -1;
    uint64_t used = 0, order = 0;
    int64_t idle_since = 0, ttl = 0;
    std::optional<int64_t> over, lease_end, back, lapse;
    int gap = 0;
    Class turn_class = kNoTurn;
    std::array<bool, kNumTiers> evictable{};
    bool busy() const { return in_service > 0 || place_in_queue >= 0; }
  };
  // A time that somebody was idle for, in full or so far.
  struct Idle {
    Class turn_class;
    int64_t ns;
    bool returned;
  };

  PolicyModel(const PolicyOptions& options, const Clock* clock) : options_(options), clock_(clock) {
    classes_.push_back(kNoTurn);
    Recompute();
  }

  std::map<Conversation, Talk>& talks() { return talks_; }
  const std::vector<Class>& classes() const { return classes_; }
  int64_t now() const { return clock_->NowNs(); }

  // `id` is what the engine calls it.
  void Hold(Conversation id, uint64_t name, uint32_t tenant) {
    Sync();
    Talk& talk = talks_[id];
    talk.ghost = false;
    if (talk.holders++ > 0 || talk.turns > 0) return;
    talk.name = name;
    talk.tenant = tenant;
    talk.order = talk.used = ++stamp_;
    StartIdle(&talk, false);
  }
  Conversation Find(uint64_t name, uint32_t tenant) const {
    for (const auto& [id, talk] : talks_) {
      if (talk.name == name && talk.tenant == tenant) return id;
    }
    return kNoConversation;
  }
  void Release(Conversation id) {
    Sync();
    Talk& talk = talks_[id];
    if (--talk.holders > 0) return;
    if (learns() && talk.name != 0 && talk.turn_class != kNoTurn) {
      talk.ghost = true;
      talk.evictable = {};
      return;
    }
    if (talk.teaches) log_.push_back({talk.turn_class, IdleFor(talk), false});
    talks_.erase(id);
  }
  void SetQueue(const std::vector<Conversation>& waiting) {
    Sync();
    std::vector<Conversation> before;
    for (auto& [id, talk] : talks_) {
      if (talk.place_in_queue >= 0) before.push_back(id);
    }
    std::ranges::sort(before, {}, [&](Conversation id) { return talks_[id].place_in_queue; });
    std::map<Conversation, int> places;
    for (size_t i = 0; i < waiting.size(); ++i) places.emplace(waiting[i], i);
    for (const auto& [id, place] : places) {
      Talk& talk = talks_[id];
      if (talk.place_in_queue < 0) ++talk.holders;
      if (!talk.busy()) Return(&talk);
      talk.place_in_queue = place;
    }
    for (const Conversation id : before) {
      if (places.count(id) > 0) continue;
      Talk& talk = talks_[id];
      talk.place_in_queue = -1;
      Release(id);
    }
  }
  void Begin(Conversation id) {
    Sync();
    Talk& talk = talks_[id];
    ++talk.holders;
    if (!talk.busy()) Return(&talk);
    if (talk.over && learns()) StartIdle(&talk, false);
    talk.over = talk.back = talk.lapse = std::nullopt;
    talk.used = ++stamp_;
    ++talk.in_service;
    if (by_use()) talk.order = stamp_;
  }
  void End(Conversation id, const TurnEnd* turn) {
    Sync();
    Talk& talk = talks_[id];
    --talk.in_service;
    if (turn != nullptr) {
      talk.used = ++stamp_;
      if (by_use()) talk.order = stamp_;
      SetClass(&talk, *turn);
      if (learns() && talk.in_service == 0 && talk.busy()) {
        log_.push_back({talk.turn_class, 0, true});
        talk.gap = 1;
      }
    }
    StartIdle(&talk, turn != nullptr && !talk.busy());
    Release(id);
  }
  void SetOver(Conversation id) {
    Sync();
    if (!talks_[id].over) talks_[id].over = now();
  }
  void SetTimeToLive(Conversation id, int64_t ns) {
    Sync();
    Talk& talk = talks_[id];
    talk.ttl = ns;
    if (ns > 0 && !talk.busy() && !talk.over && now() - talk.idle_since >= ns) talk.over = now();
  }
  void SetLease(Conversation id, int64_t ns) {
    Sync();
    talks_[id].lease_end = ns > 0 ? std::optional(now() + ns) : std::nullopt;
  }
  void SetReturn(Conversation id, int64_t ns) {
    Sync();
    talks_[id].back = ns > 0 ? std::optional(now() + ns) : std::nullopt;
    talks_[id].lapse = ns > 0 ? std::optional(now() + 2 * ns) : std::nullopt;
  }
  void Restored(Conversation id) {
    Sync();
    talks_[id].order = talks_[id].used = ++stamp_;
    StartIdle(&talks_[id], false);
  }

  // The place in the order of policy.h, and the key within it.
  std::pair<double, double> Rank(Conversation id, Tier tier, bool by_use = false) {
    const Talk& talk = talks_[id];
    const bool queue = options_.kind == PolicyKind::kHazard ||
                       !(options_.kind == PolicyKind::kLru || options_.kind == PolicyKind::kFifo);
    if (talk.lease_end) return {6, Seconds(*talk.lease_end)};
    if (talk.place_in_queue >= 0 && queue) return {5, -talk.place_in_queue};
    if (talk.over) return {0, Seconds(*talk.over)};
    const auto use = static_cast<double>(by_use ? talk.used : talk.order);
    if (talk.in_service > 0) {
      return {options_.drop_in_service && tier == Tier::kDram ? 1 : 2, use};
    }
    if (talk.back) return {3, -Seconds(*talk.back)};
    return {2, use};
  }
  // Surely before: nothing that rounding could turn. `strict`: but never later.
  bool GoesBefore(Conversation a, Conversation b, Tier tier) {
    const auto rank_a = Rank(a, tier), rank_b = Rank(b, tier);
    const bool among =
        rank_a.first >= 2 && rank_a.first <= 3 && rank_b.first >= 2 && rank_b.first <= 3;
    if (learns() && among && !(rank_a.first == 3 && rank_b.first == 3) && !SameCell(a, b)) {
      return Value(a) < Value(b) * (1 - 1e-5);
    }
    return rank_a < rank_b;
  }
  bool MayTie(Conversation a, Conversation b, Tier tier) {
    return !GoesBefore(a, b, tier) && !GoesBefore(b, a, tier);
  }

  // Of each class and bin: events and seconds of exposure, as the log and those idle now tell.
  using Seen = std::map<Class, std::array<std::pair<double, double>, kBins>>;
  Seen AllSeen() const {
    Seen seen;
    for (const Class& c : classes_) seen[c] = {};
    const auto add = [&](const Idle& idle) {
      auto& of_class = seen.at(idle.turn_class);
      for (int bin = 0; bin < kBins && Edge(bin) <= idle.ns; ++bin) {
        const int64_t upper = bin + 1 < kBins ? Edge(bin + 1) : INT64_MAX;
        of_class[bin].first += idle.returned && idle.ns < upper;
        of_class[bin].second += Seconds(std::min(idle.ns, upper) - Edge(bin));
      }
    };
    for (const Idle& idle : log_) add(idle);
    for (const auto& [id, talk] : talks_) {
      if (talk.teaches) add({talk.turn_class, IdleFor(talk), false});
    }
    return seen;
  }
  static int64_t Edge(int bin) {
    static const auto edges = [] {
      std::array<int64_t, kBins + 1> ns{};
      for (int i = 1; i <= kBins; ++i) ns[i] = std::llround(5e8 * std::pow(2.0, (i - 1) / 2.0));
      return ns;
    }();
    return edges[bin];
  }

  // Lets pass what has passed by now.
  void Sync() {
    for (auto& [id, talk] : talks_) {
      if (talk.lease_end && *talk.lease_end <= now()) talk.lease_end = std::nullopt;
      if (talk.lapse && *talk.lapse <= now()) talk.lapse = talk.back = std::nullopt;
      if (talk.ttl > 0 && !talk.busy() && !talk.over && talk.idle_since + talk.ttl <= now()) {
        talk.over = talk.idle_since + talk.ttl;
      }
    }
  }

  double Index(const Class& turn_class, int bin) const { return index_.at(turn_class)[bin]; }

 private:
  bool learns() const { return options_.kind == PolicyKind::kHazard; }
  bool by_use() const {
    return options_.kind == PolicyKind::kLru || options_.kind == PolicyKind::kLookahead;
  }
  static double Seconds(int64_t ns) { return static_cast<double>(ns) / 1e9; }
  int64_t IdleFor(const Talk& talk) const {
    const int64_t end = talk.over ? std::min(*talk.over, now()) : now();
    return std::max<int64_t>(0, end - talk.idle_since);
  }
  int BinOf(const Talk& talk) const {
    int bin = 0;
    while (bin + 1 < kBins && now() - talk.idle_since >= Edge(bin + 1)) ++bin;
    return bin;
  }
  static bool promised(const Talk& talk) { return talk.back && talk.in_service == 0; }
  bool SameCell(Conversation a, Conversation b) {
    const Talk &x = talks_[a], &y = talks_[b];
    return !promised(x) && !promised(y) && x.turn_class == y.turn_class && BinOf(x) == BinOf(y);
  }
  double Value(Conversation id) {
    const Talk& talk = talks_[id];
    if (!promised(talk)) return index_.at(talk.turn_class)[BinOf(talk)];
    return 1 / std::max(Seconds(*talk.back - now()), 1e-9) / Tokens(kNoTurn);
  }

  void StartIdle(Talk* talk, bool teaches) {
    talk->idle_since = now();
    if (!learns()) return;
    talk->order = ++stamp_;
    talk->teaches = teaches;
  }
  void Return(Talk* talk) {
    if (!talk->teaches) return;
    const int64_t age = now() - talk->idle_since;
    log_.push_back({talk->turn_class, age, true});
    talk->gap = age < 15'000'000'000 ? 1 : age < 120'000'000'000 ? 2 : 3;
    talk->teaches = false;
  }
  void SetClass(Talk* talk, const TurnEnd& turn) {
    ++talk->turns;
    turns_.push_back(turn);
    if (!learns()) return;
    double prompt = 0, answer = 0;  // logarithms of the means
    for (const TurnEnd& one : turns_) {
      prompt += std::log(one.prompt_tokens) / static_cast<double>(turns_.size());
      answer += std::log(one.answer_tokens) / static_cast<double>(turns_.size());
    }
    const double p = std::log(turn.prompt_tokens) - prompt + 1e-9;
    const double a = std::log(turn.answer_tokens) - answer + 1e-9;
    const int n = talk->turns;
    talk->turn_class = {static_cast<int>(turn.finish),
                        n == 1   ? 0
                        : n < 4  ? 1
                        : n < 11 ? 2
                                 : 3,
                        talk->gap,
                        p < -std::log(4)  ? 0
                        : p < 0           ? 1
                        : p < std::log(4) ? 2
                                          : 3,
                        a < -std::log(2)  ? 0
                        : a < std::log(2) ? 1
                                          : 2};
    of_class_[talk->turn_class].push_back(turn);
    const size_t ended = turns_.size();
    const bool is_new = std::ranges::count(classes_, talk->turn_class) == 0;
    if (is_new) classes_.push_back(talk->turn_class);
    if (is_new || ended >= next_) {
      Recompute();
      next_ = ended < 10    ? 10
              : ended < 20  ? 20
              : ended < 50  ? 50
              : ended < 100 ? 100
                            : ended + std::max<size_t>(200, ended / 50);
    }
  }
  double Tokens(const Class& turn_class) {
    const auto& own = of_class_[turn_class];
    const auto& turns = own.empty() ? turns_ : own;
    if (!options_.per_token || turns.empty()) return 1;
    double sum = 0;
    for (const TurnEnd& one : turns) sum += one.prompt_tokens + one.answer_tokens;
    return std::max(1.0, sum / static_cast<double>(turns.size()));
  }

  void Recompute();

  const PolicyOptions options_;
  const Clock* const clock_;
  uint64_t stamp_ = 0;
  size_t next_ = 10;  // turns, to the next recomputation
  std::map<Conversation, Talk> talks_;
  std::vector<Idle> log_;
  std::vector<TurnEnd> turns_;
  std::map<Class, std::vector<TurnEnd>> of_class_;
  std::vector<Class> classes_;
  std::map<Class, std::array<double, kBins>> index_;
};

inline void PolicyModel::Recompute() {
  if (!learns()) return;
  Seen seen = AllSeen();
  for (const Class& c : classes_) {
    std::array<double, kBins> hazard;
    for (int bin = 0; bin < kBins; ++bin) {
      double e_all = 0, x_all = 0, e_group = 0, x_group = 0;
      const int finish = c == kNoTurn ? 0 : c[0];
      for (const Class& other : classes_) {
        if (other == kNoTurn) continue;
        e_all += seen[other][bin].first;
        x_all += seen[other][bin].second;
        if (other[0] != finish || other[1] != c[1]) continue;
        e_group += seen[other][bin].first;
        x_group += seen[other][bin].second;
      }
      const double middle = (Seconds(Edge(bin)) + Seconds(Edge(bin + 1))) / 2;
      const double all = (e_all + 1) / (x_all + middle / 0.1);
      const double group = (e_group + 4) / (x_group + 4 / all);
      hazard[bin] =
          c == kNoTurn ? group : (seen[c][bin].first + 8) / (seen[c][bin].second + 8 / group);
    }
    for (int bin = 0; bin < kBins; ++bin) {
      double alive = 1, hits = 0, held = 0, best = 0;
      for (int end = bin; end < kBins; ++end) {
        const double from =
            end == bin ? Seconds(Edge(bin)) / 2 + Seconds(Edge(bin + 1)) / 2 : Seconds(Edge(end));
        const double back = -std::expm1(-hazard[end] * (Seconds(Edge(end + 1)) - from));
        hits += alive * back;
        held += alive * back / hazard[end];
        alive *= 1 - back;
        best = std::max(best, hits / held);
      }
      index_[c][bin] = best / Tokens(c);
    }
  }
}

}  // namespace cachedattn
