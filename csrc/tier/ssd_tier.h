// SsdTier: fixed slots in one preallocated file (format: csrc/README.md, "The SSD file").
//
// Knows the format, the checksums and the engine; not what a block means. The store decides which
// block lives in which slot and keeps the directory; `Scan` gives it back after a restart. A slot's
// bytes are those of a DRAM slot, so a write takes a whole host slot and a read lands in one.
//
// Every operation has a deadline. When it passes, the operation has failed for its caller, but its
// buffer belongs to the disk until that answers: the caller gets two completions.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "csrc/base/block_key.h"
#include "csrc/base/clock.h"
#include "csrc/base/kv_layout.h"
#include "csrc/base/status.h"
#include "csrc/io/block_file.h"
#include "csrc/tier/key_ring.h"

namespace cachedattn {

struct SsdOptions {
  std::string directory;  // made with mode 0700 if absent; holds `blocks` and `LOCK`
  KvLayout layout;
  Digest identity;         // a store of another identity is refused (kMismatch)
  std::string model_name;  // for messages only
  uint64_t max_bytes = 0;  // hard cap on the file's size
  IoOptions io;
  int64_t io_deadline_us = 2'000'000;  // of one read or write
  const Clock* clock = &SystemClock();
  bool read_only = false;  // inspect and check: no lock kept, nothing written
  // Of an encrypted store; it serves one tier. Reading headers alone does without.
  std::shared_ptr<KeyRing> keys = nullptr;

  Status Validate() const;  // kInvalidArgument
};

// What a slot's header says about its block.
struct BlockHeader {
  BlockKey key;
  BlockKey parent;
  TenantId tenant{};
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

// Called as progress(done, total); may be empty.
using ScanProgress = std::function<void(uint64_t done, uint64_t total)>;

struct ScannedBlock {
  SlotId slot = kNoSlot;
  BlockHeader header;
};

// A slot that holds bytes, but no block that can be used.
struct SlotDamage {
  SlotId slot = kNoSlot;
  std::string what;         // names the slot, the block if its key can be read, and what is wrong
  bool unreadable = false;  // the disk failed; else the bytes are wrong
};

// The end of a piece of a read, of a write or of a probe.
struct SsdCompletion {
  uint64_t tag = 0;
  Status status;  // kCorrupt: a checksum or the header did not match, twice; kIo: all else
  // The deadline has passed: the operation has failed, but the disk still has the buffer. Another
  // completion with this tag (and `late` false) gives it back whenever the disk answers; a write
  // may then have succeeded after all.
  bool late = false;
};

// What a store's superblock says: enough for a reader to fill SsdOptions.
struct SsdInfo {
  KvLayout layout;
  Digest identity;
  std::string model_name;
  std::array<uint8_t, 16> uuid{};
  uint32_t num_slots = 0;
  bool clean = false;  // the last process that could write ended with Sync
  bool encrypted = false;
  StoreCounters counters;
};

// Reads the superblock of the store in `directory`, of any model. kIo, kMismatch (another format
// version) or kCorrupt as for SsdTier::Open. Takes no lock and writes nothing.
CA_API Result<SsdInfo> ReadSsdInfo(const std::string& directory);

// Drops the key of the tenant `name` of the encrypted store in `directory`, which nobody may have
// open. False: there is none. Errors are those of KeyRing::Open, SsdTier::Open and KeyRing::Erase.
CA_API Result<bool> EraseTenant(const std::string& directory, const std::string& master_key_file,
                                std::string_view name);

class CA_API SsdTier {
 public:
  // Creates or opens the file. kMismatch names the field in which an existing store differs;
  // kBusy if another process has it open; kIo with errno text for path, space and permission.
  static Result<std::unique_ptr<SsdTier>> Open(const SsdOptions& options);
  // The same on a file that is open already; in `options.directory` are only the tenants' keys.
  static Result<std::unique_ptr<SsdTier>> OpenOn(const SsdOptions& options,
                                                 std::unique_ptr<BlockFile> file);
  virtual ~SsdTier() = default;  // waits for what is in flight

  // A tier that could not be opened since its disk did not answer leaves behind what the disk may
  // still write to, and its lock. Frees what the disk has let go of; returns how many are left.
  static size_t FreeAbandoned();

  virtual uint32_t num_slots() const = 0;
  virtual const std::array<uint8_t, 16>& uuid() const = 0;

  // The blocks that the file holds, by slot: from the index after a clean close, else by reading
  // every slot's header page. Damaged or empty slots are left out, and of two slots with one key
  // the newer is kept. kIo when the disk does not answer. REQUIRES: nothing in flight.
  virtual Result<std::vector<ScannedBlock>> Scan(const ScanProgress& progress) = 0;

  // The same from the header pages alone, whatever the index says.
  virtual Result<std::vector<ScannedBlock>> ScanHeaders(const ScanProgress& progress) = 0;
  // What the last clean close recorded, nullptr after a crash or where it is damaged.
  virtual const std::vector<ScannedBlock>* index() const = 0;

  // Slots whose header page the last scan read and found damaged, or could not read; by slot.
  virtual const std::vector<SlotDamage>& damaged() const = 0;

  // Seals the payload in `host_slot` ahead of StartWrite, which else does it. False: not here, the
  // store is encrypted.
  virtual bool Seal(const BlockKey& key, std::byte* host_slot) = 0;
  // Writes a whole block: fills the header page at the front of `host_slot` (seals included, unless
  // `sealed`) and writes header and payload. `host_slot` must not change until the completion.
  // REQUIRES: can_submit().
  virtual void StartWrite(SlotId slot, const BlockHeader& header, bool sealed, std::byte* host_slot,
                          uint64_t tag) = 0;

  // Reads layers [first_layer, first_layer + num_layers) into their places in `host_slot`, and
  // verifies them. The piece with first_layer == 0 reads the header page too and compares it with
  // `header`; pieces of one block must start in layer order. One re-read before kCorrupt.
  // REQUIRES: can_submit().
  virtual void StartRead(SlotId slot, const BlockHeader& header, uint32_t first_layer,
                         uint32_t num_layers, std::byte* host_slot, uint64_t tag) = 0;

  // Writes a scratch page and reads it back: does the disk work? REQUIRES: can_submit(), not
  // read_only, no other probe in flight.
  virtual void StartProbe(uint64_t tag) = 0;

  virtual bool can_submit() const = 0;
  virtual uint32_t in_flight() const = 0;  // late operations included
  virtual uint32_t num_late() const = 0;   // of these, past their deadline

  // Moves finished operations to `out` (appends). Waits up to `timeout_us` for the first one.
  virtual void Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) = 0;

  // Makes what was written durable, then records the counters and `blocks`, all that the file
  // holds by now, for the next Scan; the last call before the end. kIo when the disk fails or does
  // not answer. REQUIRES: nothing in flight, not read_only.
  virtual Status Sync(const StoreCounters& counters, std::span<const ScannedBlock> blocks) = 0;

  virtual KeyRing* keys() const = 0;           // nullptr: not encrypted
  virtual StoreCounters counters() const = 0;  // as the last clean close left them
  virtual uint64_t bytes_read() const = 0;
  // Bytes a second that the disk gave lately while it had reads to do; 0: not known.
  virtual double read_rate() const = 0;
  virtual uint64_t bytes_written() const = 0;
  virtual uint64_t checksum_failures() const = 0;  // times that a check failed, re-reads included
  virtual const char* io_name() const = 0;
  virtual const std::string& io_why() const = 0;
};

}  // namespace cachedattn
