// KeyRing: the keys of one encrypted store (csrc/README.md, "Encryption").
//
// A master key from a file wraps one random data key a tenant; the wrapped keys lie in the file
// `tenants` beside the blocks. Data keys are unwrapped for the moment of their use. To erase a
// tenant is to drop its wrapped key. Belongs to the store's control thread.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/io/direct_file.h"
#include "csrc/tier/cipher.h"

namespace cachedattn {

using Salt = std::array<uint8_t, 16>;

class CA_API KeyRing {
 public:
  static constexpr uint32_t kMaxTenants = 1 << 16;
  // The length of the file `tenants`.
  static constexpr uint64_t FileBytes(uint64_t tenants) { return 40 + tenants * 76; }

  // Reads the master key: 32 bytes, or 64 hexadecimal digits. kIo with the errno text or what the
  // file's mode, owner or kind allows others; kInvalidArgument: not a key.
  static Result<std::unique_ptr<KeyRing>> Open(const std::string& master_key_file);
  ~KeyRing();
  KeyRing(const KeyRing&) = delete;
  KeyRing& operator=(const KeyRing&) = delete;

  // Names the master key in the superblock of the store `uuid`, and says nothing else of it.
  std::array<uint8_t, 16> CheckOf(const std::array<uint8_t, 16>& uuid) const;

  // Reads the tenants of the store `uuid` in `directory`; without the file there are none.
  // kMismatch: the file of another store; kCorrupt: a damaged one, or a key that does not unwrap.
  // Writing it waits for the disk at most `deadline_us`. Once, before all that follows.
  Status Bind(const std::string& directory, const std::array<uint8_t, 16>& uuid,
              int64_t deadline_us);

  // The id by which the store knows the tenant `name`: a digest under the master key.
  TenantId IdOf(std::string_view name) const;
  bool Has(const TenantId& tenant) const { return wrapped_.contains(tenant); }

  // The root key of the tenant's chains; a secret of the tenant is part of it. The first use makes
  // the tenant's data key. When that cannot be written down the tenant's blocks are lost with this
  // process, no more; the next call tries again. Above kMaxTenants the root is random: all misses.
  BlockKey RootOf(const Digest& identity, std::string_view name);

  // The cipher of one block, nullptr for a tenant that has no key.
  std::unique_ptr<AesGcm> CipherOf(const TenantId& tenant, const Salt& salt) const;

  // Drops the tenant's key, on the disk first. False: it has none. kIo: the key is still there.
  Result<bool> Erase(const TenantId& tenant);

 private:
  // As they lie in the file, after the tenant's id.
  struct Wrapped {
    Nonce nonce;
    CipherKey key;
    GcmTag tag;
  };
  struct Secrets {
    CipherKey master, data, block;
    std::array<uint8_t, 68> text;  // of the master key's file
  };
  struct Write;

  KeyRing() = default;
  bool Unwrap(const TenantId& tenant) const;
  Status Parse(const std::vector<uint8_t>& bytes);
  std::vector<uint8_t> Serialized() const;
  std::array<uint8_t, 32> WrapAad(const TenantId& tenant) const;
  Status Save();

  const Secret<Secrets> secrets_;
  std::array<uint8_t, 16> uuid_{};
  std::map<TenantId, Wrapped> wrapped_;
  std::string path_;  // of `tenants`, for messages
  std::shared_ptr<UniqueFd> directory_;
  int64_t deadline_us_ = 0;
  bool unsaved_ = false;
  std::shared_ptr<Write> write_;  // the last one; may still be the disk's
};

}  // namespace cachedattn
