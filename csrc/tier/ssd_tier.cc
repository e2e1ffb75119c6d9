#include "csrc/tier/ssd_tier.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>

#include "csrc/tier/ssd_file.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {
namespace {

class SsdTierImpl : public SsdTier {
 public:
  SsdTierImpl(const SsdOptions& options, std::unique_ptr<SsdFile> file,
              std::unique_ptr<IoEngine> engine)
      : layout_(options.layout),
        read_only_(options.read_only),
        file_(std::move(file)),
        engine_(std::move(engine)),
        ops_(engine_->depth()) {
    why_ = engine_->why();
    why_ += file_->direct() ? ", O_DIRECT" : ", page cache (the file system refuses O_DIRECT)";
    for (uint32_t i = 0; i < ops_.size(); ++i) free_ops_.push_back(i);
  }

  uint32_t num_slots() const override { return file_->num_slots(); }
  Result<std::vector<ScannedBlock>> Scan(
      const std::function<void(uint64_t, uint64_t)>& progress) override;
  void StartWrite(SlotId slot, const BlockHeader& header, std::byte* host_slot,
                  uint64_t tag) override;
  void StartRead(SlotId slot, const BlockHeader& header, uint32_t first_layer, uint32_t num_layers,
                 std::byte* host_slot, uint64_t tag) override;
  const std::vector<SlotId>& damaged_slots() const override { return damaged_; }
  bool can_submit() const override { return !free_ops_.empty(); }
  uint32_t in_flight() const override {
    return static_cast<uint32_t>(ops_.size() - free_ops_.size());
  }
  void Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) override;
  Status Sync(const StoreCounters& counters) override;

  StoreCounters counters() const override;
  uint64_t bytes_read() const override { return bytes_read_; }
  uint64_t bytes_written() const override { return bytes_written_; }
  uint64_t checksum_failures() const override { return checksum_failures_; }
  const char* io_name() const override { return engine_->name(); }
  const std::string& io_why() const override { return why_; }

 private:
  // A read piece or a write. A piece without the header page is `waiting` from its completion
  // until the header page of its block is there to verify it.
  struct Op {
    enum State : uint8_t { kFree, kInFlight, kWaiting } state = kFree;
    IoOp kind = IoOp::kRead;
    bool retried = false;
    SlotId slot = kNoSlot;
    BlockHeader header;
    uint32_t first_layer = 0, num_layers = 0;
    std::byte* host_slot = nullptr;
    uint64_t tag = 0;

    bool has_header() const { return kind == IoOp::kRead && first_layer == 0; }
  };

  const Uuid& uuid() const { return file_->superblock().uuid; }
  uint64_t SlotOffset(SlotId slot) const { return kFirstSlot + slot * layout_.host_slot_bytes(); }
  IoRequest RequestOf(uint32_t index) const;
  void Start(const Op& op);
  void Submit(uint32_t index);
  void OnCompletion(uint32_t index, int32_t result, std::vector<SsdCompletion>* out);
  void VerifyRead(uint32_t index, std::vector<SsdCompletion>* out);
  Status CheckHeader(const Op& op) const;
  Status CheckPiece(const Op& op) const;
  bool HeaderInFlight(const std::byte* host_slot) const;
  void Finish(uint32_t index, Status status, std::vector<SsdCompletion>* out);
  std::string Where(const Op& op) const;

  const KvLayout layout_;
  const bool read_only_;
  std::unique_ptr<SsdFile> file_;
  std::unique_ptr<IoEngine> engine_;  // gone before the file it works on
  std::string why_;
  std::vector<Op> ops_;
  std::vector<uint32_t> free_ops_;
  std::vector<SlotId> damaged_;
  uint64_t bytes_read_ = 0, bytes_written_ = 0, checksum_failures_ = 0;
};

IoRequest SsdTierImpl::RequestOf(uint32_t index) const {
  const Op& op = ops_[index];
  uint64_t begin = layout_.host_slice_offset(op.first_layer);
  uint64_t size = op.num_layers * layout_.slice_stride();
  if (op.first_layer == 0) {  // the header page lies in front of the first layer
    begin = 0;
    size += KvLayout::kHeaderBytes;
  }
  return {op.kind, SlotOffset(op.slot) + begin, op.host_slot + begin, static_cast<uint32_t>(size),
          index};
}

void SsdTierImpl::Submit(uint32_t index) {
  ops_[index].state = Op::kInFlight;
  engine_->Submit(RequestOf(index));
}

void SsdTierImpl::Start(const Op& op) {
  CA_CHECK(!free_ops_.empty());
  CA_CHECK(op.slot < num_slots());
  CA_CHECK(reinterpret_cast<uintptr_t>(op.host_slot) % kPage == 0);
  const uint32_t index = free_ops_.back();
  free_ops_.pop_back();
  ops_[index] = op;
  Submit(index);
}

