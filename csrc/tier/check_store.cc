#include "csrc/tier/check_store.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <unordered_map>

#include "csrc/io/direct_file.h"
#include "csrc/tier/aligned_bytes.h"
#include "csrc/tier/block_cipher.h"
#include "csrc/tier/ssd_file.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {
namespace {

constexpr uint64_t kBufferBytes = 64 << 20;
constexpr int64_t kPollUs = 100'000;  // a progress callback sees Ctrl-C so often

bool IsZero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
}

std::string Short(const BlockKey& key) { return key.Hex().substr(0, 16); }

// "2", "2 and 5", "2, 5 and 7".
std::string ListText(const std::vector<uint32_t>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (i > 0) text += i + 1 == numbers.size() ? " and " : ", ";
    text += std::to_string(numbers[i]);
  }
  return text;
}

class Checker {
 public:
  Checker(const CheckOptions& options, SsdFile* file, std::unique_ptr<BlockCipher> cipher)
      : options_(options),
        file_(*file),
        cipher_(std::move(cipher)),
        superblock_(file->superblock()),
        layout_(LayoutOf(superblock_)),
        expected_(file->num_slots()) {}

  CheckReport Run();

 private:
  // What the index says of a slot. Not known: the header page has the last word.
  struct Expected {
    bool known = false;
    std::optional<BlockHeader> block;
  };

  void CheckSuperblocks();
  void CheckSize();
  void ReadIndex();
  void ReadSlots(const std::vector<SlotId>& slots, bool whole);
  void CheckSlot(SlotId slot, std::byte* bytes, bool whole);
  void Unreadable(SlotId slot, int32_t result, bool whole);
  std::string CompareWithIndex(const BlockHeader& found, const BlockHeader& expected) const;
  std::string CheckPayload(std::byte* host_slot) const;
  bool IsSealed(const BlockPage& page, uint32_t layer, std::byte* host_slot) const;
  void CheckTwice();
  void Report(SlotId slot, std::optional<BlockKey> key, std::string what) {
    report_.damage.push_back({slot, key, std::move(what)});
  }
  bool ReadPage(uint64_t offset, std::byte* page);
  bool Ends(uint64_t offset) const { return offset > file_.file().size(); }

  const CheckOptions& options_;
  SsdFile& file_;
  const std::unique_ptr<BlockCipher> cipher_;  // nullptr: not encrypted
  const Superblock& superblock_;
  const KvLayout layout_;
  std::vector<Expected> expected_;
  std::vector<ScannedBlock> sound_;  // whose header page is as it should be
  CheckReport report_;
};

CheckReport Checker::Run() {
  CheckSuperblocks();
  // With one copy alone nobody knows whether the other one was newer, and not clean.
  if (superblock_.clean != 0 && report_.damage.empty()) ReadIndex();
  CheckSize();

  std::vector<SlotId> used;
  for (SlotId slot = 0; slot < expected_.size(); ++slot) {
    if (!expected_[slot].known || expected_[slot].block) used.push_back(slot);
  }
  ReadSlots(used, /*whole=*/false);
  std::ranges::sort(sound_, {}, &ScannedBlock::slot);
  CheckTwice();
  if (options_.deep) {
    used.clear();
    for (const ScannedBlock& block : sound_) {
      if (cipher_ != nullptr && !options_.keys->Has(block.header.tenant)) {
        ++report_.num_erased;
      } else {
        used.push_back(block.slot);
      }
    }
    ReadSlots(used, /*whole=*/true);
  }
  // kNoSlot is the largest number; what is no slot comes first all the same.
  std::ranges::stable_sort(report_.damage, {}, [](const Damage& damage) {
    return damage.slot == kNoSlot ? 0 : uint64_t{damage.slot} + 1;
  });
  return std::move(report_);
}

bool Checker::ReadPage(uint64_t offset, std::byte* page) {
  file_.engine().Submit({IoOp::kRead, offset, page, kPage, 0});
  IoCompletion done;
  while (file_.engine().Poll(std::span(&done, 1), kPollUs) == 0) {
    if (options_.progress) options_.progress(0, expected_.size());
  }
  return done.result == static_cast<int32_t>(kPage);
}

