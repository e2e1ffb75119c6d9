// A slot's header page and an index page, alone.
#include "tests/fuzz/mini_store.h"

namespace cachedattn {
namespace {

enum Flags : uint8_t { kSeal = 1, kIndex = 2 };

const Uuid kUuid = {1};

template <typename Page>
Page PageFrom(Input* input) {
  Page page;
  const std::span<const uint8_t> bytes = input->Take(sizeof(page));
  std::memcpy(&page, bytes.data(), bytes.size());
  return page;
}

void RunHeader(Input* input, bool seal) {
  const KvLayout layout = MiniLayout();
  const SlotId slot = input->Number<uint8_t>();
  auto page = PageFrom<BlockPage>(input);
  if (seal) Seal(kUuid, &page);
  const Status status = CheckBlockPage(kUuid, layout, slot, page);
  CA_CHECK(status.ok() || !status.message().empty());
  if (!status.ok()) return;
  const BlockHeader header = HeaderOf(page);
  CA_CHECK(header.num_tokens >= 1 && header.num_tokens <= layout.block_size);
  CA_CHECK(HeaderOf(PageOf(layout, slot, header)) == header);
  CA_CHECK(HeaderOf(EntryOf(header)) == header);
}

void RunIndex(Input* input, bool seal) {
  Image image = MiniStore(true);
  const uint64_t at = IndexOffset(MiniLayout(), kMiniSlots) - kFirstSlot;
  const std::span<const uint8_t> bytes = input->Take(kPage);
  std::memcpy(image.slots.data() + at, bytes.data(), bytes.size());
  if (seal) SealIndex(&image);
  const SsdOptions options = MiniOptions();
  SsdFile file(options);
  CA_CHECK(file.OpenReadOnly(std::make_unique<MemoryFile>(&image)).ok());
  CA_CHECK(file.ReadIndex().ok());
  if (!file.index()) return;
  CA_CHECK(file.index()->size() <= kMiniSlots);
  for (const ScannedBlock& block : *file.index()) {
    CA_CHECK(block.slot < kMiniSlots);
    CA_CHECK(block.header.num_tokens >= 1);
    CA_CHECK(block.header.num_tokens <= MiniLayout().block_size);
  }
}

}  // namespace

void FuzzOne(Input input) {
  const auto flags = input.Number<uint8_t>();
  (flags & kIndex ? RunIndex : RunHeader)(&input, flags & kSeal);
}

}  // namespace cachedattn
