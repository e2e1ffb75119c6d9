// The bytes of the SSD file (csrc/README.md, "The SSD file"). Little-endian, as they lie in memory.
//
//   page 0, page 1      superblock copies; the valid one with the higher generation counts
//   page 2              scratch, for probes of the disk
//   from kFirstSlot on  slots of KvLayout::host_slot_bytes(): a BlockPage, then the payload
//   after the slots     the index: an entry for each slot, in IndexPages; valid after a clean close
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <span>
#include <string>

#include "csrc/base/slice_sum.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

constexpr uint32_t kSsdVersion = 2;
constexpr uint64_t kScratchOffset = 2 * kPage;
constexpr uint64_t kFirstSlot = kHugePage;  // where slot 0 begins
constexpr std::array<char, 8> kSuperblockMagic = {'C', 'A', 'T', 'T', 'N', 'S', 'S', 'D'};
constexpr std::array<char, 8> kBlockMagic = {'C', 'A', 'T', 'T', 'N', 'B', 'L', 'K'};

using Uuid = std::array<uint8_t, 16>;

constexpr uint32_t kNoCipher = 0;
constexpr uint32_t kAes256Gcm = 1;

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
  uint32_t cipher = kNoCipher;
  uint32_t zero = 0;
  std::array<uint8_t, 16> key_check{};  // names the master key; zero without cipher
  std::array<uint8_t, 3664> rest{};     // 0
  uint64_t checksum = 0;                // XXH3-64 of all bytes before it
};
static_assert(sizeof(Superblock) == kPage && offsetof(Superblock, checksum) == kPage - 8);

// What proves a layer slice: its sum, without the padding, bound to (uuid, key, layer); or the tag
// of its cipher.
using SliceSeal = std::array<uint8_t, 16>;

// The first page of a slot.
struct BlockPage {
  std::array<char, 8> magic = kBlockMagic;
  uint32_t version = kSsdVersion;
  uint32_t num_layers = 0;
  std::array<uint8_t, 32> key{};
  std::array<uint8_t, 32> parent{};
  TenantId tenant{};
  std::array<uint8_t, 16> salt{};  // of the cipher; zero without one
  uint32_t num_tokens = 0;
  uint32_t depth = 0;
  uint64_t generation = 0;
  SlotId slot = 0;  // where the page belongs: a write that went astray is found
  uint32_t zero = 0;
  std::array<SliceSeal, KvLayout::kMaxLayers> seals{};
  std::array<uint8_t, 112> rest{};  // 0
  uint64_t checksum = 0;            // XXH3-64 of all bytes before it, seeded with uuid
};
static_assert(sizeof(BlockPage) == kPage && offsetof(BlockPage, checksum) == kPage - 8);

// What the index says of a slot; num_tokens == 0: the slot holds no block.
struct IndexEntry {
  std::array<uint8_t, 32> key{};
  std::array<uint8_t, 32> parent{};
  TenantId tenant{};
  uint64_t generation = 0;
  uint32_t num_tokens = 0;
  uint32_t depth = 0;
};
constexpr uint32_t kEntriesPerPage = 42;

struct IndexPage {
  std::array<IndexEntry, kEntriesPerPage> entries{};
  std::array<uint8_t, 56> zero{};
  // XXH3-64 of all bytes before it, seeded with (uuid, generation of the superblock that was
  // written with it, number of the page), so that no older index passes for this one.
  uint64_t checksum = 0;
};
static_assert(sizeof(IndexPage) == kPage);

constexpr uint64_t NumIndexPages(uint64_t num_slots) {
  return (num_slots + kEntriesPerPage - 1) / kEntriesPerPage;
}
// Where the index begins, and how long a file of `num_slots` slots is.
inline uint64_t IndexOffset(const KvLayout& layout, uint64_t num_slots) {
  return kFirstSlot + num_slots * layout.host_slot_bytes();
}
inline uint64_t SsdFileBytes(const KvLayout& layout, uint64_t num_slots) {
  return IndexOffset(layout, num_slots) + NumIndexPages(num_slots) * kPage;
}
// The most slots of a file of at most `max_bytes`; 0 when it holds none.
uint32_t SlotsWithin(const KvLayout& layout, uint64_t max_bytes);

void Seal(Superblock* superblock);
bool IsSealed(const Superblock& superblock);  // magic and checksum hold; any version

KvLayout LayoutOf(const Superblock& superblock);
std::string NameOf(const Superblock& superblock);
StoreCounters CountersOf(const Superblock& superblock);
void SetCounters(const StoreCounters& counters, Superblock* superblock);

SliceSeal SealOf(const Uuid& uuid, const BlockKey& key, uint32_t layer, const SliceSum& sum);
// Of layer `layer` as it lies in `host_slot`.
SliceSeal SealOfSlice(const Uuid& uuid, const KvLayout& layout, const BlockKey& key, uint32_t layer,
                      const std::byte* host_slot);

// The header page of a block for `slot`, all but the seals and the checksum.
BlockPage PageOf(const KvLayout& layout, SlotId slot, const BlockHeader& header);
void Seal(const Uuid& uuid, BlockPage* page);

// Turns the sums that stand where the seals of `host_slot` go into seals.
void SealSums(const Uuid& uuid, const KvLayout& layout, const BlockKey& key, std::byte* host_slot);

// Seals the slices of `host_slot` as they lie there, in its header page.
void SealSlices(const Uuid& uuid, const KvLayout& layout, const BlockKey& key,
                std::byte* host_slot);
// Completes the header page at the front of `host_slot`, where the seals are.
void SealHeader(const Uuid& uuid, const KvLayout& layout, SlotId slot, const BlockHeader& header,
                std::byte* host_slot);

// Whether layer `layer` in `host_slot` is what the header `page` says.
bool IsSealed(const Uuid& uuid, const KvLayout& layout, const BlockPage& page, uint32_t layer,
              const std::byte* host_slot);
// The first of these layers that is not.
std::optional<uint32_t> FirstBadLayer(const Uuid& uuid, const KvLayout& layout,
                                      const BlockPage& page, uint32_t first_layer,
                                      uint32_t num_layers, const std::byte* host_slot);

// kCorrupt, with the reason, unless `page` is the whole header page of slot `slot` of this store
// and layout.
Status CheckBlockPage(const Uuid& uuid, const KvLayout& layout, SlotId slot, const BlockPage& page);

BlockHeader HeaderOf(const BlockPage& page);

// `generation` is that of the superblock, `number` that of the page.
void Seal(const Uuid& uuid, uint64_t generation, uint64_t number, IndexPage* page);
bool IsSealed(const Uuid& uuid, uint64_t generation, uint64_t number, const IndexPage& page);

IndexEntry EntryOf(const BlockHeader& header);
BlockHeader HeaderOf(const IndexEntry& entry);

}  // namespace cachedattn
