// AES-256-GCM and HMAC-SHA256 against published vectors; what a wrong tag does.
#include "csrc/tier/cipher.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/native/testing/mappings.h"

namespace cachedattn {
namespace {

std::vector<uint8_t> FromHex(const std::string& text) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < text.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

template <typename T>
T Take(const std::string& hex) {
  const std::vector<uint8_t> bytes = FromHex(hex);
  T out{};
  EXPECT_EQ(bytes.size(), out.size());
  std::copy(bytes.begin(), bytes.end(), out.begin());
  return out;
}

struct Vector {
  std::string key, nonce, aad, plain, sealed, tag;
};

// Test cases 13 to 16 of the paper that defines GCM (McGrew and Viega).
const Vector kVectors[] = {
    {std::string(64, '0'), std::string(24, '0'), "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"},
    {std::string(64, '0'), std::string(24, '0'), "", std::string(32, '0'),
     "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919"},
    {"feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308", "cafebabefacedbaddecaf888",
     "",
     "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
     "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
     "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
     "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad",
     "b094dac5d93471bdec1a502270e3cc6c"},
    {"feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308", "cafebabefacedbaddecaf888",
     "feedfacedeadbeeffeedfacedeadbeefabaddad2",
     "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
     "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
     "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
     "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662",
     "76fc6ece0f4e1768cddf8853bb2d551b"},
};

TEST(Cipher, SealsAsPublished) {
  for (const Vector& v : kVectors) {
    AesGcm cipher(Take<CipherKey>(v.key));
    const auto nonce = Take<Nonce>(v.nonce);
    const auto tag = Take<GcmTag>(v.tag);
    const std::vector<uint8_t> aad = FromHex(v.aad), plain = FromHex(v.plain),
                               sealed = FromHex(v.sealed);
    std::vector<uint8_t> out(plain.size());
    auto* data = reinterpret_cast<std::byte*>(out.data());
    for (int i = 0; i < 2; ++i) {  // a cipher serves more than once
      EXPECT_EQ(cipher.Seal(nonce, aad, std::as_bytes(std::span(plain)), data), tag);
      EXPECT_EQ(out, sealed);
      EXPECT_TRUE(cipher.Open(nonce, aad, tag, std::as_bytes(std::span(out)), data)) << "in place";
      EXPECT_EQ(out, plain);
    }
  }
}

TEST(Cipher, AnyFlippedBitIsFoundAndNothingIsGivenOut) {
  const Vector& v = kVectors[3];
  const auto key = Take<CipherKey>(v.key);
  const auto nonce = Take<Nonce>(v.nonce);
  const auto tag = Take<GcmTag>(v.tag);
  const std::vector<uint8_t> aad = FromHex(v.aad), sealed = FromHex(v.sealed);
  uint32_t flips = 0;
  const auto refuse = [&](CipherKey k, Nonce n, std::vector<uint8_t> a, GcmTag t,
                          std::vector<uint8_t> s) {
    AesGcm cipher(k);
    auto* data = reinterpret_cast<std::byte*>(s.data());
    EXPECT_FALSE(cipher.Open(n, a, t, std::as_bytes(std::span(s)), data));
    EXPECT_TRUE(std::all_of(s.begin(), s.end(), [](uint8_t b) { return b == 0; }));
    ++flips;
  };
  const auto each_bit = [](auto bytes, const auto& use) {
    for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      auto changed = bytes;
      changed[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
      use(changed);
    }
  };
  each_bit(key, [&](const auto& k) { refuse(k, nonce, aad, tag, sealed); });
  each_bit(nonce, [&](const auto& n) { refuse(key, n, aad, tag, sealed); });
  each_bit(aad, [&](const auto& a) { refuse(key, nonce, a, tag, sealed); });
  each_bit(tag, [&](const auto& t) { refuse(key, nonce, aad, t, sealed); });
  each_bit(sealed, [&](const auto& s) { refuse(key, nonce, aad, tag, s); });
  EXPECT_EQ(flips, 8u * (32 + 12 + 20 + 16 + 60));
  auto shorter = sealed;
  shorter.pop_back();
  refuse(key, nonce, aad, tag, shorter);
}

TEST(Cipher, HmacIsAsPublished) {
  // RFC 4231, test cases 1 and 2.
  EXPECT_EQ(HmacSha256(std::vector<uint8_t>(20, 0x0b), "Hi There").Hex(),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  EXPECT_EQ(HmacSha256(FromHex("4a656665"), "what do ya want for nothing?").Hex(),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(Cipher, SecretsAreLeftOutOfCoreDumps) {
  const Secret<CipherKey> secret;
  EXPECT_TRUE(std::all_of(secret->begin(), secret->end(), [](uint8_t b) { return b == 0; }));
  const auto at = reinterpret_cast<uintptr_t>(&*secret);
  uint32_t found = 0;
  for (const Mapping& mapping : Mappings()) {
    const bool here = at >= mapping.begin && at < mapping.end;
    if (here) {
      EXPECT_FALSE(mapping.dumped);
    }
    found += here;
  }
  EXPECT_EQ(found, 1u);
}

}  // namespace
}  // namespace cachedattn
