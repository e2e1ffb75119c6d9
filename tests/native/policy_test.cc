// Each rule of the order in csrc/policy/policy.h, one at a time.
#include <gtest/gtest.h>

#include "csrc/policy/policy_impl.h"
#include "tests/native/testing/manual_clock.h"

namespace cachedattn {
namespace {

constexpr int64_t kSecond = ManualClock::kSecond;
constexpr TurnEnd kTurn = {Finish::kEndOfTurn, 1000, 100};

class PolicyTest : public testing::TestWithParam<PolicyKind> {
 protected:
  explicit PolicyTest(PolicyOptions options = {}) : options_(options) {
    options_.kind = GetParam();
    Open(options_);
  }
  void Open(const PolicyOptions& options) {
    options_ = options;
    policy_ = std::make_unique<PolicyImpl>(options, &clock_);
  }
  bool Is(PolicyKind kind) const { return GetParam() == kind; }
  bool queue_protects() const { return Is(PolicyKind::kLookahead) || Is(PolicyKind::kHazard); }

  Conversation New(uint64_t name = 0, uint32_t tenant = 0) {
    const Conversation id = policy_->Hold(name, tenant);
    policy_->SetEvictable(id, Tier::kDram, true);
    policy_->SetEvictable(id, Tier::kSsd, true);
    return id;
  }
  void Turn(Conversation id, int64_t ns = kSecond) {
    policy_->Begin(id);
    clock_.Advance(ns);
    policy_->End(id, &kTurn);
  }
  // In the order they go, each of which leaves `tier`.
  std::vector<Conversation> Drain(Tier tier = Tier::kDram) {
    std::vector<Conversation> order;
    for (Conversation id; (id = policy_->Victim(tier)) != kNoConversation;) {
      EXPECT_TRUE(order.empty() || policy_->GoesBefore(tier, order.back(), id));
      order.push_back(id);
      policy_->SetEvictable(id, tier, false);
      policy_->CheckInvariants();
    }
    for (const Conversation id : order) policy_->SetEvictable(id, tier, true);
    return order;
  }

