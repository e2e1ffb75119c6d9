// A whole store: bytes of a good one are overwritten, its sums perhaps made right again, its end
// perhaps cut off.
#include "tests/fuzz/mini_store.h"

namespace cachedattn {
namespace {

enum Flags : uint8_t {
  kClean = 1,  // of a store that was closed well
  kReadOnly = 2,
  kRaw = 4,  // one run of bytes, else short patches
  kSealSuperblocks = 8,
  kSealHeaders = 16,
  kSealIndex = 32,
  kOtherSize = 64,  // the opener wants more or fewer slots
};

// Pages of the front, then pages of the slots and of the index.
std::span<std::byte> From(Image* image, uint32_t place) {
  const uint64_t offset = place % (Image::kFrontBytes + image->slots.size());
  if (offset < Image::kFrontBytes) return std::span(image->front).subspan(offset);
  return std::span(image->slots).subspan(offset - Image::kFrontBytes);
}

void Patch(Image* image, uint32_t place, std::span<const uint8_t> bytes) {
  const std::span<std::byte> room = From(image, place);
  std::memcpy(room.data(), bytes.data(), std::min(room.size(), bytes.size()));
}

}  // namespace

void FuzzOne(Input input) {
  const auto flags = input.Number<uint8_t>();
  const auto cut = input.Number<uint8_t>();
  Image image = MiniStore(flags & kClean);
  if (flags & kRaw) {
    const auto place = input.Number<uint8_t>() * kPage;
    Patch(&image, static_cast<uint32_t>(place), input.Take(SIZE_MAX));
  }
  while (!input.empty()) {
    const uint32_t place = input.Number<uint8_t>() * kPage + input.Number<uint16_t>() % kPage;
    Patch(&image, place, input.Take(input.Number<uint8_t>() % 64));
  }
  if (flags & kSealSuperblocks) SealSuperblocks(&image);
  if (flags & kSealHeaders) SealHeaders(&image);
  if (flags & kSealIndex) SealIndex(&image);
  if (cut > 0) image.Resize(cut % 2 == 1 ? image.size - cut * 512 : cut * 512);
  SsdOptions options = MiniOptions(flags & kOtherSize ? 1 + cut % 8 : kMiniSlots);
  options.read_only = flags & kReadOnly;
  UseStore(&image, options);
}

}  // namespace cachedattn
