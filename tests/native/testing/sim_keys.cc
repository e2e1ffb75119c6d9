#include "tests/native/testing/sim_keys.h"

#include <stdlib.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "csrc/base/check.h"
#include "tests/native/testing/sim_disk.h"

namespace fs = std::filesystem;

namespace {
cachedattn::SimRandom random_bytes(0);
}  // namespace

// These take the place of the C library's.
extern "C" ssize_t getrandom(void* buffer, size_t length, unsigned) {
  auto* bytes = static_cast<unsigned char*>(buffer);
  for (size_t i = 0; i < length; ++i) bytes[i] = static_cast<unsigned char>(random_bytes.Next());
  return static_cast<ssize_t>(length);
}

extern "C" int fsync(int) { return 0; }

namespace cachedattn {

SimKeys::SimKeys() : root_(fs::temp_directory_path() / "cachedattn.XXXXXX") {
  CA_CHECK(::mkdtemp(root_.data()) != nullptr);
  const std::string key = root_ + "/key";
  std::ofstream(key, std::ios::binary) << std::string(32, 'k');
  CA_CHECK(::chmod(key.c_str(), 0600) == 0);
}

SimKeys::~SimKeys() {
  std::error_code ignored;
  fs::remove_all(root_, ignored);
}

void SimKeys::Format(uint64_t seed) {
  random_bytes = SimRandom(seed);
  Erase();
}

void SimKeys::Erase() {
  std::error_code ignored;
  if (worlds_ != 0) fs::remove_all(directory_, ignored);
  directory_ = root_ + "/" + std::to_string(worlds_++);
  CA_CHECK(fs::create_directory(directory_));
}

std::shared_ptr<KeyRing> SimKeys::Load() const {
  auto ring = KeyRing::Open(root_ + "/key");
  CA_CHECK(ring.ok());
  return std::move(ring.value());
}

void SimKeys::Settle(KeyRing* ring, const Digest& identity,
                     std::span<const std::string> names) const {
  const auto uses = [&] {
    for (const std::string& name : names) (void)ring->RootOf(identity, name);
  };
  uses();
  const auto written = [&] {
    std::error_code absent;
    const uintmax_t size = fs::file_size(directory_ + "/tenants", absent);
    return !absent && size == KeyRing::FileBytes(names.size());
  };
  while (!written()) uses();
}

}  // namespace cachedattn
