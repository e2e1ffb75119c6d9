#include "tests/fuzz/mini_store.h"

#include <array>
#include <cstdlib>

// Freed memory is reused soon, so that the processor's caches hold it.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "quarantine_size_mb=2:thread_local_quarantine_size_kb=256";
}
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
  return "print_stacktrace=1";
}

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(const uint8_t* data,
                                                                             size_t size) {
  cachedattn::FuzzOne({data, size});
  return 0;
}

namespace cachedattn {
namespace {

constexpr Uuid kUuid = {'m', 'i', 'n', 'i'};
constexpr uint32_t kNumBlocks = 3;
constexpr uint32_t kNewBlock = kNumBlocks;  // written to every store that can be opened

BlockHeader HeaderOfBlock(uint32_t number, uint64_t generation) {
  static const std::vector<BlockKey> keys = [] {
    std::vector<BlockKey> made = {RootKey({}, "")};
    for (TokenId token = 0; token <= static_cast<TokenId>(kNewBlock); ++token) {
      made.push_back(ChildKey(made.back(), {}, std::span(&token, 1)));
    }
    return made;
  }();
  return {keys[number + 1], keys[number], {}, number + 1, number, generation};
}

// A buffer of exactly one slot, so that a byte behind it is an error.
AlignedBytes NewHostSlot(const KvLayout& layout) { return AllocatePages(layout.host_slot_bytes()); }

AlignedBytes PayloadOf(uint32_t number) {
  AlignedBytes host = NewHostSlot(MiniLayout());
  for (uint32_t layer = 0; layer < MiniLayout().num_layers; ++layer) {
    std::memset(host.get() + MiniLayout().host_slice_offset(layer),
                static_cast<int>(16 * number + layer + 1), MiniLayout().slice_bytes());
  }
  return host;
}

bool IsPayloadOf(uint32_t number, const std::byte* host) {
  for (uint32_t layer = 0; layer < MiniLayout().num_layers; ++layer) {
    const std::byte* slice = host + MiniLayout().host_slice_offset(layer);
    const auto value = static_cast<std::byte>(16 * number + layer + 1);
    for (uint64_t i = 0; i < MiniLayout().slice_bytes(); ++i) {
      if (slice[i] != value) return false;
    }
  }
  return true;
}

// The end of all that was started: true when every piece of it went well.
bool Finish(SsdTier* tier) {
  std::vector<SsdCompletion> finished;
  for (int polls = 0; tier->in_flight() > 0; ++polls) {
    CA_CHECK(polls < 100);
    tier->Poll(&finished, 0);
  }
  bool ok = true;
  for (const SsdCompletion& completion : finished) {
    const Code code = completion.status.code();
    // kMismatch: the file says that it is encrypted, and is read without the key.
    CA_CHECK(code == Code::kOk || code == Code::kCorrupt || code == Code::kIo ||
             code == Code::kMismatch);
    ok = ok && completion.status.ok();
  }
  return ok;
}

bool WriteBlock(SsdTier* tier, SlotId slot, const BlockHeader& header, uint32_t number) {
  AlignedBytes host = PayloadOf(number);
  tier->StartWrite(slot, header, false, host.get(), 1);
  return Finish(tier);
}

// Reads a block in one piece or in one for each layer, and looks at what comes back.
bool ReadBlock(SsdTier* tier, const KvLayout& layout, const ScannedBlock& block, bool whole) {
  AlignedBytes host = NewHostSlot(layout);
  const uint32_t step = whole ? layout.num_layers : 1;
  bool ok = true;
  for (uint32_t layer = 0; layer < layout.num_layers; layer += step) {
    if (!tier->can_submit()) ok = Finish(tier) && ok;
    tier->StartRead(block.slot, block.header, layer, step, host.get(), layer);
  }
  ok = Finish(tier) && ok;
  if (!ok) return false;
  if (layout != MiniLayout()) return true;
  for (uint32_t number = 0; number <= kNewBlock; ++number) {
    if (block.header.key != HeaderOfBlock(number, 0).key) continue;
    CA_CHECK(IsPayloadOf(number, host.get()));
    return true;
  }
  CA_CHECK(!"a block that nobody wrote was read");
  return false;
}

void ReadListed(SsdTier* tier, const KvLayout& layout, const std::vector<ScannedBlock>& blocks) {
  CA_CHECK(blocks.size() <= tier->num_slots());
  for (const ScannedBlock& block : blocks) {
    CA_CHECK(block.slot < tier->num_slots());
    CA_CHECK(block.header.num_tokens >= 1 && block.header.num_tokens <= layout.block_size);
    const bool whole = ReadBlock(tier, layout, block, true);
    CA_CHECK(ReadBlock(tier, layout, block, false) == whole);
  }
}

Image MakeMiniStore(bool clean) {
  Image image;
  const SsdOptions options = MiniOptions();
  const auto open = [&] {
    auto tier = SsdTier::OpenOn(options, std::make_unique<MemoryFile>(&image));
    CA_CHECK(tier.ok());
    return std::move(tier.value());
  };
  open();
  for (uint64_t copy : {0, 1}) {  // an input must mean the same in every run
    reinterpret_cast<Superblock*>(image.front.data() + copy * kPage)->uuid = kUuid;
  }
  SealSuperblocks(&image);
  std::vector<ScannedBlock> blocks;
  auto tier = open();
  for (SlotId slot = 0; slot < kMiniSlots; ++slot) {
    const uint32_t number = slot % kNumBlocks;
    const ScannedBlock block = {slot, HeaderOfBlock(number, slot + 1)};
    CA_CHECK(WriteBlock(tier.get(), slot, block.header, number));
    blocks.push_back(block);
  }
  CA_CHECK(tier->Sync({}, std::span(blocks).subspan(1)).ok());
  if (!clean) open();
  return image;
}

}  // namespace

SsdOptions MiniOptions(uint32_t num_slots) {
  SsdOptions options;
  options.layout = MiniLayout();
  options.model_name = "mini";
  options.max_bytes = SsdFileBytes(options.layout, num_slots);
  options.io.depth = 4;
  return options;
}

const Image& MiniStore(bool clean) {
  static const Image images[] = {MakeMiniStore(false), MakeMiniStore(true)};
  return images[clean];
}

void UseStore(Image* image, const SsdOptions& options) {
  const auto open = [&] { return SsdTier::OpenOn(options, std::make_unique<MemoryFile>(image)); };
  auto tier = open();
  if (!tier.ok()) return CA_CHECK(!tier.status().message().empty());
  auto blocks = tier.value()->ScanHeaders({});
  CA_CHECK(blocks.ok());
  ReadListed(tier.value().get(), options.layout, blocks.value());
  blocks = tier.value()->Scan({});
  CA_CHECK(blocks.ok());
  ReadListed(tier.value().get(), options.layout, blocks.value());
  if (options.read_only) return;
  // What can be opened can be used.
  const ScannedBlock block = {tier.value()->num_slots() - 1, HeaderOfBlock(kNewBlock, 1000)};
  CA_CHECK(WriteBlock(tier.value().get(), block.slot, block.header, kNewBlock));
  CA_CHECK(ReadBlock(tier.value().get(), options.layout, block, true));
  CA_CHECK(tier.value()->Sync({}, std::span(&block, 1)).ok());
  tier.value().reset();
  tier = open();
  CA_CHECK(tier.ok());
  blocks = tier.value()->Scan({});
  CA_CHECK(blocks.ok());
  ReadListed(tier.value().get(), options.layout, blocks.value());
}

const Superblock& NewerSuperblock(const Image& image) {
  const auto* copies = reinterpret_cast<const Superblock*>(image.front.data());
  return copies[copies[1].generation > copies[0].generation];
}

void SealSuperblocks(Image* image) {
  auto* copies = reinterpret_cast<Superblock*>(image->front.data());
  Seal(&copies[0]);
  Seal(&copies[1]);
}

void SealHeaders(Image* image) {
  const uint64_t slot_bytes = MiniLayout().host_slot_bytes();
  for (uint64_t at = 0; at + kPage <= image->slots.size(); at += slot_bytes) {
    Seal(kUuid, reinterpret_cast<BlockPage*>(image->slots.data() + at));
  }
}

void SealIndex(Image* image) {
  const uint64_t at = IndexOffset(MiniLayout(), kMiniSlots) - kFirstSlot;
  if (at + kPage > image->slots.size()) return;
  Seal(kUuid, NewerSuperblock(*image).generation, 0,
       reinterpret_cast<IndexPage*>(image->slots.data() + at));
}

}  // namespace cachedattn
