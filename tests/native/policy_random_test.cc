// The policy engine against a slow model of its rules, over random calls.
#include <gtest/gtest.h>

#include <random>

#include "csrc/policy/policy_impl.h"
#include "tests/native/testing/manual_clock.h"
#include "tests/native/testing/policy_model.h"

namespace cachedattn {
namespace {

constexpr int64_t kMs = 1'000'000;

class Player {
 public:
  Player(const PolicyOptions& options, uint32_t seed)
      : options_(options), random_(seed), engine_(options, &clock_), model_(options, &clock_) {}

  void Play(int num_steps) {
    for (int i = 0; i < num_steps && !testing::Test::HasFailure(); ++i) {
      Pass();
      if (Draw(6) == 0) Hold();
      if (!held_.empty()) Step();
      engine_.CheckInvariants();
      model_.Sync();
      Compare();
      if (i % 50 == 0) CompareTables();
    }
    CompareTables();
  }

 private:
  uint32_t Draw(uint32_t n) { return static_cast<uint32_t>(random_()) % n; }
  Conversation Any() { return held_[Draw(static_cast<uint32_t>(held_.size()))]; }

  void Pass() {
    switch (Draw(12)) {
      case 0:
        clock_.Advance(Draw(1000) * 1000 * kMs);
        break;
      case 1:
        if (Draw(300) == 0) clock_.Advance(int64_t{1 + Draw(5)} * 365 * 86'400'000 * kMs);
        break;
      case 2:
      case 3:
      case 4:
        break;
      default:
        clock_.Advance(Draw(3000) * kMs);
    }
  }

  void Hold() {
    const uint64_t name = Draw(3) == 0 ? 0 : 1 + Draw(60);
    const uint32_t tenant = Draw(2);
    const Conversation known = name == 0 ? kNoConversation : model_.Find(name, tenant);
    const Conversation id = engine_.Hold(name, tenant);
    ASSERT_TRUE(known == kNoConversation || id == known);
    model_.Hold(id, name, tenant);
    held_.push_back(id);
    if (model_.talks()[id].turns == 0 && Draw(8) == 0 && !model_.talks()[id].busy()) {
      engine_.Restored(id);
      model_.Restored(id);
    }
  }

  void Step() {
    const Conversation id = Any();
    switch (Draw(15)) {
      case 0:
        if (held_.size() > 20) Release();
        break;
      case 1:
        SetQueue();
        break;
      case 2:
      case 3:
      case 4:
        engine_.Begin(id);
        model_.Begin(id);
        in_service_.push_back(id);
        if (Draw(3) > 0) End();
        break;
      case 5:
      case 6:
        if (!in_service_.empty()) End();
        break;
      case 7:
        Hint(id);
        break;
      default: {
        const auto tier = static_cast<Tier>(Draw(kNumTiers));
        const bool evictable = Draw(4) > 0;
        engine_.SetEvictable(id, tier, evictable);
        model_.talks()[id].evictable[static_cast<int>(tier)] = evictable;
      }
    }
  }

  void Release() {
    const size_t i = Draw(static_cast<uint32_t>(held_.size()));
    engine_.Release(held_[i]);
    model_.Release(held_[i]);
    held_.erase(held_.begin() + static_cast<int>(i));
  }

  void SetQueue() {
    if (Draw(2) == 0) std::shuffle(queue_.begin(), queue_.end(), random_);
    if (!queue_.empty() && Draw(2) == 0) queue_.erase(queue_.begin());
    std::erase_if(queue_, [&](Conversation id) { return std::ranges::count(held_, id) == 0; });
    for (uint32_t i = Draw(4); i > 0; --i) queue_.push_back(Any());
    engine_.SetQueue(queue_);
    model_.SetQueue(queue_);
  }

  void End() {
    const size_t i = Draw(static_cast<uint32_t>(in_service_.size()));
    const Conversation id = in_service_[i];
    in_service_.erase(in_service_.begin() + static_cast<int>(i));
    const TurnEnd turn = {static_cast<Finish>(Draw(3)), 1 + Draw(1u << (1 + Draw(12))),
                          1 + Draw(1u << (1 + Draw(8)))};
    const TurnEnd* end = Draw(6) == 0 ? nullptr : &turn;
    engine_.End(id, end);
    model_.End(id, end);
  }

  void Hint(Conversation id) {
    const int64_t ns = Draw(6) == 0 ? 0 : (1 + Draw(200)) * 1000 * kMs;
    switch (Draw(4)) {
      case 0:
        engine_.SetOver(id);
        model_.SetOver(id);
        break;
      case 1:
        engine_.SetTimeToLive(id, ns);
        model_.SetTimeToLive(id, ns);
        break;
      case 2:
        engine_.SetLease(id, ns);
        model_.SetLease(id, ns);
        break;
      default:
        engine_.SetReturn(id, ns);
        model_.SetReturn(id, ns);
    }
  }

