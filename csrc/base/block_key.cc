#include "csrc/base/block_key.h"

// The one-shot EVP interface allocates a context for every key; these calls do not.
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

#include <algorithm>
#include <bit>
#include <new>

#include "csrc/base/check.h"

namespace cachedattn {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are hashed as they lie");

// Tags of the schema's own fields. Identities (hashed by the caller) use tags of their own choice;
// they enter a root key as a digest, so their tags cannot meet these.
enum Tag : uint8_t {
  kTagSchema = 0,
  kTagIdentity = 1,
  kTagTenant = 2,
  kTagParent = 3,
  kTagCuts = 4,
  kTagTokens = 5,
  kTagSecret = 6,  // left out where there is none
};

SHA256_CTX* Context(std::array<uint8_t, 128>& state) {
  static_assert(sizeof(SHA256_CTX) <= sizeof(state));
  static_assert(alignof(SHA256_CTX) <= 16);
  return std::launder(reinterpret_cast<SHA256_CTX*>(state.data()));
}

template <typename T>
std::span<const uint8_t> AsBytes(std::span<const T> values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size_bytes()};
}

}  // namespace

std::string Digest::Hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (uint8_t byte : bytes) {
    text.push_back(kDigits[byte >> 4]);
    text.push_back(kDigits[byte & 15]);
  }
  return text;
}

KeyHasher::KeyHasher() : state_{} {
  SHA256_Init(new (state_.data()) SHA256_CTX);
  U32(kTagSchema, kKeySchema);
}

KeyHasher& KeyHasher::Bytes(uint8_t tag, std::span<const uint8_t> bytes) {
  CA_CHECK(bytes.size() <= UINT32_MAX);
  const uint32_t size = static_cast<uint32_t>(bytes.size());
  uint8_t prefix[5] = {tag};
  std::memcpy(prefix + 1, &size, sizeof(size));
  SHA256_Update(Context(state_), prefix, sizeof(prefix));
  SHA256_Update(Context(state_), bytes.data(), bytes.size());
  return *this;
}

KeyHasher& KeyHasher::Text(uint8_t tag, std::string_view text) {
  return Bytes(tag, {reinterpret_cast<const uint8_t*>(text.data()), text.size()});
}

KeyHasher& KeyHasher::U32(uint8_t tag, uint32_t value) {
  return Bytes(tag, AsBytes(std::span<const uint32_t>(&value, 1)));
}

Digest KeyHasher::Finish() {
  Digest digest;
  SHA256_Final(digest.bytes.data(), Context(state_));
  return digest;
}

BlockKey RootKey(const Digest& identity, std::string_view tenant, std::span<const uint8_t> secret) {
  KeyHasher hasher;
  hasher.Bytes(kTagIdentity, identity.bytes).Text(kTagTenant, tenant);
  if (!secret.empty()) hasher.Bytes(kTagSecret, secret);
  return hasher.Finish();
}

TenantId TenantIdOf(std::string_view tenant) {
  const Digest digest = KeyHasher().Text(kTagTenant, tenant).Finish();
  TenantId id;
  std::copy_n(digest.bytes.begin(), id.size(), id.begin());
  return id;
}

BlockKey ChildKey(const BlockKey& parent, std::span<const Cut> cuts,
                  std::span<const TokenId> tokens) {
  static_assert(sizeof(Cut) == 8 && sizeof(TokenId) == 4);
  return KeyHasher()
      .Bytes(kTagParent, parent.bytes)
      .Bytes(kTagCuts, AsBytes(cuts))
      .Bytes(kTagTokens, AsBytes(tokens))
      .Finish();
}

}  // namespace cachedattn
