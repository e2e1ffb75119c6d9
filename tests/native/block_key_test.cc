#include "csrc/base/block_key.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

namespace cachedattn {
namespace {

Digest IdentityOf(uint8_t first) {
  Digest identity;
  identity.bytes[0] = first;
  return identity;
}

// The schema is on disk: these values may change only together with kKeySchema. They were
// computed with another SHA-256 from the encoding that block_key.h describes.
TEST(BlockKey, PinnedVectors) {
  EXPECT_EQ(KeyHasher().Finish().Hex(),
            "6a0b97b68afe2e6c6afc0540170ded42d8ec5d306bd8e5128d23e821a7ac16f2");
  const BlockKey root = RootKey(IdentityOf(7), "tenant-1");
  EXPECT_EQ(root.Hex(), "e9c36e2c8fe07f2cd0f7b425fa49d4813ace70d34c0b6c9e68c601552b500d6e");
  const std::vector<TokenId> tokens = {1, 2, 70000, -1};
  const BlockKey plain = ChildKey(root, {}, tokens);
  EXPECT_EQ(plain.Hex(), "876a7c238d085821867dcf039bf61d5b0b79f55e3555e3750614b334c424091d");
  const std::vector<Cut> cuts = {{1, 4}, {1, 2}};
  EXPECT_EQ(ChildKey(root, cuts, tokens).Hex(),
            "999920a8c527abeeb63ade25b215f73ec02ccc3cb4a3692cd1cb6e54c0545201");
}

TEST(BlockKey, PinnedTenants) {
  const auto hex = [](const TenantId& id) {
    Digest digest;
    std::ranges::copy(id, digest.bytes.begin());
    return digest.Hex().substr(0, 2 * id.size());
  };
  EXPECT_EQ(hex(TenantIdOf("tenant-1")), "27fbd2b3bb854518713fdf125d5dff9c");
  EXPECT_EQ(hex(TenantIdOf("")), "e6c04af639326a480aa22df55e75725b");
}

TEST(BlockKey, EveryFieldCounts) {
  const BlockKey root = RootKey(IdentityOf(1), "a");
  const std::vector<TokenId> tokens = {1, 2, 3};
  const std::vector<std::vector<TokenId>> token_lists = {
      {1, 2, 3}, {1, 2, 4}, {1, 2}, {1, 2, 3, 0}, {3, 2, 1}, {-1, 2, 3}, {}};
  const std::vector<std::vector<Cut>> cut_lists = {
      {}, {{0, 1}}, {{1, 0}}, {{1, 1}}, {{0, 1}, {0, 1}}, {{1, 1}, {2, 1}}, {{2, 1}, {1, 1}}};
  const std::vector<BlockKey> parents = {root, RootKey(IdentityOf(2), "a"),
                                         RootKey(IdentityOf(1), "b"), RootKey(IdentityOf(1), ""),
                                         ChildKey(root, {}, tokens)};
  std::set<std::string> seen;
  size_t count = 0;
  for (const BlockKey& parent : parents) {
    seen.insert(parent.Hex());
    ++count;
    for (const auto& list : token_lists) {
      for (const auto& cuts : cut_lists) {
        if (parent == root && list == tokens && cuts.empty()) continue;  // the last parent
        seen.insert(ChildKey(parent, cuts, list).Hex());
        ++count;
      }
    }
  }
  EXPECT_EQ(seen.size(), count);
}

TEST(BlockKey, BytesCannotMoveBetweenFields) {
  const auto two = [](const char* a, const char* b) {
    return KeyHasher().Text(9, a).Text(9, b).Finish();
  };
  EXPECT_NE(two("ab", "c"), two("a", "bc"));
  EXPECT_NE(two("abc", ""), two("", "abc"));
  EXPECT_NE(two("abc", ""), KeyHasher().Text(9, "abc").Finish());
  EXPECT_NE(KeyHasher().Text(9, "a").Finish(), KeyHasher().Text(10, "a").Finish());
  // A text that spells another field with its tag and length is still one field.
  EXPECT_NE(KeyHasher().Text(9, std::string_view("a\x09\x01\0\0\0b", 7)).Finish(), two("a", "b"));
  // Tokens that look like a cut, and the other way round.
  const std::vector<Cut> cuts = {{5, 6}};
  const std::vector<TokenId> tokens = {5, 6};
  EXPECT_NE(ChildKey({}, cuts, {}), ChildKey({}, {}, tokens));
  // A tenant of 32 bytes is not an identity.
  const std::string zeros(32, '\0');
  EXPECT_NE(RootKey({}, ""), KeyHasher().Text(1, zeros).Finish());
}

TEST(BlockKey, NumbersAreHashedLittleEndian) {
  const std::array<uint8_t, 4> bytes = {0x78, 0x56, 0x34, 0x12};
  EXPECT_EQ(KeyHasher().U32(9, 0x12345678).Finish(), KeyHasher().Bytes(9, bytes).Finish());
}

TEST(BlockKey, ATenantsSecretIsPartOfItsRoot) {
  const std::array<uint8_t, 32> secret = {1}, other = {2};
  const BlockKey plain = RootKey({}, "t"), keyed = RootKey({}, "t", secret);
  EXPECT_NE(keyed, plain);
  EXPECT_NE(keyed, RootKey({}, "t", other));
  EXPECT_NE(keyed, RootKey({}, "u", secret));
  EXPECT_EQ(keyed, RootKey({}, "t", secret));
}

}  // namespace
}  // namespace cachedattn