  ManualClock clock_;
  PolicyOptions options_;
  std::unique_ptr<PolicyImpl> policy_;
};
using Order = std::vector<Conversation>;

TEST_P(PolicyTest, NothingThatMayGoIsNoVictim) {
  EXPECT_EQ(policy_->Victim(Tier::kDram), kNoConversation);
  const Conversation a = policy_->Hold(0, 0);
  EXPECT_EQ(policy_->Victim(Tier::kDram), kNoConversation);
  policy_->SetEvictable(a, Tier::kSsd, true);
  EXPECT_EQ(policy_->Victim(Tier::kDram), kNoConversation);
  EXPECT_EQ(policy_->Victim(Tier::kSsd), a);
}

TEST_P(PolicyTest, IdleOnesGoByTheRule) {
  const Conversation a = New(), b = New(), c = New();
  for (const Conversation id : {c, a, b}) Turn(id);
  EXPECT_EQ(Drain(), Is(PolicyKind::kFifo) ? (Order{a, b, c}) : (Order{c, a, b}));
}

TEST_P(PolicyTest, AGivenUpTurnIsAUseWhenItBegan) {
  const Conversation a = New(), b = New();
  Turn(b);
  policy_->Begin(a);
  Turn(b);
  policy_->End(a, nullptr);
  if (Is(PolicyKind::kLru) || Is(PolicyKind::kLookahead)) {
    EXPECT_EQ(Drain(), (Order{a, b}));
  }
  EXPECT_EQ(policy_->record(a).turns, 0u);
}

TEST_P(PolicyTest, ThePlacesFollowEachOther) {
  Order ids;
  for (int i = 0; i < 12; ++i) Turn(ids.emplace_back(New()));
  policy_->SetOver(ids[1]);
  clock_.Advance(kSecond);
  policy_->SetOver(ids[0]);
  policy_->SetReturn(ids[4], 1000 * kSecond);
  policy_->SetReturn(ids[5], 2000 * kSecond);
  policy_->Begin(ids[7]);
  policy_->Begin(ids[6]);
  policy_->SetQueue(Order{ids[9], ids[8]});
  policy_->SetLease(ids[10], 9 * kSecond);
  policy_->SetLease(ids[11], 8 * kSecond);
  const Order order = Drain();
  const auto part = [&](size_t from, size_t to) {
    Order some;
    for (size_t i = from; i < to; ++i) some.push_back(order[i]);
    return some;
  };
  EXPECT_EQ(part(0, 2), (Order{ids[1], ids[0]}));
  EXPECT_EQ(part(10, 12), (Order{ids[11], ids[10]}));
  if (queue_protects()) {
    EXPECT_EQ(part(8, 10), (Order{ids[8], ids[9]}));
  }
  if (Is(PolicyKind::kLookahead)) {
    EXPECT_EQ(part(2, 8), (Order{ids[2], ids[3], ids[7], ids[6], ids[5], ids[4]}));
  } else if (Is(PolicyKind::kLru)) {
    EXPECT_EQ(part(2, 10), (Order{ids[2], ids[3], ids[8], ids[9], ids[7], ids[6], ids[5], ids[4]}));
  } else if (Is(PolicyKind::kFifo)) {
    EXPECT_EQ(part(2, 10), (Order{ids[2], ids[3], ids[6], ids[7], ids[8], ids[9], ids[5], ids[4]}));
  }
}

TEST_P(PolicyTest, WithDropInServiceDramLosesThoseAtWork) {
  options_.drop_in_service = true;
  Open(options_);
  const Conversation a = New(), b = New(), c = New();
  policy_->SetOver(c);
  policy_->Begin(b);
  EXPECT_EQ(Drain(), (Order{c, b, a}));
  EXPECT_EQ(Drain(Tier::kSsd), (Order{c, a, b}));
}

TEST_P(PolicyTest, WhoLeavesTheQueueGoesBackToItsPlace) {
  const Conversation a = New(), b = New(), c = New();
  for (const Conversation id : {a, b, c}) Turn(id);
  policy_->SetQueue(Order{a, a});
  EXPECT_TRUE(policy_->waiting(a));
  EXPECT_EQ(Drain().back(), queue_protects() ? a : c);
  policy_->SetQueue({});
  EXPECT_FALSE(policy_->waiting(a));
  if (!Is(PolicyKind::kHazard)) {
    EXPECT_EQ(Drain(), (Order{a, b, c}));
  }
}

TEST_P(PolicyTest, HintsPass) {
  const Conversation a = New(), b = New();
  Turn(a);
  Turn(b);
  policy_->SetLease(a, 10 * kSecond);
  EXPECT_EQ(policy_->Victim(Tier::kDram), b);
  clock_.Advance(10 * kSecond);
  EXPECT_EQ(policy_->Victim(Tier::kDram), a);
  policy_->SetTimeToLive(b, 100 * kSecond);
  EXPECT_EQ(policy_->Victim(Tier::kDram), a);
  clock_.Advance(90 * kSecond);
  EXPECT_EQ(policy_->Victim(Tier::kDram), b);
  Turn(b);
  EXPECT_EQ(policy_->Victim(Tier::kDram), a);
  policy_->SetTimeToLive(b, 0);
  policy_->SetReturn(a, 5 * kSecond);
  // With kHazard b, which had its turn just now, is worth more than a hit in 5 s.
  EXPECT_EQ(policy_->Victim(Tier::kDram), Is(PolicyKind::kHazard) ? a : b);
  clock_.Advance(10 * kSecond);  // twice that has passed
  EXPECT_EQ(policy_->Victim(Tier::kDram), a);
  policy_->CheckInvariants();
}

TEST_P(PolicyTest, AConversationThatBeganToLeaveLeavesWhole) {
  options_.whole_conversation = true;
  Open(options_);
  const Conversation a = New(), b = New();
  EXPECT_EQ(policy_->Victim(Tier::kDram), a);
  policy_->SetOver(b);  // would go before
  EXPECT_EQ(policy_->Victim(Tier::kDram), a);
  EXPECT_TRUE(policy_->GoesBefore(Tier::kDram, b, a)) << "their places are not changed by it";
  policy_->SetEvictable(a, Tier::kDram, false);
  EXPECT_EQ(policy_->Victim(Tier::kDram), b);
}

TEST_P(PolicyTest, ATenantsOwnGoByUse) {
  options_.by_tenant = true;
  Open(options_);
  const Conversation a = New(0, 7), b = New(0, 7), other = New(0, 8);
  Turn(b);
  Turn(a);
  EXPECT_EQ(policy_->Victim(Tier::kDram, 7), b);
  EXPECT_EQ(policy_->Victim(Tier::kDram, 8), other);
  EXPECT_EQ(policy_->Victim(Tier::kDram, 9), kNoConversation);
}

TEST_P(PolicyTest, NamesLiveWhileHeld) {
  const Conversation a = New(5, 1);
  EXPECT_EQ(policy_->Hold(5, 1), a);
  EXPECT_NE(policy_->Hold(5, 2), a);
  EXPECT_NE(policy_->Hold(0, 1), policy_->Hold(0, 1));
  EXPECT_EQ(policy_->num_conversations(), 4u);
  Turn(a);
  policy_->Release(a);
  policy_->Release(a);
  EXPECT_EQ(policy_->num_conversations(), 3u);
  EXPECT_EQ(policy_->record(policy_->Hold(5, 1)).turns, Is(PolicyKind::kHazard) ? 1u : 0u);
  policy_->CheckInvariants();
}

TEST_P(PolicyTest, GhostsAreBoundedAndTheOldestGoes) {
  for (uint64_t name = 1; name <= PolicyImpl::kMaxGhosts + 100; ++name) {
    const Conversation id = policy_->Hold(name, 0);
    Turn(id);
    policy_->Release(id);
  }
  policy_->CheckInvariants();
  if (!Is(PolicyKind::kHazard)) return;
  EXPECT_EQ(policy_->num_ghosts(), PolicyImpl::kMaxGhosts);
  EXPECT_EQ(policy_->record(policy_->Hold(100, 0)).turns, 0u);
  EXPECT_EQ(policy_->record(policy_->Hold(101, 0)).turns, 1u);
}

TEST_P(PolicyTest, RestoredOnesAreInTheOrderOfTheCalls) {
  const Conversation a = New(), b = New(), c = New();
  for (const Conversation id : {b, c, a}) policy_->Restored(id);
  EXPECT_EQ(Drain(), (Order{b, c, a}));
}

TEST_P(PolicyTest, AClockThatJumpsYearsIsNoTrouble) {
  Order ids;
  for (int i = 0; i < 1000; ++i) {
    Turn(ids.emplace_back(New()), kSecond);
    if (i % 100 == 50) clock_.Advance(3 * 365 * 86'400 * kSecond);
  }
  policy_->SetLease(ids[3], INT64_MAX);
  policy_->SetReturn(ids[4], INT64_MAX);
  policy_->SetTimeToLive(ids[5], INT64_MAX);
  clock_.Advance(50LL * 365 * 86'400 * kSecond);
  EXPECT_NE(policy_->Victim(Tier::kDram), kNoConversation);
  policy_->CheckInvariants();
  EXPECT_EQ(Drain().size(), 1000u);
}

INSTANTIATE_TEST_SUITE_P(Lookahead, PolicyTest, testing::Values(PolicyKind::kLookahead));
INSTANTIATE_TEST_SUITE_P(Lru, PolicyTest, testing::Values(PolicyKind::kLru));
INSTANTIATE_TEST_SUITE_P(Fifo, PolicyTest, testing::Values(PolicyKind::kFifo));
INSTANTIATE_TEST_SUITE_P(Hazard, PolicyTest, testing::Values(PolicyKind::kHazard));

}  // namespace
}  // namespace cachedattn
