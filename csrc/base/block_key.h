// BlockKey: the identity of a block (design D3).
//
// key = SHA-256 over typed, length-prefixed fields. Two blocks have equal keys only if every
// input of their KV is equal: the model (`identity`), the tenant, all earlier tokens (through
// the parent key), every cut made on the way (the lineage), and the block's own tokens.
#pragma once

#include <array>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "csrc/base/types.h"

namespace cachedattn {

struct Digest {
  std::array<uint8_t, 32> bytes{};
  bool operator==(const Digest&) const = default;
  CA_API std::string Hex() const;
};

using BlockKey = Digest;

// Whose block it is: a digest of the tenant's name. Blocks of two tenants never have equal keys.
using TenantId = std::array<uint8_t, 16>;

struct DigestHash {
  size_t operator()(const Digest& digest) const {
    size_t value;
    std::memcpy(&value, digest.bytes.data(), sizeof(value));
    return value;
  }
};

// One overflow cut: `num_blocks` blocks left the context, from index `first_block` of the block
// list as it stood then (design D4).
struct Cut {
  uint32_t first_block = 0;
  uint32_t num_blocks = 0;
  bool operator==(const Cut&) const = default;
};

// Feeds tag + length + bytes of each field to SHA-256, so that no two tuples of fields share an
// encoding. Tags are fixed by the key schema; changing any of them changes kKeySchema.
class CA_API KeyHasher {
 public:
  static constexpr uint32_t kKeySchema = 1;

  KeyHasher();
  KeyHasher& Bytes(uint8_t tag, std::span<const uint8_t> bytes);
  KeyHasher& Text(uint8_t tag, std::string_view text);
  KeyHasher& U32(uint8_t tag, uint32_t value);
  Digest Finish();

 private:
  alignas(16) std::array<uint8_t, 128> state_;  // SHA256_CTX, kept out of this header
};

// Key of the root that a conversation's first block chains to.
// `identity` covers the weights, dtype, layout and RoPE parameters. `secret` is the tenant's own in
// an encrypted store, so that keys say nothing of tokens to who lacks it; else empty.
CA_API BlockKey RootKey(const Digest& identity, std::string_view tenant,
                        std::span<const uint8_t> secret = {});

CA_API TenantId TenantIdOf(std::string_view tenant);

// Key of a block with `tokens` (1 to block_size of them) after `parent`, with the cuts that were
// made between the parent and this block.
CA_API BlockKey ChildKey(const BlockKey& parent, std::span<const Cut> cuts,
                         std::span<const TokenId> tokens);

}  // namespace cachedattn
