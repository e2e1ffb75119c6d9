// SsdTier: fixed slots in one preallocated file (format: csrc/README.md, "The SSD file").
//
// Knows the format, the checksums and the engine; not what a block means. The store decides which
// block lives in which slot and keeps the index; `Scan` gives it back after a restart. A slot's
// bytes are those of a DRAM slot, so a write takes a whole host slot and a read lands in one.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/base/block_key.h"
#include "csrc/base/kv_layout.h"
#include "csrc/base/status.h"
#include "csrc/io/io_engine.h"

namespace cachedattn {

struct SsdOptions {
  std::string directory;  // made with mode 0700 if absent; holds `blocks` and `LOCK`
  KvLayout layout;
  Digest identity;         // a store of another identity is refused (kMismatch)
  std::string model_name;  // for messages only
  uint64_t max_bytes = 0;  // hard cap on the file's size
  IoOptions io;
  bool read_only = false;  // inspect and check: no lock kept, nothing written
};

// What a slot's header says about its block.
struct BlockHeader {
  BlockKey key;
  BlockKey parent;
  uint32_t num_tokens = 0;
  uint32_t depth = 0;       // index of the block in its chain, from 0
  uint64_t generation = 0;  // grows with every write; the newer of two slots with one key wins
  bool operator==(const BlockHeader&) const = default;
};

// Counters kept in the superblock by a clean close; `cachedattn inspect` prints them.
struct StoreCounters {
  uint64_t turns = 0;
  uint64_t tokens_requested = 0;
  uint64_t tokens_from_device = 0;
  uint64_t tokens_from_dram = 0;
  uint64_t tokens_from_ssd = 0;
};

struct ScannedBlock {
  SlotId slot = kNoSlot;
  BlockHeader header;
};

// One finished piece of a read or a finished write.
struct SsdCompletion {
  uint64_t tag = 0;
  Status status;  // kCorrupt: a checksum or the header did not match, twice
};

// What a store's superblock says: enough for a reader to fill SsdOptions.
struct SsdInfo {
  KvLayout layout;
  Digest identity;
  std::string model_name;
  std::array<uint8_t, 16> uuid{};
  uint32_t num_slots = 0;
  bool clean = false;  // the last process that could write ended with Sync
  StoreCounters counters;
};

// Reads the superblock of the store in `directory`, of any model. kIo, kMismatch (another format
// version) or kCorrupt as for SsdTier::Open. Takes no lock and writes nothing.
CA_API Result<SsdInfo> ReadSsdInfo(const std::string& directory);

class CA_API SsdTier {
 public:
  // Creates or opens the file. kMismatch names the field in which an existing store differs;
  // kBusy if another process has it open; kIo with errno text for path, space and permission.
  static Result<std::unique_ptr<SsdTier>> Open(const SsdOptions& options);
  virtual ~SsdTier() = default;

  virtual uint32_t num_slots() const = 0;

  // Reads every slot's header; damaged or empty slots are left out, and of two slots with one key
  // the newer is kept. `progress(done, total)` may be empty. REQUIRES: nothing in flight.
  virtual Result<std::vector<ScannedBlock>> Scan(
      const std::function<void(uint64_t, uint64_t)>& progress) = 0;

  // Slots whose header page the last Scan could not read, or found damaged; sorted.
  virtual const std::vector<SlotId>& damaged_slots() const = 0;

  // Writes a whole block: fills the header page at the front of `host_slot` (checksums included)
  // and writes header and payload. `host_slot` must not change until the completion.
  // REQUIRES: can_submit().
  virtual void StartWrite(SlotId slot, const BlockHeader& header, std::byte* host_slot,
                          uint64_t tag) = 0;

  // Reads layers [first_layer, first_layer + num_layers) into their places in `host_slot`, and
  // verifies them. The piece with first_layer == 0 reads the header page too and compares it with
  // `header`; pieces of one block must start in layer order. One re-read before kCorrupt.
  // REQUIRES: can_submit().
  virtual void StartRead(SlotId slot, const BlockHeader& header, uint32_t first_layer,
                         uint32_t num_layers, std::byte* host_slot, uint64_t tag) = 0;

  virtual bool can_submit() const = 0;
  virtual uint32_t in_flight() const = 0;

  // Moves finished operations to `out` (appends). Waits up to `timeout_us` for the first one.
  virtual void Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) = 0;

  // Makes what was written durable and records the counters; the last call before the end.
  // REQUIRES: nothing in flight, not read_only.
  virtual Status Sync(const StoreCounters& counters) = 0;

  virtual StoreCounters counters() const = 0;  // as the last clean close left them
  virtual uint64_t bytes_read() const = 0;
  virtual uint64_t bytes_written() const = 0;
  virtual uint64_t checksum_failures() const = 0;  // times that a check failed, re-reads included
  virtual const char* io_name() const = 0;
  virtual const std::string& io_why() const = 0;
};

}  // namespace cachedattn
