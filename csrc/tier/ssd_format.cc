#include "csrc/tier/ssd_format.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

namespace cachedattn {
namespace {

static_assert(std::endian::native == std::endian::little, "the file's numbers are little-endian");

// A fuzzer that had to find sums would find nothing behind them: one of its builds takes any.
bool Same(uint64_t sum, uint64_t expected) {
#ifdef CACHEDATTN_FUZZ_TRUST_SUMS
  sum = expected;
#endif
  return sum == expected;
}

uint64_t UuidSeed(const Uuid& uuid) { return XXH3_64bits(uuid.data(), uuid.size()); }

uint64_t PageSum(const BlockPage& page, const Uuid& uuid) {
  return XXH3_64bits_withSeed(&page, offsetof(BlockPage, checksum), UuidSeed(uuid));
}

uint64_t PageSum(const IndexPage& page, const Uuid& uuid, uint64_t generation, uint64_t number) {
  struct {
    Uuid uuid;
    uint64_t generation, number;
  } place = {uuid, generation, number};
  static_assert(sizeof(place) == 32);
  const uint64_t seed = XXH3_64bits(&place, sizeof(place));
  return XXH3_64bits_withSeed(&page, offsetof(IndexPage, checksum), seed);
}

}  // namespace

uint32_t SlotsWithin(const KvLayout& layout, uint64_t max_bytes) {
  if (max_bytes < SsdFileBytes(layout, 1)) return 0;
  // At least this many, were every slot to take its share of an index page, rounded up.
  constexpr uint64_t kShare = kPage / kEntriesPerPage + 1;
  uint64_t slots = (max_bytes - kFirstSlot - kPage) / (layout.host_slot_bytes() + kShare);
  while (slots < kNoSlot - 1 && SsdFileBytes(layout, slots + 1) <= max_bytes) ++slots;
  return static_cast<uint32_t>(std::min<uint64_t>(slots, kNoSlot - 1));
}

void Seal(Superblock* superblock) {
  superblock->checksum = XXH3_64bits(superblock, offsetof(Superblock, checksum));
}

bool IsSealed(const Superblock& superblock) {
  return superblock.magic == kSuperblockMagic &&
         Same(superblock.checksum, XXH3_64bits(&superblock, offsetof(Superblock, checksum)));
}

KvLayout LayoutOf(const Superblock& superblock) {
  return {superblock.num_layers, superblock.num_kv_heads, superblock.head_dim,
          superblock.block_size,
          // Validate refuses what is too large, which must not wrap round to what is not.
          static_cast<DType>(std::min<uint32_t>(superblock.dtype, UINT8_MAX))};
}

std::string NameOf(const Superblock& superblock) {
  const char* name = superblock.model_name.data();
  return std::string(name, strnlen(name, superblock.model_name.size()));
}

StoreCounters CountersOf(const Superblock& superblock) {
  return {superblock.turns, superblock.tokens_requested, superblock.tokens_from[0],
          superblock.tokens_from[1], superblock.tokens_from[2]};
}

void SetCounters(const StoreCounters& counters, Superblock* superblock) {
  superblock->turns = counters.turns;
  superblock->tokens_requested = counters.tokens_requested;
  superblock->tokens_from = {counters.tokens_from_device, counters.tokens_from_dram,
                             counters.tokens_from_ssd};
}

SliceSeal SealOf(const Uuid& uuid, const BlockKey& key, uint32_t layer, const SliceSum& sum) {
  struct {
    Uuid uuid;
    std::array<uint8_t, 32> key;
    uint32_t layer;
  } place = {uuid, key.bytes, layer};
  static_assert(sizeof(place) == 52);
  const uint64_t seed = XXH3_64bits(&place, sizeof(place));
  const XXH128_hash_t hash = XXH3_128bits_withSeed(sum.data(), sum.size(), seed);
  SliceSeal seal;
  std::memcpy(seal.data(), &hash.low64, 8);
  std::memcpy(seal.data() + 8, &hash.high64, 8);
  return seal;
}

SliceSeal SealOfSlice(const Uuid& uuid, const KvLayout& layout, const BlockKey& key, uint32_t layer,
                      const std::byte* host_slot) {
  const std::byte* slice = host_slot + layout.host_slice_offset(layer);
  return SealOf(uuid, key, layer, SumOfSlice({slice, layout.slice_bytes()}));
}

BlockPage PageOf(const KvLayout& layout, SlotId slot, const BlockHeader& header) {
  BlockPage page;
  page.num_layers = layout.num_layers;
  page.key = header.key.bytes;
  page.parent = header.parent.bytes;
  page.tenant = header.tenant;
  page.num_tokens = header.num_tokens;
  page.depth = header.depth;
  page.generation = header.generation;
  page.slot = slot;
  return page;
}

void Seal(const Uuid& uuid, BlockPage* page) { page->checksum = PageSum(*page, uuid); }

void SealSums(const Uuid& uuid, const KvLayout& layout, const BlockKey& key, std::byte* host_slot) {
  auto& page = *reinterpret_cast<BlockPage*>(host_slot);
  for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
    page.seals[layer] = SealOf(uuid, key, layer, page.seals[layer]);
  }
}

