// CheckStore: verifies the file of an SSD tier, without a model and without writing to it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

struct CheckOptions {
  std::string directory;
  bool deep = false;                        // also reads every block and verifies its bytes
  std::shared_ptr<KeyRing> keys = nullptr;  // of an encrypted store; deep needs them
  ScanProgress progress;                    // may throw: that ends the check
};

struct Damage {
  SlotId slot = kNoSlot;        // kNoSlot: what is damaged is no slot
  std::optional<BlockKey> key;  // of the block that is lost, where that is known
  std::string what;
};

struct CheckReport {
  uint64_t num_blocks = 0;     // looked at, the damaged ones included
  bool indexed = false;        // the last close was clean: its index says what each slot holds
  uint64_t num_erased = 0;     // blocks of tenants whose key is gone: nobody can read them
  std::vector<Damage> damage;  // what is no slot first, then by slot
};

// Checks both copies of the superblock, the index of a clean close, every block's header page
// against the index, and with `deep` every layer slice against its seal and the padding after it
// against zero. What lies in slots that hold no block is not looked at, nor what is unused before
// the first slot.
//
// An error when there is no store to check: those of ReadSsdInfo; kMismatch for another master key,
// or none where `deep` needs one. A store that another process
// writes to meanwhile looks damaged where it is being written.
CA_API Result<CheckReport> CheckStore(const CheckOptions& options);

}  // namespace cachedattn
