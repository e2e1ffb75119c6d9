// Chain against a context that is cut one token at a time.
#include "csrc/store/chain.h"

#include <set>

#include "tests/native/testing/store_fixture.h"

namespace cachedattn {
namespace {

Chain ChainOf(const Tokens& tokens, const Truncation& truncation, const char* tenant = "t") {
  Chain chain(TenantIdOf(tenant), RootKey({}, tenant), kBlock, truncation);
  chain.Append(tokens);
  return chain;
}

// The absolute positions of the context after `num_tokens` tokens.
std::vector<uint32_t> Positions(const Chain& chain, uint32_t num_tokens) {
  std::vector<uint32_t> positions;
  for (uint32_t block : chain.ContextBlocks(num_tokens)) {
    for (uint32_t i = block * kBlock; i < std::min((block + 1) * kBlock, num_tokens); ++i) {
      positions.push_back(i);
    }
  }
  return positions;
}

TEST(ChainTest, ContextFollowsTheRuleAtEveryLength) {
  const Tokens tokens = MakeTokens(40 * kBlock, 1);
  for (uint32_t window : {0u, 2 * kBlock, 5 * kBlock + 9, 8 * kBlock}) {
    for (double ratio : {0.1, 0.5, 1.0}) {
      for (uint32_t keep_first : {0u, 4u, 16u}) {
        const Truncation truncation{window, ratio, keep_first};
        ASSERT_TRUE(truncation.Validate(kBlock).ok());
        const Chain chain = ChainOf(tokens, truncation);
        ReferenceContext reference(truncation, kBlock);
        for (uint32_t n = 1; n <= tokens.size(); ++n) {
          reference.Push(tokens[n - 1]);
          ASSERT_EQ(Positions(chain, n), reference.positions())
              << "window " << window << " ratio " << ratio << " keep " << keep_first << " at " << n;
        }
      }
    }
  }
}

TEST(ChainTest, AppendingInPiecesMakesTheSameKeys) {
  const Tokens tokens = MakeTokens(10 * kBlock + 3, 1);
  const Truncation truncation{4 * kBlock, 0.5, 0};
  const Chain whole = ChainOf(tokens, truncation);
  Chain pieces(TenantIdOf("t"), RootKey({}, "t"), kBlock, truncation);
  for (size_t i = 0; i < tokens.size(); i += 7) {
    pieces.Append(std::span(tokens).subspan(i, std::min<size_t>(7, tokens.size() - i)));
  }
  ASSERT_EQ(pieces.num_full_blocks(), 10u);
  for (uint32_t b = 0; b < 10; ++b) EXPECT_EQ(pieces.key(b), whole.key(b));
  EXPECT_EQ(pieces.PartialKey(10, 3), whole.PartialKey(10, 3));
}

TEST(ChainTest, KeysTellCutsTokensAndTenantsApart) {
  const Tokens tokens = MakeTokens(10 * kBlock, 1);
  const Chain plain = ChainOf(tokens, {});
  const Chain cut = ChainOf(tokens, {4 * kBlock, 0.5, 0});
  const Chain other_cut = ChainOf(tokens, {4 * kBlock, 0.5, 4});
  for (uint32_t b = 0; b < 4; ++b) {
    EXPECT_EQ(plain.key(b), cut.key(b)) << "no cut yet: the prefix is shared";
    EXPECT_EQ(plain.key(b), other_cut.key(b));
  }
  EXPECT_EQ(cut.CutBefore(3), nullptr);
  ASSERT_NE(cut.CutBefore(4), nullptr);
  EXPECT_EQ(*cut.CutBefore(4), (Cut{0, 2}));
  EXPECT_EQ(*other_cut.CutBefore(4), (Cut{1, 1}));
  std::set<std::string> keys;
  for (const Chain& chain : {plain, cut, other_cut, ChainOf(tokens, {}, "other")}) {
    for (uint32_t b = 4; b < 10; ++b) keys.insert(chain.key(b).Hex());
  }
  EXPECT_EQ(keys.size(), 24u);
  EXPECT_NE(plain.PartialKey(9, 15), plain.PartialKey(9, 14));
  EXPECT_EQ(plain.PartialKey(9, 16), plain.key(9));
}

TEST(TruncationTest, BadValuesAreNamed) {
  const auto text = [](const Truncation& truncation) {
    const Status status = truncation.Validate(kBlock);
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    return status.message();
  };
  EXPECT_NE(text({64, 0.0, 4}).find("ratio"), std::string::npos);
  EXPECT_NE(text({64, 1.5, 4}).find("ratio"), std::string::npos);
  EXPECT_NE(text({64, std::numeric_limits<double>::quiet_NaN(), 4}).find("ratio"),
            std::string::npos);
  EXPECT_NE(text({15, 0.5, 0}).find("window"), std::string::npos);
  EXPECT_NE(text({64, 0.5, 64}).find("window"), std::string::npos);
  EXPECT_NE(text({64, 0.5, UINT32_MAX}).find("window"), std::string::npos);
}

}  // namespace
}  // namespace cachedattn
