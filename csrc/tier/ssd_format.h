// The bytes of the SSD file (csrc/README.md, "The SSD file"). Little-endian, as they lie in memory.
//
//   page 0, page 1      superblock copies; the valid one with the higher generation counts
//   from kFirstSlot on  slots of KvLayout::host_slot_bytes(): a BlockPage, then the payload
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>

#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

constexpr uint32_t kSsdVersion = 1;
constexpr uint64_t kFirstSlot = kHugePage;  // where slot 0 begins
constexpr std::array<char, 8> kSuperblockMagic = {'C', 'A', 'T', 'T', 'N', 'S', 'S', 'D'};
constexpr std::array<char, 8> kBlockMagic = {'C', 'A', 'T', 'T', 'N', 'B', 'L', 'K'};

using Uuid = std::array<uint8_t, 16>;

// Magic, version and checksum keep their places in every later version of the format.
struct Superblock {
  std::array<char, 8> magic = kSuperblockMagic;
  uint32_t version = kSsdVersion;
  uint32_t clean = 0;       // 1: the last process that could write ended with Sync
  uint64_t generation = 0;  // grows with every superblock write
  Uuid uuid{};              // random, made with the file; seeds every checksum in it
  std::array<uint8_t, 32> identity{};
  uint32_t num_layers = 0, num_kv_heads = 0, head_dim = 0, block_size = 0, dtype = 0;
  uint32_t num_slots = 0;
  uint64_t slot_bytes = 0;
  uint64_t turns = 0, tokens_requested = 0;
  std::array<uint64_t, kNumTiers> tokens_from{};  // device, DRAM, SSD
  std::array<char, 256> model_name{};             // cut to 255 bytes, ends with 0
  std::array<uint8_t, 3688> zero{};
  uint64_t checksum = 0;  // XXH3-64 of all bytes before it
};
static_assert(sizeof(Superblock) == kPage && offsetof(Superblock, checksum) == kPage - 8);

// The first page of a slot.
struct BlockPage {
  std::array<char, 8> magic = kBlockMagic;
  uint32_t version = kSsdVersion;
  uint32_t num_layers = 0;
  std::array<uint8_t, 32> key{};
  std::array<uint8_t, 32> parent{};
  uint32_t num_tokens = 0;
  uint32_t depth = 0;
  uint64_t generation = 0;
  // Sum i: XXH3-64 of layer slice i without its padding, seeded with (uuid, key, i).
  std::array<uint64_t, KvLayout::kMaxLayers> sums{};
  std::array<uint8_t, 1944> zero{};
  uint64_t checksum = 0;  // XXH3-64 of all bytes before it, seeded with uuid
};
static_assert(sizeof(BlockPage) == kPage && offsetof(BlockPage, checksum) == kPage - 8);

void Seal(Superblock* superblock);
bool IsSealed(const Superblock& superblock);  // magic and checksum hold; any version

KvLayout LayoutOf(const Superblock& superblock);
std::string NameOf(const Superblock& superblock);
StoreCounters CountersOf(const Superblock& superblock);

// The checksum of layer `layer`: `slice` is its bytes without the padding.
uint64_t SliceSum(const Uuid& uuid, const BlockKey& key, uint32_t layer,
                  std::span<const std::byte> slice);

// Writes the header page at the front of `host_slot`, the sums of its payload included.
void SealBlock(const Uuid& uuid, const KvLayout& layout, const BlockHeader& header,
               std::byte* host_slot);

// kCorrupt, with the reason, unless `page` is a whole header page of this store and layout.
Status CheckBlockPage(const Uuid& uuid, const KvLayout& layout, const BlockPage& page);

BlockHeader HeaderOf(const BlockPage& page);

}  // namespace cachedattn
