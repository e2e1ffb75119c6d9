// What of a chain is there: the longest history, and its end by bisection.
#include "csrc/store/lookup.h"

#include <gtest/gtest.h>

#include <random>

namespace cachedattn {
namespace {

constexpr uint32_t kBlockSize = 16;

class LookupTest : public ::testing::Test {
 protected:
  // `num_tokens` tokens, with blocks up to there in `tier`; a part-filled one is the last.
  void Fill(const Chain& chain, uint32_t num_tokens, Tier tier = Tier::kDram) {
    for (uint32_t first = 0; first < num_tokens; first += kBlockSize) {
      const uint32_t block = first / kBlockSize, tokens = std::min(kBlockSize, num_tokens - first);
      const BlockKey key = chain.PartialKey(block, tokens);
      BlockRef listed = directory_.Find(key);
      if (listed == nullptr) {
        listed = directory_.Insert(tenant_, key, chain.parent_key(block), tokens, block, block > 0,
                                   conversation_);
      }
      if (listed->absent(tier)) {
        directory_.FinishFill(directory_.BeginFill(listed, tier, slots_.Take()));
      }
    }
  }
  void Drop(const Chain& chain, uint32_t block) {
    directory_.Drop(directory_.Find(chain.key(block)).get(), Tier::kDram);
  }
  Chain NewChain(uint32_t num_tokens, const Truncation& truncation = {}) {
    Chain chain(TenantIdOf("t"), RootKey({}, "t"), kBlockSize, truncation);
    std::vector<TokenId> tokens(num_tokens);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random_());
    chain.Append(tokens);
    return chain;
  }

  const uint32_t seed_ = std::random_device()();
  std::mt19937 random_{seed_};
  SlotPool slots_{4000};
  const std::unique_ptr<Policy> policy_ = Policy::Make({}, &SystemClock());
  Directory directory_{kBlockSize, policy_.get()};
  const uint32_t tenant_ = directory_.TenantIndex(TenantIdOf("t"));
  const Conversation conversation_ = policy_->Hold(1, tenant_);
};

TEST_F(LookupTest, TheEndIsTheLastBlockOfTheHistory) {
  SCOPED_TRACE("seed " + std::to_string(seed_));
  for (int i = 0; i < 300; ++i) {
    const uint32_t num_tokens = 1 + random_() % 1000, there = random_() % (num_tokens + 1);
    const Chain chain = NewChain(num_tokens);
    const Tier tier = random_() % 2 ? Tier::kDram : Tier::kSsd;
    if (slots_.num_free() < 64) break;
    Fill(chain, there, tier);
    for (const bool ssd : {true, false}) {
      const uint32_t limit = random_() % 3 ? num_tokens - 1 : random_() % num_tokens;
      const History history = FindHistory(directory_, chain, limit, ssd);
      EXPECT_EQ(FindHistoryEnd(directory_, chain, limit, ssd).get(), history.end());
      const bool seen = tier == Tier::kDram || ssd;
      const uint32_t whole = std::min(there, limit) / kBlockSize * kBlockSize;
      EXPECT_EQ(history.num_tokens, !seen ? 0 : there <= limit ? there : whole);
    }
  }
}

TEST_F(LookupTest, ABlockMissingInTheMiddleEndsTheHistory) {
  const Chain chain = NewChain(10 * kBlockSize);
  Fill(chain, 10 * kBlockSize);
  Drop(chain, 4);
  EXPECT_EQ(FindHistory(directory_, chain, UINT32_MAX, true).num_tokens, 4 * kBlockSize);
}

TEST_F(LookupTest, WithAWindowWhatACutHasDroppedMayBeMissing) {
  const Truncation truncation{.window = 4 * kBlockSize, .keep_first = 4};
  const Chain chain = NewChain(9 * kBlockSize, truncation);
  Fill(chain, 9 * kBlockSize);
  const std::vector<uint32_t> kept = chain.ContextBlocks(9 * kBlockSize);
  ASSERT_LT(kept.size(), 9u);
  Drop(chain, kept[0] + 1);
  const History history = FindHistory(directory_, chain, UINT32_MAX, true);
  EXPECT_EQ(history.num_tokens, 9 * kBlockSize);
  EXPECT_EQ(history.indices, kept);
  EXPECT_EQ(FindHistoryEnd(directory_, chain, UINT32_MAX, true).get(), history.end());
}

}  // namespace
}  // namespace cachedattn