void SsdTierImpl::StartWrite(SlotId slot, const BlockHeader& header, std::byte* host_slot,
                             uint64_t tag) {
  CA_CHECK(!read_only_);
  CA_CHECK(header.num_tokens >= 1 && header.num_tokens <= layout_.block_size);
  SealBlock(uuid(), layout_, header, host_slot);
  Start({Op::kInFlight, IoOp::kWrite, false, slot, header, 0, layout_.num_layers, host_slot, tag});
}

void SsdTierImpl::StartRead(SlotId slot, const BlockHeader& header, uint32_t first_layer,
                            uint32_t num_layers, std::byte* host_slot, uint64_t tag) {
  CA_CHECK(num_layers >= 1 && first_layer < layout_.num_layers);
  CA_CHECK(num_layers <= layout_.num_layers - first_layer);
  Start({Op::kInFlight, IoOp::kRead, false, slot, header, first_layer, num_layers, host_slot, tag});
}

void SsdTierImpl::Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) {
  std::array<IoCompletion, 64> finished;
  size_t count = engine_->Poll(finished, timeout_us);
  while (count > 0) {
    for (size_t i = 0; i < count; ++i) {
      OnCompletion(static_cast<uint32_t>(finished[i].tag), finished[i].result, out);
    }
    // A full array: more may be finished.
    count = count == finished.size() ? engine_->Poll(finished, 0) : 0;
  }
}

void SsdTierImpl::OnCompletion(uint32_t index, int32_t result, std::vector<SsdCompletion>* out) {
  Op& op = ops_[index];
  CA_CHECK(op.state == Op::kInFlight);
  const uint32_t size = RequestOf(index).size;
  if (result > 0) (op.kind == IoOp::kRead ? bytes_read_ : bytes_written_) += result;
  if (result != static_cast<int64_t>(size)) {
    if (op.kind == IoOp::kRead && !op.retried) {
      op.retried = true;
      Submit(index);
    } else if (result < 0) {
      Finish(index, ErrnoStatus(Where(op), -result), out);
    } else {
      Finish(index,
             Status(Code::kIo, Where(op) + ": moved " + std::to_string(result) + " of " +
                                   std::to_string(size) + " bytes"),
             out);
    }
  } else if (op.kind == IoOp::kWrite) {
    Finish(index, Status(), out);
  } else if (!op.has_header() && HeaderInFlight(op.host_slot)) {
    op.state = Op::kWaiting;
  } else {
    VerifyRead(index, out);
  }
}

void SsdTierImpl::VerifyRead(uint32_t index, std::vector<SsdCompletion>* out) {
  Op& op = ops_[index];
  Status status = CheckHeader(op);
  const bool readable = status.ok() || op.has_header();
  if (status.ok()) status = CheckPiece(op);
  if (!status.ok() && readable) {
    ++checksum_failures_;
    if (!op.retried) {
      op.retried = true;
      Submit(index);
      return;
    }
  }
  Finish(index, std::move(status), out);
}

// The header page in the host slot is whole and is that of the expected block.
Status SsdTierImpl::CheckHeader(const Op& op) const {
  const auto& page = *reinterpret_cast<const BlockPage*>(op.host_slot);
  Status status = CheckBlockPage(uuid(), layout_, page);
  if (!status.ok()) return Status(Code::kCorrupt, Where(op) + ": " + status.message());
  if (HeaderOf(page) == op.header) return Status();
  return Status(Code::kCorrupt, Where(op) + ": the slot holds another block");
}

Status SsdTierImpl::CheckPiece(const Op& op) const {
  const auto& page = *reinterpret_cast<const BlockPage*>(op.host_slot);
  for (uint32_t i = 0; i < op.num_layers; ++i) {
    const uint32_t layer = op.first_layer + i;
    const std::byte* slice = op.host_slot + layout_.host_slice_offset(layer);
    if (SliceSum(uuid(), op.header.key, layer, {slice, layout_.slice_bytes()}) !=
        page.sums[layer]) {
      return Status(Code::kCorrupt, Where(op) + ": the checksum of layer " + std::to_string(layer) +
                                        " does not match");
    }
  }
  return Status();
}

bool SsdTierImpl::HeaderInFlight(const std::byte* host_slot) const {
  return std::any_of(ops_.begin(), ops_.end(), [host_slot](const Op& op) {
    return op.state == Op::kInFlight && op.has_header() && op.host_slot == host_slot;
  });
}