void SealSlices(const Uuid& uuid, const KvLayout& layout, const BlockKey& key,
                std::byte* host_slot) {
  auto& page = *reinterpret_cast<BlockPage*>(host_slot);
  for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
    page.seals[layer] = SealOfSlice(uuid, layout, key, layer, host_slot);
  }
}

void SealHeader(const Uuid& uuid, const KvLayout& layout, SlotId slot, const BlockHeader& header,
                std::byte* host_slot) {
  BlockPage page = PageOf(layout, slot, header);
  const auto& before = *reinterpret_cast<const BlockPage*>(host_slot);
  std::copy_n(before.seals.begin(), layout.num_layers, page.seals.begin());
  Seal(uuid, &page);
  std::memcpy(host_slot, &page, sizeof(page));
}

bool IsSealed(const Uuid& uuid, const KvLayout& layout, const BlockPage& page, uint32_t layer,
              const std::byte* host_slot) {
  return SealOfSlice(uuid, layout, {page.key}, layer, host_slot) == page.seals[layer];
}

std::optional<uint32_t> FirstBadLayer(const Uuid& uuid, const KvLayout& layout,
                                      const BlockPage& page, uint32_t first_layer,
                                      uint32_t num_layers, const std::byte* host_slot) {
  for (uint32_t layer = first_layer; layer < first_layer + num_layers; ++layer) {
    if (!IsSealed(uuid, layout, page, layer, host_slot)) return layer;
  }
  return std::nullopt;
}

Status CheckBlockPage(const Uuid& uuid, const KvLayout& layout, SlotId slot,
                      const BlockPage& page) {
  const char* reason = nullptr;
  if (page.magic != kBlockMagic) {
    reason = "there is no block header";
  } else if (!Same(page.checksum, PageSum(page, uuid))) {
    reason = "the header's checksum does not match";
  } else if (page.version != kSsdVersion) {
    reason = "the header has another version";
  } else if (page.num_layers != layout.num_layers || page.num_tokens < 1 ||
             page.num_tokens > layout.block_size) {
    reason = "the header's sizes are out of range";
  } else if (page.slot != slot) {
    return Status(Code::kCorrupt, "it holds what belongs into slot " + std::to_string(page.slot));
  }
  return reason == nullptr ? Status() : Status(Code::kCorrupt, reason);
}

BlockHeader HeaderOf(const BlockPage& page) {
  return {{page.key}, {page.parent}, page.tenant, page.num_tokens, page.depth, page.generation};
}

void Seal(const Uuid& uuid, uint64_t generation, uint64_t number, IndexPage* page) {
  page->checksum = PageSum(*page, uuid, generation, number);
}

bool IsSealed(const Uuid& uuid, uint64_t generation, uint64_t number, const IndexPage& page) {
  return Same(page.checksum, PageSum(page, uuid, generation, number));
}

IndexEntry EntryOf(const BlockHeader& header) {
  return {header.key.bytes,  header.parent.bytes, header.tenant,
          header.generation, header.num_tokens,   header.depth};
}

BlockHeader HeaderOf(const IndexEntry& entry) {
  return {{entry.key},      {entry.parent}, entry.tenant,
          entry.num_tokens, entry.depth,    entry.generation};
}

}  // namespace cachedattn