void Checker::CheckSuperblocks() {
  for (uint64_t i = 0; i < 2; ++i) {
    const std::string name = "superblock copy " + std::to_string(i) + ": ";
    const auto& copy = *reinterpret_cast<const Superblock*>(file_.pages());
    if (!ReadPage(i * kPage, file_.pages())) {
      Report(kNoSlot, {}, name + "it cannot be read");
    } else if (!cachedattn::IsSealed(copy)) {
      Report(kNoSlot, {}, name + "its checksum does not match");
    } else if (copy.uuid != superblock_.uuid) {
      Report(kNoSlot, {}, name + "it is of another store");
    }
  }
}

void Checker::CheckSize() {
  const uint64_t wanted = SsdFileBytes(layout_, superblock_.num_slots);
  if (Ends(wanted)) {
    std::string what = "the file was cut: " + std::to_string(file_.file().size()) + " of " +
                       std::to_string(wanted) + " bytes are left";
    if (expected_.size() < superblock_.num_slots) {
      what += ", the slots from " + std::to_string(expected_.size()) + " on are gone";
    }
    Report(kNoSlot, {}, std::move(what));
  }
}

void Checker::ReadIndex() {
  report_.indexed = true;
  const auto& page = *reinterpret_cast<const IndexPage*>(file_.pages());
  for (uint64_t i = 0; i < NumIndexPages(expected_.size()); ++i) {
    const uint64_t first = i * kEntriesPerPage;
    const uint64_t last = std::min<uint64_t>(first + kEntriesPerPage, expected_.size());
    const uint64_t offset = IndexOffset(layout_, superblock_.num_slots) + i * kPage;
    const bool read = ReadPage(offset, file_.pages());
    if (!read || !cachedattn::IsSealed(superblock_.uuid, superblock_.generation, i, page)) {
      Report(kNoSlot, {},
             "index page " + std::to_string(i) + " (slots " + std::to_string(first) + " to " +
                 std::to_string(last - 1) +
                 "): " + (read ? "its checksum does not match" : "it cannot be read"));
      continue;
    }
    for (uint64_t slot = first; slot < last; ++slot) {
      const IndexEntry& entry = page.entries[slot - first];
      expected_[slot].known = true;
      if (entry.num_tokens != 0) expected_[slot].block = HeaderOf(entry);
    }
  }
}

// As many slots at a time as the engine takes and the buffer holds.
void Checker::ReadSlots(const std::vector<SlotId>& slots, bool whole) {
  const auto bytes = static_cast<uint32_t>(whole ? layout_.host_slot_bytes() : kPage);
  IoEngine& engine = file_.engine();
  const auto depth = static_cast<uint32_t>(std::min<uint64_t>(
      {engine.depth(), std::max<uint64_t>(kBufferBytes / bytes, 2), slots.size()}));
  if (depth == 0) return;
  const AlignedBytes buffer = AllocatePages(uint64_t{depth} * bytes);
  std::vector<size_t> number_of(depth);
  size_t next = 0, done = 0;
  const auto start = [&](uint32_t place) {
    number_of[place] = next;
    const uint64_t offset = kFirstSlot + slots[next++] * layout_.host_slot_bytes();
    engine.Submit({IoOp::kRead, offset, buffer.get() + uint64_t{place} * bytes, bytes, place});
  };
  // A callback that throws must not free what the disk still writes to.
  struct Drained {
    IoEngine& engine;
    ~Drained() {
      std::array<IoCompletion, 64> rest;
      while (engine.in_flight() > 0) engine.Poll(rest, kPollUs);
    }
  } const drained{engine};
  for (uint32_t place = 0; place < depth; ++place) start(place);
  std::array<IoCompletion, 64> finished;
  while (done < slots.size()) {
    const size_t count = engine.Poll(finished, kPollUs);
    for (size_t i = 0; i < count; ++i) {
      const auto place = static_cast<uint32_t>(finished[i].tag);
      const SlotId slot = slots[number_of[place]];
      if (finished[i].result == static_cast<int64_t>(bytes)) {
        CheckSlot(slot, buffer.get() + uint64_t{place} * bytes, whole);
      } else {
        Unreadable(slot, finished[i].result, whole);
      }
      ++done;
      if (next < slots.size()) start(place);
    }
    if (options_.progress) options_.progress(done, slots.size());
  }
}