// Ends an operation. The end of the piece with the header releases the pieces that wait for it.
void SsdTierImpl::Finish(uint32_t index, Status status, std::vector<SsdCompletion>* out) {
  const Op op = ops_[index];
  ops_[index].state = Op::kFree;
  free_ops_.push_back(index);
  const bool ok = status.ok();
  out->push_back({op.tag, std::move(status)});
  if (!op.has_header()) return;
  // What is left of a failed header must not vouch for the other layers.
  if (!ok) std::memset(op.host_slot, 0, KvLayout::kHeaderBytes);
  for (uint32_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].state == Op::kWaiting && ops_[i].host_slot == op.host_slot) VerifyRead(i, out);
  }
}

std::string SsdTierImpl::Where(const Op& op) const {
  return std::string(op.kind == IoOp::kRead ? "reading" : "writing") + " slot " +
         std::to_string(op.slot);
}

// A slot that no block was ever written to: the file's space is reserved zeroed.
bool IsZero(const BlockPage& page) {
  const auto bytes = std::as_bytes(std::span(&page, 1));
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

Result<std::vector<ScannedBlock>> SsdTierImpl::Scan(
    const std::function<void(uint64_t, uint64_t)>& progress) {
  CA_CHECK(in_flight() == 0);
  const uint32_t depth = engine_->depth();
  AlignedBytes pages = AllocateAligned(AlignUp(depth * kPage, kHugePage), kHugePage);
  std::unordered_map<BlockKey, ScannedBlock, DigestHash> newest;
  std::vector<SlotId> slot_of(depth);
  damaged_.clear();
  const auto start = [&](uint32_t index, SlotId slot) {
    slot_of[index] = slot;
    engine_->Submit({IoOp::kRead, SlotOffset(slot), pages.get() + index * kPage, kPage, index});
  };
  const auto take = [&](uint32_t index, int32_t result) {
    const auto& page = *reinterpret_cast<const BlockPage*>(pages.get() + index * kPage);
    const bool read = result == static_cast<int32_t>(kPage);
    if (read && IsZero(page)) return;  // never written
    if (!read || !CheckBlockPage(uuid(), layout_, page).ok()) {
      checksum_failures_ += read ? 1 : 0;
      damaged_.push_back(slot_of[index]);
      return;
    }
    const ScannedBlock block{slot_of[index], HeaderOf(page)};
    auto [entry, added] = newest.try_emplace(block.header.key, block);
    if (!added && block.header.generation > entry->second.header.generation) entry->second = block;
  };
  SlotId next = 0;
  for (; next < std::min(depth, num_slots()); ++next) start(next, next);
  std::array<IoCompletion, 64> finished;
  for (uint32_t done = 0; done < num_slots();) {
    const size_t count = engine_->Poll(finished, 100'000);
    for (size_t i = 0; i < count; ++i) {
      const uint32_t index = static_cast<uint32_t>(finished[i].tag);
      take(index, finished[i].result);
      if (next < num_slots()) start(index, next++);
    }
    done += static_cast<uint32_t>(count);
    if (progress && count > 0) progress(done, num_slots());
  }
  std::sort(damaged_.begin(), damaged_.end());
  std::vector<ScannedBlock> blocks;
  blocks.reserve(newest.size());
  for (const auto& [key, block] : newest) blocks.push_back(block);
  std::sort(blocks.begin(), blocks.end(),
            [](const ScannedBlock& a, const ScannedBlock& b) { return a.slot < b.slot; });
  return blocks;
}

Status SsdTierImpl::Sync(const StoreCounters& counters) {
  CA_CHECK(!read_only_ && in_flight() == 0);
  return file_->Sync(counters);
}

StoreCounters SsdTierImpl::counters() const { return CountersOf(file_->superblock()); }

}  // namespace

Result<std::unique_ptr<SsdTier>> SsdTier::Open(const SsdOptions& options) {
  Result<std::unique_ptr<SsdFile>> file = SsdFile::Open(options);
  if (!file.ok()) return file.status();
  Result<std::unique_ptr<IoEngine>> engine = OpenIoEngine(file.value()->fd(), options.io);
  if (!engine.ok()) return engine.status();
  return std::unique_ptr<SsdTier>(
      std::make_unique<SsdTierImpl>(options, std::move(file.value()), std::move(engine.value())));
}

Result<SsdInfo> ReadSsdInfo(const std::string& directory) {
  Result<std::unique_ptr<SsdFile>> file = SsdFile::OpenReadOnly(directory);
  if (!file.ok()) return file.status();
  const Superblock& superblock = file.value()->superblock();
  SsdInfo info;
  info.layout = LayoutOf(superblock);
  info.identity.bytes = superblock.identity;
  info.model_name = NameOf(superblock);
  info.uuid = superblock.uuid;
  info.num_slots = file.value()->num_slots();
  info.clean = superblock.clean != 0;
  info.counters = CountersOf(superblock);
  return info;
}

}  // namespace cachedattn
