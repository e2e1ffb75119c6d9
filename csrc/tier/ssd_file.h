// SsdFile: the parts of the SSD tier's file that are not slots: the superblock and the index.
//
// Its reads and writes wait for the disk, each at most until its deadline. When one does not end,
// the pages are still the disk's: they belong to this object, which must outlive the engine.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "csrc/tier/aligned_bytes.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {

class SsdFile {
 public:
  explicit SsdFile(const SsdOptions& options) : options_(options) {}
  ~SsdFile();  // does not wait for a disk that has not answered: see FreeAbandoned

  // What a disk that did not answer may still write to stays, and so does the lock. Frees what it
  // has let go of; returns how many are left.
  static size_t FreeAbandoned();

  // A request of this object, into its pages, was given up.
  void SetHung() { hung_ = true; }

  // Takes the file and reads its superblock and index. To write: makes a store of an empty file,
  // and brings it to the size that the options ask for. Errors are those of SsdTier::Open.
  Status Open(std::unique_ptr<BlockFile> file);
  // Reads the superblock of a store of any model; writes nothing.
  Status OpenReadOnly(std::unique_ptr<BlockFile> file);
  Status CheckKey() const;  // against options.keys, as Open does
  Status ReadIndex();       // where there is one

  IoEngine& engine() { return *engine_; }
  const BlockFile& file() const { return *file_; }
  uint32_t num_slots() const { return num_slots_; }
  const Superblock& superblock() const { return superblock_; }

  // What the last clean close recorded. Empty after a crash, and where the index is damaged.
  const std::optional<std::vector<ScannedBlock>>& index() const { return index_; }

  // Pages for the disk to use, while nothing else of this object waits for it: as many as can be
  // read at a time.
  std::byte* pages() { return pages_.get(); }
  uint64_t num_pages() const { return std::clamp<uint64_t>(engine_->depth(), 2, 64); }

  // As SsdTier::Sync.
  Status Sync(const StoreCounters& counters, std::span<const ScannedBlock> blocks);

 private:
  Status Take(std::unique_ptr<BlockFile> file);
  Status CheckMatch() const;
  Status Move(IoOp op, uint64_t offset, std::byte* data, uint32_t size);
  Status Load();
  Status Create(uint32_t num_slots);
  Status Resize(uint32_t num_slots);
  Status WriteIndex(std::span<const ScannedBlock> blocks, uint64_t generation);
  Status WriteSuperblock();

  const SsdOptions options_;
  // Pages first: they are given back last, after the engine has let go of them.
  AlignedBytes pages_;
  std::unique_ptr<BlockFile> file_;
  std::unique_ptr<IoEngine> engine_;
  Superblock superblock_;
  uint32_t num_slots_ = 0;
  bool hung_ = false;        // an answer is still to come: its buffer and tag are taken
  uint32_t num_copies_ = 0;  // of the superblock that are whole
  std::optional<std::vector<ScannedBlock>> index_;
};

}  // namespace cachedattn