  void Compare() {
    auto& talks = model_.talks();
    const auto num_ghosts = std::ranges::count_if(talks, [](auto& t) { return t.second.ghost; });
    ASSERT_EQ(engine_.num_ghosts(), static_cast<uint32_t>(num_ghosts));
    ASSERT_EQ(engine_.num_conversations(), talks.size() - static_cast<size_t>(num_ghosts));
    for (uint32_t i = 0; i < kNumTiers; ++i) {
      const auto tier = static_cast<Tier>(i);
      std::vector<Conversation> members;
      for (const auto& [id, talk] : talks) {
        if (talk.evictable[i]) members.push_back(id);
      }
      const Conversation victim = engine_.Victim(tier);
      ASSERT_EQ(victim == kNoConversation, members.empty());
      for (const Conversation id : members) {
        ASSERT_FALSE(model_.GoesBefore(id, victim, tier)) << id << " before " << victim;
      }
      for (uint32_t tenant = 0; tenant < 2 && options_.by_tenant; ++tenant) {
        CompareTenant(tier, tenant, members);
      }
    }
    if (held_.empty()) return;
    const Conversation a = Any(), b = Any();
    const auto tier = static_cast<Tier>(Draw(kNumTiers));
    ASSERT_EQ(engine_.waiting(a), talks[a].place_in_queue >= 0);
    ASSERT_EQ(engine_.record(a).in_service > 0, talks[a].in_service > 0);
    ASSERT_FALSE(engine_.GoesBefore(tier, a, a));
    if (model_.MayTie(a, b, tier)) return;
    ASSERT_EQ(engine_.GoesBefore(tier, a, b), model_.GoesBefore(a, b, tier));
  }

  void CompareTenant(Tier tier, uint32_t tenant, std::vector<Conversation> members) {
    std::erase_if(members, [&](Conversation id) { return model_.talks()[id].tenant != tenant; });
    const Conversation victim = engine_.Victim(tier, tenant);
    ASSERT_EQ(victim == kNoConversation, members.empty());
    for (const Conversation id : members) {
      ASSERT_LE(model_.Rank(victim, tier, true), model_.Rank(id, tier, true));
    }
  }

  void CompareTables() {
    if (options_.kind != PolicyKind::kHazard) return;
    const HazardTables& tables = engine_.tables();
    ASSERT_EQ(tables.used().size(), model_.classes().size());
    const PolicyModel::Seen seen = model_.AllSeen();
    for (const PolicyModel::Class& c : model_.classes()) {
      if (c == PolicyModel::kNoTurn) continue;
      const auto id = static_cast<uint16_t>((((c[0] * 4 + c[1]) * 4 + c[2]) * 4 + c[3]) * 3 + c[4]);
      ASSERT_EQ(std::ranges::count(tables.used(), id), 1);
      for (int bin = 0; bin < PolicyModel::kBins; ++bin) {
        const auto [events, exposure_s] = seen.at(c)[bin];
        ASSERT_EQ(static_cast<double>(tables.events(id, bin)), events);
        ASSERT_NEAR(tables.exposure_s(id, bin, clock_.NowNs()), exposure_s,
                    1e-6 * exposure_s + 1e-9);
        const double index = model_.Index(c, bin);
        ASSERT_NEAR(tables.index(id, bin), index, 1e-5 * index) << "bin " << bin;
      }
    }
  }

  const PolicyOptions options_;
  std::mt19937 random_;
  ManualClock clock_;
  PolicyImpl engine_;
  PolicyModel model_;
  std::vector<Conversation> held_, queue_, in_service_;
};

class PolicyRandomTest : public testing::TestWithParam<PolicyKind> {};

// The model is slow, and slower with a sanitizer.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint32_t kSeeds = 2, kShare = 2;
#else
constexpr uint32_t kSeeds = 12, kShare = 1;
#endif

TEST_P(PolicyRandomTest, DoesWhatTheModelDoes) {
  for (uint32_t seed = 1; seed <= kSeeds && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    PolicyOptions options;
    options.kind = GetParam();
    options.drop_in_service = seed % 2 == 0;
    options.per_token = seed % 3 == 0;
    options.by_tenant = seed % 4 > 1;
    Player(options, seed).Play((GetParam() == PolicyKind::kHazard ? 700 : 1500) / kShare);
  }
}

INSTANTIATE_TEST_SUITE_P(Lookahead, PolicyRandomTest, testing::Values(PolicyKind::kLookahead));
INSTANTIATE_TEST_SUITE_P(Lru, PolicyRandomTest, testing::Values(PolicyKind::kLru));
INSTANTIATE_TEST_SUITE_P(Fifo, PolicyRandomTest, testing::Values(PolicyKind::kFifo));
INSTANTIATE_TEST_SUITE_P(Hazard, PolicyRandomTest, testing::Values(PolicyKind::kHazard));

}  // namespace
}  // namespace cachedattn
