// The files that a key ring reads: a master key of any bytes, and a good list of two tenants with
// some of its bytes overwritten, its sum perhaps made right again, its end perhaps cut off.
#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <cstdlib>
#include <filesystem>

#include "csrc/tier/key_ring.h"
#include "tests/fuzz/mini_store.h"

namespace cachedattn {
namespace {

enum Flags : uint8_t { kMasterKey = 1, kSeal = 2 };

const Uuid kUuid = {1, 2, 3};
constexpr int64_t kDeadlineUs = 10'000'000;

// In memory where there is a file system for that; gone when the process ends well.
struct Folder {
  std::string path =
      std::filesystem::is_directory("/dev/shm") ? "/dev/shm/fuzzXXXXXX" : "/tmp/fuzzXXXXXX";
  std::string master, tenants;
  std::vector<uint8_t> good;  // what `tenants` holds after two of them were there

  Folder() {
    CA_CHECK(::mkdtemp(path.data()) != nullptr);
    master = path + "/master";
    tenants = path + "/tenants";
    Write(master, std::vector<uint8_t>(32, 7));
    auto ring = KeyRing::Open(master);
    CA_CHECK(ring.ok() && ring.value()->Bind(path, kUuid, kDeadlineUs).ok());
    (void)ring.value()->RootOf({}, "a");
    (void)ring.value()->RootOf({}, "b");
    good.resize(std::filesystem::file_size(tenants));
    const int fd = ::open(tenants.c_str(), O_RDONLY | O_CLOEXEC);
    CA_CHECK(::read(fd, good.data(), good.size()) == static_cast<ssize_t>(good.size()));
    ::close(fd);
  }
  ~Folder() { std::filesystem::remove_all(path); }

  static void Write(const std::string& file, std::span<const uint8_t> bytes) {
    const int fd = ::open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CA_CHECK(fd >= 0);
    CA_CHECK(::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
    ::close(fd);
  }
};

void RunMasterKey(const Folder& folder, std::span<const uint8_t> bytes) {
  const std::string file = folder.path + "/other";
  Folder::Write(file, bytes);
  const auto ring = KeyRing::Open(file);
  CA_CHECK(ring.ok() || ring.status().code() == Code::kInvalidArgument);
}

}  // namespace

void FuzzOne(Input input) {
  static const Folder folder;
  const auto flags = input.Number<uint8_t>();
  if (flags & kMasterKey) return RunMasterKey(folder, input.Take(256));
  std::vector<uint8_t> bytes = folder.good;
  const auto size = input.Number<uint8_t>();
  if (size > 0) bytes.resize(size);
  while (!input.empty() && !bytes.empty()) {
    const size_t at = input.Number<uint8_t>() % bytes.size();
    const auto patch = input.Take(input.Number<uint8_t>() % 32);
    std::copy_n(patch.begin(), std::min(patch.size(), bytes.size() - at), bytes.begin() + at);
  }
  if ((flags & kSeal) && bytes.size() >= 8) {
    const uint64_t sum = XXH3_64bits(bytes.data(), bytes.size() - 8);
    std::memcpy(bytes.data() + bytes.size() - 8, &sum, 8);
  }
  Folder::Write(folder.tenants, bytes);
  auto ring = KeyRing::Open(folder.master);
  CA_CHECK(ring.ok());
  const Status status = ring.value()->Bind(folder.path, kUuid, kDeadlineUs);
  const Code code = status.code();
  CA_CHECK(code == Code::kOk || code == Code::kCorrupt || code == Code::kMismatch);
  CA_CHECK(status.ok() || !status.message().empty());
}

}  // namespace cachedattn
