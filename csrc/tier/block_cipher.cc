#include "csrc/tier/block_cipher.h"

#include <cstring>

namespace cachedattn {
namespace {

// What a tag vouches for beside the bytes of its slice.
struct SliceAad {
  Uuid uuid;
  std::array<uint8_t, 32> key, parent;
  TenantId tenant;
  uint64_t generation;
  uint32_t num_tokens, depth, layer, zero = 0;
};
static_assert(sizeof(SliceAad) == 120);

std::span<const uint8_t> AsBytes(const SliceAad& aad) {
  return {reinterpret_cast<const uint8_t*>(&aad), sizeof(aad)};
}

SliceAad AadOf(const Uuid& uuid, const BlockPage& page) {
  return {.uuid = uuid,
          .key = page.key,
          .parent = page.parent,
          .tenant = page.tenant,
          .generation = page.generation,
          .num_tokens = page.num_tokens,
          .depth = page.depth,
          .layer = 0};
}

// The key is of one write of one block, so the layer is nonce enough.
Nonce NonceOf(uint32_t layer) {
  Nonce nonce{};
  std::memcpy(nonce.data(), &layer, sizeof(layer));
  return nonce;
}

}  // namespace

Result<std::unique_ptr<BlockCipher>> BlockCipher::Open(const SsdOptions& options, const Uuid& uuid,
                                                       uint32_t max_writes) {
  if (options.keys == nullptr) return std::unique_ptr<BlockCipher>();
  const KvLayout& layout = options.layout;
  Status status = options.keys->Bind(options.directory, uuid, options.io_deadline_us);
  if (!status.ok()) return status;
  auto staging = MemoryTier::Open(Tier::kDram, max_writes * layout.host_slot_bytes(), layout);
  if (!staging.ok()) return staging.status();
  return std::unique_ptr<BlockCipher>(
      new BlockCipher(options.keys, uuid, layout, std::move(staging.value()), max_writes));
}

BlockCipher::BlockCipher(std::shared_ptr<KeyRing> keys, const Uuid& uuid, const KvLayout& layout,
                         std::unique_ptr<MemoryTier> staging, uint32_t max_writes)
    : keys_(std::move(keys)),
      uuid_(uuid),
      layout_(layout),
      staging_(std::move(staging)),
      staged_(max_writes) {}

std::byte* BlockCipher::Begin(uint32_t write, SlotId slot, const BlockHeader& header, bool sealed,
                              const std::byte* host_slot) {
  CA_CHECK(!staged_[write]);
  staged_[write] = staging_->slots().Take();
  std::byte* staged = staging_->slot(staged_[write].id());
  const auto& plain = *reinterpret_cast<const BlockPage*>(host_slot);
  BlockPage page = PageOf(layout_, slot, header);
  FillRandom(page.salt);
  const auto cipher = keys_->CipherOf(header.tenant, page.salt);
  CA_CHECK(cipher != nullptr);
  SliceAad aad = AadOf(uuid_, page);
  for (aad.layer = 0; aad.layer < layout_.num_layers; ++aad.layer) {
    // The padding of the slices was zero when the memory was new, and nothing writes there.
    const uint64_t offset = layout_.host_slice_offset(aad.layer);
    page.seals[aad.layer] =
        cipher->Seal(NonceOf(aad.layer), AsBytes(aad), {host_slot + offset, layout_.slice_bytes()},
                     staged + offset);
    if (sealed &&
        SealOfSlice(uuid_, layout_, header.key, aad.layer, host_slot) != plain.seals[aad.layer]) {
      page.seals[aad.layer] = {};
    }
  }
  Seal(uuid_, &page);
  std::memcpy(staged, &page, sizeof(page));
  return staged;
}

std::optional<uint32_t> BlockCipher::Decrypt(const BlockPage& page, uint32_t first_layer,
                                             uint32_t num_layers, std::byte* host_slot) const {
  const auto cipher = keys_->CipherOf(page.tenant, page.salt);
  SliceAad aad = AadOf(uuid_, page);
  for (aad.layer = first_layer; aad.layer < first_layer + num_layers; ++aad.layer) {
    std::byte* slice = host_slot + layout_.host_slice_offset(aad.layer);
    if (cipher == nullptr ||  // the tenant was erased
        !cipher->Open(NonceOf(aad.layer), AsBytes(aad), page.seals[aad.layer],
                      {slice, layout_.slice_bytes()}, slice)) {
      std::memset(slice, 0, layout_.slice_bytes());
      return aad.layer;
    }
  }
  return std::nullopt;
}

}  // namespace cachedattn
