// Master keys for tests of encrypted stores.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

#include "csrc/tier/key_ring.h"

namespace cachedattn {

// A file with a key made of `letter`.
inline void WriteMasterKey(const std::string& path, char letter = 'k') {
  std::ofstream(path, std::ios::binary) << std::string(32, letter);
  ASSERT_EQ(::chmod(path.c_str(), 0600), 0);
}

// A ring serves one open of a store.
inline std::shared_ptr<KeyRing> MustLoad(const std::string& path) {
  auto ring = KeyRing::Open(path);
  if (!ring.ok()) {
    ADD_FAILURE() << ring.status().message();
    std::abort();
  }
  return std::move(ring.value());
}

}  // namespace cachedattn
