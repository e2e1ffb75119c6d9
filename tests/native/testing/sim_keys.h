// SimKeys: the keys of encrypted worlds, which lie in a folder of the real disk.
//
// A program with it in has random bytes that follow from a seed, for uuids, salts and keys, and
// waits for no disk when it writes the folder.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "csrc/tier/key_ring.h"

namespace cachedattn {

class SimKeys {
 public:
  SimKeys();  // a folder of its own, gone with this object
  ~SimKeys();
  SimKeys(const SimKeys&) = delete;
  SimKeys& operator=(const SimKeys&) = delete;

  // A world begins: no tenant has a key, and all that is random from now on follows from `seed`.
  void Format(uint64_t seed);
  // No tenant has a key.
  void Erase();

  std::shared_ptr<KeyRing> Load() const;
  const std::string& directory() const { return directory_; }

  // Gives keys to the tenants `names`, the only ones, and has them written however long the machine
  // takes: else the blocks that a restart finds would hang on its load.
  void Settle(KeyRing* ring, const Digest& identity, std::span<const std::string> names) const;

 private:
  std::string root_;
  std::string directory_;  // of this world; a write under way may still end in an older one
  uint64_t worlds_ = 0;
};

}  // namespace cachedattn