void Checker::CheckSlot(SlotId slot, std::byte* bytes, bool whole) {
  const auto& page = *reinterpret_cast<const BlockPage*>(bytes);
  const std::optional<BlockHeader>& expected = expected_[slot].block;
  if (!expected && IsZero(std::span(bytes, kPage))) return;  // no block was ever written there
  report_.num_blocks += !whole;
  std::optional<BlockKey> key;
  if (expected) {
    key = expected->key;
  } else if (page.magic == kBlockMagic) {
    key = BlockKey{page.key};  // perhaps: its sum may not match
  }
  std::string what;
  if (const Status status = CheckBlockPage(superblock_.uuid, layout_, slot, page); !status.ok()) {
    what = IsZero(std::span(bytes, kPage)) ? "its header is zero" : status.message();
  } else if (expected && HeaderOf(page) != *expected) {
    what = CompareWithIndex(HeaderOf(page), *expected);
  } else if (whole) {
    what = CheckPayload(bytes);
  } else {
    sound_.push_back({slot, HeaderOf(page)});
  }
  if (!what.empty()) Report(slot, key, std::move(what));
}

void Checker::Unreadable(SlotId slot, int32_t result, bool whole) {
  const std::optional<BlockHeader>& expected = expected_[slot].block;
  report_.num_blocks += !whole;
  Report(slot, expected ? std::optional(expected->key) : std::nullopt,
         result < 0 ? ErrnoStatus("it cannot be read", -result).message()
                    : "only " + std::to_string(result) + " bytes of it can be read");
}

std::string Checker::CompareWithIndex(const BlockHeader& found, const BlockHeader& expected) const {
  if (found.key != expected.key) return "it holds block " + Short(found.key) + " instead";
  if (found.generation == expected.generation) return "its header is not what the index says";
  return "it holds write number " + std::to_string(found.generation) + " of the block, the index " +
         "knows of number " + std::to_string(expected.generation) +
         (found.generation < expected.generation ? ": an old copy" : "");
}

bool Checker::IsSealed(const BlockPage& page, uint32_t layer, std::byte* host_slot) const {
  if (cipher_ != nullptr) return !cipher_->Decrypt(page, layer, 1, host_slot);
  return cachedattn::IsSealed(superblock_.uuid, layout_, page, layer, host_slot);
}

std::string Checker::CheckPayload(std::byte* host_slot) const {
  const auto& page = *reinterpret_cast<const BlockPage*>(host_slot);
  const uint64_t size = layout_.slice_bytes(), padding = layout_.slice_stride() - size;
  std::vector<uint32_t> damaged, padded;
  for (uint32_t layer = 0; layer < layout_.num_layers; ++layer) {
    const std::byte* slice = host_slot + layout_.host_slice_offset(layer);
    if (!IsSealed(page, layer, host_slot)) damaged.push_back(layer);
    if (!IsZero({slice + size, padding})) padded.push_back(layer);
  }
  if (!damaged.empty()) {
    return "the bytes of layer " + ListText(damaged) + " do not match their checksum";
  }
  if (!padded.empty()) {
    return "the padding after layer " + ListText(padded) + " is not zero (the block is sound)";
  }
  return "";
}

// Two slots that both claim to hold the newest copy of one block. An older one is what eviction
// leaves behind.
void Checker::CheckTwice() {
  std::unordered_map<BlockKey, const ScannedBlock*, DigestHash> first;
  for (const ScannedBlock& block : sound_) {
    const auto [entry, added] = first.try_emplace(block.header.key, &block);
    if (added) continue;
    const bool listed = expected_[block.slot].known && expected_[entry->second->slot].known;
    if (listed || block.header.generation == entry->second->header.generation) {
      Report(block.slot, block.header.key,
             "slot " + std::to_string(entry->second->slot) + " holds the same block");
    }
  }
}

}  // namespace

Result<CheckReport> CheckStore(const CheckOptions& options) {
  auto file = OpenStoreFile(options.directory, /*read_only=*/true);
  if (!file.ok()) return file.status();
  SsdOptions ssd_options;
  ssd_options.directory = options.directory;
  ssd_options.keys = options.keys;
  ssd_options.read_only = !options.deep;  // headers can be read without the key
  SsdFile opened(ssd_options);
  Status status = opened.OpenReadOnly(std::move(file.value()));
  if (status.ok()) status = opened.CheckKey();
  if (!status.ok()) return status;
  ssd_options.layout = LayoutOf(opened.superblock());
  auto cipher = BlockCipher::Open(ssd_options, opened.superblock().uuid, 1);
  if (!cipher.ok()) return cipher.status();
  return Checker(options, &opened, std::move(cipher.value())).Run();
}

}  // namespace cachedattn
