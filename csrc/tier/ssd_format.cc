#include "csrc/tier/ssd_format.h"

#include <xxhash.h>

#include <bit>
#include <cstring>

namespace cachedattn {
namespace {

static_assert(std::endian::native == std::endian::little, "the file's numbers are little-endian");

uint64_t UuidSeed(const Uuid& uuid) { return XXH3_64bits(uuid.data(), uuid.size()); }

uint64_t PageSum(const BlockPage& page, const Uuid& uuid) {
  return XXH3_64bits_withSeed(&page, offsetof(BlockPage, checksum), UuidSeed(uuid));
}

}  // namespace

void Seal(Superblock* superblock) {
  superblock->checksum = XXH3_64bits(superblock, offsetof(Superblock, checksum));
}

bool IsSealed(const Superblock& superblock) {
  return superblock.magic == kSuperblockMagic &&
         superblock.checksum == XXH3_64bits(&superblock, offsetof(Superblock, checksum));
}

KvLayout LayoutOf(const Superblock& superblock) {
  return {superblock.num_layers, superblock.num_kv_heads, superblock.head_dim,
          superblock.block_size, static_cast<DType>(superblock.dtype)};
}

std::string NameOf(const Superblock& superblock) {
  const char* name = superblock.model_name.data();
  return std::string(name, strnlen(name, superblock.model_name.size()));
}

StoreCounters CountersOf(const Superblock& superblock) {
  return {superblock.turns, superblock.tokens_requested, superblock.tokens_from[0],
          superblock.tokens_from[1], superblock.tokens_from[2]};
}

uint64_t SliceSum(const Uuid& uuid, const BlockKey& key, uint32_t layer,
                  std::span<const std::byte> slice) {
  struct {
    Uuid uuid;
    std::array<uint8_t, 32> key;
    uint32_t layer;
  } place = {uuid, key.bytes, layer};
  static_assert(sizeof(place) == 52);
  const uint64_t seed = XXH3_64bits(&place, sizeof(place));
  return XXH3_64bits_withSeed(slice.data(), slice.size(), seed);
}

void SealBlock(const Uuid& uuid, const KvLayout& layout, const BlockHeader& header,
               std::byte* host_slot) {
  BlockPage page;
  page.num_layers = layout.num_layers;
  page.key = header.key.bytes;
  page.parent = header.parent.bytes;
  page.num_tokens = header.num_tokens;
  page.depth = header.depth;
  page.generation = header.generation;
  for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
    page.sums[layer] =
        SliceSum(uuid, header.key, layer,
                 {host_slot + layout.host_slice_offset(layer), layout.slice_bytes()});
  }
  page.checksum = PageSum(page, uuid);
  std::memcpy(host_slot, &page, sizeof(page));
}

Status CheckBlockPage(const Uuid& uuid, const KvLayout& layout, const BlockPage& page) {
  const char* reason = nullptr;
  if (page.magic != kBlockMagic) {
    reason = "there is no block header";
  } else if (page.checksum != PageSum(page, uuid)) {
    reason = "the header's checksum does not match";
  } else if (page.version != kSsdVersion) {
    reason = "the header has another version";
  } else if (page.num_layers != layout.num_layers || page.num_tokens < 1 ||
             page.num_tokens > layout.block_size) {
    reason = "the header's sizes are out of range";
  }
  return reason == nullptr ? Status() : Status(Code::kCorrupt, reason);
}

BlockHeader HeaderOf(const BlockPage& page) {
  return {{page.key}, {page.parent}, page.num_tokens, page.depth, page.generation};
}

}  // namespace cachedattn
