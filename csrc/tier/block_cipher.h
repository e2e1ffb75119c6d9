// BlockCipher: blocks of an encrypted store, on their way to the disk and back (csrc/README.md,
// "Encryption").
//
// DRAM holds plain bytes, so a write goes through a copy in memory of this object. A read is
// decrypted where it landed.
#pragma once

#include <optional>
#include <vector>

#include "csrc/tier/key_ring.h"
#include "csrc/tier/memory_tier.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {

class BlockCipher {
 public:
  // Binds options.keys to the store `uuid`; nullptr without keys. For at most `max_writes` writes
  // at a time.
  static Result<std::unique_ptr<BlockCipher>> Open(const SsdOptions& options, const Uuid& uuid,
                                                   uint32_t max_writes);

  // The encrypted block as it is to lie in `slot`, header page included; stays until End(write).
  // `sealed`: a layer that is not what its seal in `host_slot` says gets a tag that fits nothing.
  // REQUIRES: write < max_writes, the tenant has a key.
  std::byte* Begin(uint32_t write, SlotId slot, const BlockHeader& header, bool sealed,
                   const std::byte* host_slot);
  void End(uint32_t write) { staged_[write].Release(); }

  // Decrypts layers of the block with the header `page` where they lie in `host_slot`. The first
  // layer that is not what was sealed, which is then zeroed; the later ones are as they were.
  std::optional<uint32_t> Decrypt(const BlockPage& page, uint32_t first_layer, uint32_t num_layers,
                                  std::byte* host_slot) const;

 private:
  BlockCipher(std::shared_ptr<KeyRing> keys, const Uuid& uuid, const KvLayout& layout,
              std::unique_ptr<MemoryTier> staging, uint32_t max_writes);

  const std::shared_ptr<KeyRing> keys_;
  const Uuid uuid_;
  const KvLayout layout_;
  // The warmest slot is taken first, so only as much of it is ever touched as writes were under
  // way at once. What it holds is sealed.
  const std::unique_ptr<MemoryTier> staging_;
  std::vector<Slot> staged_;  // by write
};

}  // namespace cachedattn
