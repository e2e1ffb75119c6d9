// SsdFile: the file of the SSD tier as a whole: directory, lock, superblock, reserved space.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>

#include "csrc/io/direct_file.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {

struct FreeDeleter {
  void operator()(void* data) const { std::free(data); }
};
using AlignedBytes = std::unique_ptr<std::byte[], FreeDeleter>;

// Zeroed memory; `alignment` is a power of two that divides `size`.
AlignedBytes AllocateAligned(size_t size, size_t alignment);

class SsdFile {
 public:
  // Errors are those of SsdTier::Open.
  static Result<std::unique_ptr<SsdFile>> Open(const SsdOptions& options);

  // Opens the file of an existing store, of any model, for reading.
  static Result<std::unique_ptr<SsdFile>> OpenReadOnly(const std::string& directory);

  int fd() const { return file_.fd.get(); }
  bool direct() const { return file_.direct; }
  uint32_t num_slots() const { return num_slots_; }
  const Superblock& superblock() const { return superblock_; }

  // Makes all finished writes durable, then a superblock with `counters` that says "clean".
  Status Sync(const StoreCounters& counters);

 private:
  SsdFile() = default;

  Status OpenDirectory(const std::string& directory, bool create);
  Status Lock();
  Status Load();
  Status Create(const SsdOptions& options, uint32_t num_slots);
  Status CheckMatch(const SsdOptions& options) const;
  Status Resize(uint32_t num_slots);
  Status Reserve(uint64_t bytes);
  Status WriteSuperblock();
  Status ReadOrCreate(const SsdOptions& options, uint32_t num_slots);

  std::string path_;  // of the directory, for messages
  UniqueFd directory_;
  UniqueFd lock_;  // held while the store is open for writing
  DirectFile file_;
  uint64_t file_bytes_ = 0;
  Superblock superblock_;
  uint32_t num_slots_ = 0;
};

}  // namespace cachedattn
