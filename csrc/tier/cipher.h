// AES-256-GCM, HMAC-SHA256 and memory for keys, over OpenSSL.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>

#include "csrc/base/block_key.h"

struct evp_cipher_ctx_st;

namespace cachedattn {

using CipherKey = std::array<uint8_t, 32>;
using Nonce = std::array<uint8_t, 12>;
using GcmTag = std::array<uint8_t, 16>;

// A `T` on pages of its own: locked and left out of core dumps where the system allows it, zeroed
// before they are given back. T is trivial and begins as zeros.
void* AllocateSecret(size_t bytes);
void FreeSecret(void* data, size_t bytes);
template <typename T>
class Secret {
 public:
  Secret() : data_(static_cast<T*>(AllocateSecret(sizeof(T)))) {}
  ~Secret() { FreeSecret(data_, sizeof(T)); }
  Secret(const Secret&) = delete;
  Secret& operator=(const Secret&) = delete;
  T* operator->() const { return data_; }
  T& operator*() const { return *data_; }

 private:
  T* const data_;
};

void FillRandom(std::span<uint8_t> bytes);
void Wipe(std::span<uint8_t> bytes);  // zeros that no compiler leaves out

Digest HmacSha256(std::span<const uint8_t> key, std::string_view message);

// AES-256-GCM under one key, which is gone from memory with this object. A nonce serves once.
class CA_API AesGcm {
 public:
  explicit AesGcm(const CipherKey& key);
  ~AesGcm();
  AesGcm(const AesGcm&) = delete;
  AesGcm& operator=(const AesGcm&) = delete;

  // `out` has room for plain.size() bytes and may be plain.data().
  GcmTag Seal(const Nonce& nonce, std::span<const uint8_t> aad, std::span<const std::byte> plain,
              std::byte* out);
  // False: the tag does not fit; `out` is zeroed. `out` may be sealed.data().
  bool Open(const Nonce& nonce, std::span<const uint8_t> aad, const GcmTag& tag,
            std::span<const std::byte> sealed, std::byte* out);

 private:
  evp_cipher_ctx_st* const context_;
};

}  // namespace cachedattn
