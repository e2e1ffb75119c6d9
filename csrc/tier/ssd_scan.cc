#include "csrc/tier/ssd_scan.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>

namespace cachedattn {
namespace {

// A slot that no block was ever written to: what a file grows by reads as zeros.
bool IsZero(const BlockPage& page) {
  const auto bytes = std::as_bytes(std::span(&page, 1));
  return bytes[0] == std::byte{0} && std::memcmp(&bytes[0], &bytes[1], bytes.size() - 1) == 0;
}

std::string Describe(SlotId slot, const BlockPage& page, const std::string& reason) {
  std::string text = "slot " + std::to_string(slot);
  if (page.magic == kBlockMagic) text += ", block " + Digest{page.key}.Hex().substr(0, 16);
  return text + ": " + reason;
}

class HeaderScan {
 public:
  HeaderScan(SsdFile* file, const SsdOptions& options, std::vector<SlotDamage>* damaged)
      : file_(*file), engine_(file->engine()), options_(options), damaged_(damaged) {}

  Result<std::vector<ScannedBlock>> Run(const ScanProgress& progress) {
    const uint32_t num_slots = file_.num_slots();
    const auto depth =
        static_cast<uint32_t>(std::min<uint64_t>({engine_.depth(), file_.num_pages(), num_slots}));
    slot_of_.resize(depth);
    SlotId next = 0;
    for (; next < depth; ++next) Start(next, next);
    std::array<IoCompletion, 64> finished;
    int64_t deadline_ns = Deadline();
    for (uint32_t done = 0; done < num_slots;) {
      const size_t count = engine_.Poll(finished, options_.io_deadline_us);
      if (count == 0 && options_.clock->NowNs() >= deadline_ns) {
        file_.SetHung();
        return Status(Code::kIo,
                      "cannot read " + file_.file().path() + ": the disk does not answer");
      }
      if (count > 0) deadline_ns = Deadline();
      for (size_t i = 0; i < count; ++i) {
        const auto index = static_cast<uint32_t>(finished[i].tag);
        Take(index, finished[i].result);
        if (next < num_slots) Start(index, next++);
      }
      done += static_cast<uint32_t>(count);
      if (progress && count > 0) progress(done, num_slots);
    }
    return std::move(blocks_);
  }

 private:
  int64_t Deadline() const { return options_.clock->NowNs() + options_.io_deadline_us * 1000; }
  std::byte* PageAt(uint32_t index) { return file_.pages() + index * kPage; }

  void Start(uint32_t index, SlotId slot) {
    slot_of_[index] = slot;
    const uint64_t offset = kFirstSlot + slot * options_.layout.host_slot_bytes();
    engine_.Submit({IoOp::kRead, offset, PageAt(index), kPage, index});
  }

  void Take(uint32_t index, int32_t result) {
    const SlotId slot = slot_of_[index];
    if (result != static_cast<int32_t>(kPage)) {
      damaged_->push_back({slot, Describe(slot, {}, "its header cannot be read"), true});
      return;
    }
    const auto& page = *reinterpret_cast<const BlockPage*>(PageAt(index));
    if (IsZero(page)) return;
    const Status status = CheckBlockPage(file_.superblock().uuid, options_.layout, slot, page);
    if (status.ok()) {
      blocks_.push_back({slot, HeaderOf(page)});
    } else {
      damaged_->push_back({slot, Describe(slot, page, status.message()), false});
    }
  }

  SsdFile& file_;
  IoEngine& engine_;
  const SsdOptions& options_;
  std::vector<SlotDamage>* const damaged_;
  std::vector<SlotId> slot_of_;  // by page
  std::vector<ScannedBlock> blocks_;
};

}  // namespace

std::vector<ScannedBlock> NewestOfEachKey(const std::vector<ScannedBlock>& blocks) {
  std::unordered_map<BlockKey, const ScannedBlock*, DigestHash> newest;
  newest.reserve(blocks.size());
  for (const ScannedBlock& block : blocks) {
    const auto [entry, added] = newest.try_emplace(block.header.key, &block);
    if (!added && block.header.generation > entry->second->header.generation) {
      entry->second = &block;
    }
  }
  std::vector<ScannedBlock> kept;
  kept.reserve(newest.size());
  for (const auto& [key, block] : newest) kept.push_back(*block);
  std::ranges::sort(kept, {}, &ScannedBlock::slot);
  return kept;
}

Result<std::vector<ScannedBlock>> ReadHeaders(SsdFile* file, const SsdOptions& options,
                                              const ScanProgress& progress,
                                              std::vector<SlotDamage>* damaged) {
  auto blocks = HeaderScan(file, options, damaged).Run(progress);
  if (!blocks.ok()) return blocks.status();
  std::ranges::sort(*damaged, {}, &SlotDamage::slot);
  return NewestOfEachKey(blocks.value());
}

}  // namespace cachedattn
