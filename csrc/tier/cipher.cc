#include "csrc/tier/cipher.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/mman.h>
#include <sys/random.h>

#include <cerrno>
#include <cstring>

#include "csrc/base/check.h"

namespace cachedattn {
namespace {

// The library's own set-up would read a configuration file of the machine, which may name modules
// that this copy cannot load.
void InitCrypto() {
  static const int done =
      OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, nullptr);
  CA_CHECK(done == 1);
}

// Looked up once: a look-up by name costs as much as a page of cipher text.
const EVP_CIPHER* Aes256Gcm() {
  InitCrypto();
  static const EVP_CIPHER* const cipher = EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr);
  CA_CHECK(cipher != nullptr);
  return cipher;
}

unsigned char* Bytes(std::byte* data) { return reinterpret_cast<unsigned char*>(data); }
const unsigned char* Bytes(const std::byte* data) {
  return reinterpret_cast<const unsigned char*>(data);
}

uint64_t PagesFor(size_t bytes) { return AlignUp(bytes, kPage); }

}  // namespace

void* AllocateSecret(size_t bytes) {
  void* data =
      ::mmap(nullptr, PagesFor(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CA_CHECK(data != MAP_FAILED);
  (void)::madvise(data, PagesFor(bytes), MADV_DONTDUMP);
  (void)::mlock(data, PagesFor(bytes));
  return data;
}

void FreeSecret(void* data, size_t bytes) {
  OPENSSL_cleanse(data, bytes);
  ::munmap(data, PagesFor(bytes));
}

void FillRandom(std::span<uint8_t> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::getrandom(bytes.data(), bytes.size(), 0);
    if (count < 0 && errno == EINTR) continue;
    CA_CHECK(count > 0);  // without flags it fails for wrong arguments only
    bytes = bytes.subspan(static_cast<size_t>(count));
  }
}

void Wipe(std::span<uint8_t> bytes) { OPENSSL_cleanse(bytes.data(), bytes.size()); }

Digest HmacSha256(std::span<const uint8_t> key, std::string_view message) {
  InitCrypto();
  Digest digest;
  unsigned int size = 0;
  const auto* data = reinterpret_cast<const unsigned char*>(message.data());
  CA_CHECK(HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()), data, message.size(),
                digest.bytes.data(), &size) != nullptr);
  CA_CHECK(size == digest.bytes.size());
  return digest;
}

AesGcm::AesGcm(const CipherKey& key) : context_(EVP_CIPHER_CTX_new()) {
  CA_CHECK(context_ != nullptr);
  CA_CHECK(EVP_EncryptInit_ex2(context_, Aes256Gcm(), key.data(), nullptr, nullptr) == 1);
}

AesGcm::~AesGcm() { EVP_CIPHER_CTX_free(context_); }  // wipes the key

GcmTag AesGcm::Seal(const Nonce& nonce, std::span<const uint8_t> aad,
                    std::span<const std::byte> plain, std::byte* out) {
  int size = 0;
  GcmTag tag;
  CA_CHECK(EVP_EncryptInit_ex2(context_, nullptr, nullptr, nonce.data(), nullptr) == 1);
  CA_CHECK(EVP_EncryptUpdate(context_, nullptr, &size, aad.data(), static_cast<int>(aad.size())));
  CA_CHECK(EVP_EncryptUpdate(context_, Bytes(out), &size, Bytes(plain.data()),
                             static_cast<int>(plain.size())) == 1);
  CA_CHECK(EVP_EncryptFinal_ex(context_, Bytes(out) + size, &size) == 1);
  CA_CHECK(EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_GET_TAG, static_cast<int>(tag.size()),
                               tag.data()) == 1);
  return tag;
}

bool AesGcm::Open(const Nonce& nonce, std::span<const uint8_t> aad, const GcmTag& tag,
                  std::span<const std::byte> sealed, std::byte* out) {
  int size = 0;
  GcmTag expected = tag;  // the interface wants it writable
  CA_CHECK(EVP_DecryptInit_ex2(context_, nullptr, nullptr, nonce.data(), nullptr) == 1);
  CA_CHECK(EVP_DecryptUpdate(context_, nullptr, &size, aad.data(), static_cast<int>(aad.size())));
  CA_CHECK(EVP_DecryptUpdate(context_, Bytes(out), &size, Bytes(sealed.data()),
                             static_cast<int>(sealed.size())) == 1);
  CA_CHECK(EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_SET_TAG, static_cast<int>(expected.size()),
                               expected.data()) == 1);
  if (EVP_DecryptFinal_ex(context_, Bytes(out) + size, &size) == 1) return true;
  std::memset(out, 0, sealed.size());  // nobody may use bytes that are not proven
  return false;
}

}  // namespace cachedattn
