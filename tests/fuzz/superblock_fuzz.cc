// Both copies of the superblock, and what is opened by them: by a store of this model, and by a
// reader that takes the sizes from the file, as `check` does.
#include "tests/fuzz/mini_store.h"

namespace cachedattn {
namespace {

enum Flags : uint8_t {
  kSeal = 1,
  kRaw = 2,
  kReadOnly = 4,
  kClean = 8,
  kAnyModel = 16,
};

void ReadAnyModel(Image* image) {
  SsdOptions options = MiniOptions();
  SsdFile file(options);
  if (!file.OpenReadOnly(std::make_unique<MemoryFile>(image)).ok()) return;
  const Superblock& superblock = file.superblock();
  options.layout = LayoutOf(superblock);
  CA_CHECK(options.layout.Validate().ok());
  CA_CHECK(superblock.dtype <= static_cast<uint32_t>(DType::kFloat16));
  CA_CHECK(file.num_slots() * options.layout.host_slot_bytes() <= image->slots.size());
  CA_CHECK(NameOf(superblock).size() <= superblock.model_name.size());
  (void)CountersOf(superblock);
  options.identity.bytes = superblock.identity;
  options.read_only = true;
  UseStore(image, options);
}

}  // namespace

void FuzzOne(Input input) {
  const auto flags = input.Number<uint8_t>();
  Image image = MiniStore(flags & kClean);
  // The first bytes of the copies, where their fields are, or the pages as they come.
  const uint64_t count = flags & kRaw ? kPage : offsetof(Superblock, rest);
  for (uint64_t copy : {0, 1}) {
    const std::span<const uint8_t> bytes = input.Take(count);
    std::memcpy(image.front.data() + copy * kPage, bytes.data(), bytes.size());
  }
  if (flags & kSeal) SealSuperblocks(&image);
  if (flags & kAnyModel) return ReadAnyModel(&image);
  SsdOptions options = MiniOptions();
  options.read_only = flags & kReadOnly;
  const auto tier = SsdTier::OpenOn(options, std::make_unique<MemoryFile>(&image));
  CA_CHECK(tier.ok() || !tier.status().message().empty());
  CA_CHECK(!tier.ok() || tier.value()->num_slots() <= kMiniSlots);
}

}  // namespace cachedattn
