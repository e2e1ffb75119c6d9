#include "csrc/tier/ssd_tier.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "csrc/base/rate_meter.h"
#include "csrc/io/direct_file.h"
#include "csrc/io/io_queue.h"
#include "csrc/tier/block_cipher.h"
#include "csrc/tier/ssd_file.h"
#include "csrc/tier/ssd_op.h"
#include "csrc/tier/ssd_scan.h"

namespace cachedattn {
namespace {

constexpr uint8_t kMaxTries = 16;  // of an operation that EAGAIN or EINTR sends back

// So many operations at a time: while the engine has its fill, as many wait behind it.
uint32_t NumOps(const IoEngine& engine) { return 2 * engine.depth(); }

class SsdTierImpl : public SsdTier {
 public:
  SsdTierImpl(const SsdOptions& options, std::unique_ptr<SsdFile> file,
              std::unique_ptr<BlockCipher> cipher)
      : options_(options),
        layout_(options_.layout),
        deadline_us_(options.io_deadline_us),
        clock_(*options.clock),
        cipher_(std::move(cipher)),
        file_(std::move(file)),
        engine_(file_->engine()),
        queue_(&engine_),
        ops_(NumOps(engine_)) {
    why_ = engine_.why();
    why_ +=
        file_->file().direct() ? ", O_DIRECT" : ", page cache (the file system refuses O_DIRECT)";
    for (uint32_t i = 0; i < ops_.size(); ++i) free_ops_.push_back(i);
  }

  uint32_t num_slots() const override { return file_->num_slots(); }
  const Uuid& uuid() const override { return file_->superblock().uuid; }
  Result<std::vector<ScannedBlock>> Scan(const ScanProgress& progress) override;
  Result<std::vector<ScannedBlock>> ScanHeaders(const ScanProgress& progress) override;
  const std::vector<ScannedBlock>* index() const override {
    return file_->index() ? &*file_->index() : nullptr;
  }
  const std::vector<SlotDamage>& damaged() const override { return damaged_; }
  bool Seal(const BlockKey& key, std::byte* host_slot) override {
    if (cipher_ == nullptr) SealSlices(uuid(), layout_, key, host_slot);
    return cipher_ == nullptr;
  }
  void StartWrite(SlotId slot, const BlockHeader& header, bool sealed, std::byte* host_slot,
                  uint64_t tag) override;
  void StartRead(SlotId slot, const BlockHeader& header, uint32_t first_layer, uint32_t num_layers,
                 std::byte* host_slot, uint64_t tag) override;
  void StartProbe(uint64_t tag) override;
  bool can_submit() const override { return !free_ops_.empty(); }
  uint32_t in_flight() const override {
    return ended_ ? engine_.in_flight() : static_cast<uint32_t>(ops_.size() - free_ops_.size());
  }
  uint32_t num_late() const override { return num_late_; }
  void Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) override;
  Status Sync(const StoreCounters& counters, std::span<const ScannedBlock> blocks) override {
    CA_CHECK(!options_.read_only && in_flight() == 0);
    ended_ = true;
    return file_->Sync(counters, blocks);
  }

  KeyRing* keys() const override { return options_.keys.get(); }
  StoreCounters counters() const override { return CountersOf(file_->superblock()); }
  uint64_t bytes_read() const override { return bytes_read_; }
  double read_rate() const override { return read_rate_.rate(clock_.NowNs()); }
  uint64_t bytes_written() const override { return bytes_written_; }
  uint64_t checksum_failures() const override { return checksum_failures_; }
  const char* io_name() const override { return engine_.name(); }
  const std::string& io_why() const override { return why_; }

 private:
  using Op = SsdOp;

  IoRequest RequestOf(uint32_t index) const { return ops_[index].Request(layout_, index); }
  void Start(const Op& op);
  void Submit(uint32_t index);
  void HandOver();
  void TakeBack(std::span<const IoCompletion> finished, int64_t asked_ns);
  void OnCompletion(uint32_t index, int32_t result, std::vector<SsdCompletion>* out);
  void OnProbe(uint32_t index, std::vector<SsdCompletion>* out);
  void OnDeadline(int64_t now_ns, std::vector<SsdCompletion>* out);
  bool Again(Op* op, int32_t result) const;
  void VerifyRead(uint32_t index, std::vector<SsdCompletion>* out);
  Status CheckHeader(const Op& op) const;
  Status CheckPiece(const Op& op) const;
  bool HeaderInFlight(const std::byte* host_slot) const;
  void Finish(uint32_t index, Status status, std::vector<SsdCompletion>* out);

  const SsdOptions options_;
  const KvLayout& layout_;
  const int64_t deadline_us_;
  const Clock& clock_;
  AlignedBytes probe_pages_;             // what is written, then what is read back
  std::unique_ptr<BlockCipher> cipher_;  // nullptr: not encrypted, or read without the key
  std::unique_ptr<SsdFile> file_;        // its engine is gone before the pages above
  IoEngine& engine_;
  IoQueue queue_;
  std::string why_;
  std::vector<Op> ops_;
  std::vector<uint32_t> free_ops_;
  int64_t next_deadline_ns_ = INT64_MAX;  // not after the first one of ops_
  RateMeter read_rate_;
  uint32_t num_reading_ = 0;  // reads that the engine has
  uint32_t num_late_ = 0;
  bool ended_ = false;  // by Sync: what is in flight is what it gave up waiting for
  std::vector<SlotDamage> damaged_;
  uint64_t bytes_read_ = 0, bytes_written_ = 0, checksum_failures_ = 0;
};

void SsdTierImpl::Submit(uint32_t index) {
  ops_[index].state = Op::kQueued;
  queue_.Push(RequestOf(index));
}

void SsdTierImpl::HandOver() {
  const std::span<const IoRequest> requests = queue_.Submit();
  if (requests.empty()) return;
  const int64_t now_ns = clock_.NowNs();
  const int64_t deadline_ns = now_ns + deadline_us_ * 1000;
  next_deadline_ns_ = std::min(next_deadline_ns_, deadline_ns);
  for (const IoRequest& request : requests) {
    if (request.op == IoOp::kRead && num_reading_++ == 0) read_rate_.Begin(now_ns);
    ops_[request.tag].state = Op::kInFlight;
    ops_[request.tag].deadline_ns = deadline_ns;
  }
}

// What the engine, asked at `asked_ns`, has finished.
void SsdTierImpl::TakeBack(std::span<const IoCompletion> finished, int64_t asked_ns) {
  uint64_t read = 0;
  for (const IoCompletion& done : finished) {
    const Op& op = ops_[done.tag];
    if (!op.late) queue_.Release(RequestOf(static_cast<uint32_t>(done.tag)).size);
    if (op.kind != IoOp::kRead) continue;
    --num_reading_;
    read += std::max(done.result, 0);
  }
  read_rate_.Look(asked_ns, clock_.NowNs(), read, num_reading_ == 0);
}

void SsdTierImpl::Start(const Op& op) {
  CA_CHECK(!free_ops_.empty() && reinterpret_cast<uintptr_t>(op.host_slot) % kPage == 0);
  const uint32_t index = free_ops_.back();
  free_ops_.pop_back();
  ops_[index] = op;
  ops_[index].deadline_ns = clock_.NowNs() + deadline_us_ * 1000;
  next_deadline_ns_ = std::min(next_deadline_ns_, ops_[index].deadline_ns);
  Submit(index);
  HandOver();
}

void SsdTierImpl::StartWrite(SlotId slot, const BlockHeader& header, bool sealed,
                             std::byte* host_slot, uint64_t tag) {
  CA_CHECK(!options_.read_only && slot < num_slots());
  CA_CHECK(header.num_tokens >= 1 && header.num_tokens <= layout_.block_size);
  if (!sealed) (void)Seal(header.key, host_slot);
  if (!cipher_) SealHeader(uuid(), layout_, slot, header, host_slot);
  if (cipher_) host_slot = cipher_->Begin(free_ops_.back(), slot, header, sealed, host_slot);
  Start({.kind = IoOp::kWrite,
         .slot = slot,
         .header = header,
         .num_layers = layout_.num_layers,
         .host_slot = host_slot,
         .tag = tag});
}

void SsdTierImpl::StartRead(SlotId slot, const BlockHeader& header, uint32_t first_layer,
                            uint32_t num_layers, std::byte* host_slot, uint64_t tag) {
  CA_CHECK(slot < num_slots() && num_layers >= 1 && first_layer < layout_.num_layers);
  CA_CHECK(num_layers <= layout_.num_layers - first_layer);
  Start({.kind = IoOp::kRead,
         .slot = slot,
         .header = header,
         .first_layer = first_layer,
         .num_layers = num_layers,
         .host_slot = host_slot,
         .tag = tag});
}

void SsdTierImpl::StartProbe(uint64_t tag) {
  CA_CHECK(!options_.read_only);
  if (probe_pages_ == nullptr) probe_pages_ = AllocatePages(2 * kPage);
  const int64_t now_ns = clock_.NowNs();  // a page that was never written
  for (uint64_t i = 0; i < kPage; i += sizeof(now_ns)) {
    std::memcpy(probe_pages_.get() + i, &now_ns, sizeof(now_ns));
  }
  Start({.kind = IoOp::kWrite, .probe = true, .host_slot = probe_pages_.get(), .tag = tag});
}

void SsdTierImpl::Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) {
  if (in_flight() == 0) return;
  const int64_t now_ns = clock_.NowNs();
  if (next_deadline_ns_ != INT64_MAX) {
    timeout_us = std::clamp<int64_t>((next_deadline_ns_ - now_ns + 999) / 1000, 0, timeout_us);
  }
  std::array<IoCompletion, 64> finished;
  size_t count = engine_.Poll(finished, timeout_us);
  if (count == 0 && num_reading_ > 0) TakeBack({}, now_ns);
  while (count > 0 && !ended_) {
    TakeBack(std::span(finished).first(count), now_ns);
    HandOver();
    for (size_t i = 0; i < count; ++i) {
      OnCompletion(static_cast<uint32_t>(finished[i].tag), finished[i].result, out);
    }
    // A full array: more may be finished.
    count = count == finished.size() ? engine_.Poll(finished, 0) : 0;
  }
  HandOver();
  const int64_t after_ns = timeout_us > 0 ? clock_.NowNs() : now_ns;
  if (after_ns >= next_deadline_ns_) OnDeadline(after_ns, out);
}

void SsdTierImpl::OnDeadline(int64_t now_ns, std::vector<SsdCompletion>* out) {
  next_deadline_ns_ = INT64_MAX;
  // What is queued fails only behind a disk that hangs, not when it was the caller who was away.
  const bool hangs = std::any_of(ops_.begin(), ops_.end(), [now_ns](const Op& op) {
    return op.state == Op::kInFlight && now_ns >= op.deadline_ns;
  });
  for (uint32_t i = 0; i < ops_.size(); ++i) {
    Op& op = ops_[i];
    if (op.state == Op::kFree || op.late) continue;
    if (now_ns < op.deadline_ns) {
      next_deadline_ns_ = std::min(next_deadline_ns_, op.deadline_ns);
      continue;
    }
    if (op.state == Op::kQueued && !hangs) continue;
    Status status(Code::kIo, op.Where() + ": the disk did not answer within " +
                                 std::to_string(deadline_us_ / 1000) + " ms");
    if (op.state == Op::kWaiting || queue_.Drop(i)) {  // its bytes are here, or it never went
      Finish(i, std::move(status), out);
      continue;
    }
    op.late = true;
    queue_.Release(RequestOf(i).size);
    ++num_late_;
    out->push_back({op.tag, std::move(status), true});
  }
}

// True when the operation is to be submitted once more. Never after its deadline: the caller may
// have been told.
bool SsdTierImpl::Again(Op* op, int32_t result) const {
  if (op->late || clock_.NowNs() >= op->deadline_ns) return false;
  if (result == -EAGAIN || result == -EINTR) return ++op->tries < kMaxTries;
  if (op->kind != IoOp::kRead || op->reread || op->probe) return false;
  op->reread = true;
  return true;
}

void SsdTierImpl::OnCompletion(uint32_t index, int32_t result, std::vector<SsdCompletion>* out) {
  Op& op = ops_[index];
  CA_CHECK(op.state == Op::kInFlight);
  const uint32_t size = RequestOf(index).size;
  if (result > 0) (op.kind == IoOp::kRead ? bytes_read_ : bytes_written_) += result;
  if (result != static_cast<int64_t>(size)) {
    if (Again(&op, result)) {
      Submit(index);
    } else if (result < 0) {
      Finish(index, ErrnoStatus(op.Where(), -result), out);
    } else {
      Finish(index,
             Status(Code::kIo, op.Where() + ": moved " + std::to_string(result) + " of " +
                                   std::to_string(size) + " bytes"),
             out);
    }
  } else if (op.probe) {
    OnProbe(index, out);
  } else if (op.kind == IoOp::kWrite) {
    Finish(index, Status(), out);
  } else if (op.late) {
    Finish(index, Status(Code::kIo, op.Where() + ": it came too late"), out);
  } else if (!op.has_header() && HeaderInFlight(op.host_slot)) {
    op.state = Op::kWaiting;
  } else {
    VerifyRead(index, out);
  }
}

void SsdTierImpl::OnProbe(uint32_t index, std::vector<SsdCompletion>* out) {
  Op& op = ops_[index];
  if (op.kind == IoOp::kWrite && !op.late) {
    op.kind = IoOp::kRead;
    op.host_slot = probe_pages_.get() + kPage;
    Submit(index);
    return;
  }
  const bool same = std::memcmp(probe_pages_.get(), probe_pages_.get() + kPage, kPage) == 0;
  const bool ok = same && !op.late;
  Finish(index, ok ? Status() : Status(Code::kIo, "what was written does not come back"), out);
}

void SsdTierImpl::VerifyRead(uint32_t index, std::vector<SsdCompletion>* out) {
  Op& op = ops_[index];
  Status status = CheckHeader(op);
  const bool readable = status.ok() || op.has_header();
  if (status.ok()) status = CheckPiece(op);
  if (!status.ok() && readable) {
    ++checksum_failures_;
    if (Again(&op, 0)) {
      Submit(index);
      return;
    }
  }
  Finish(index, std::move(status), out);
}

// The header page in the host slot is whole and is that of the expected block.
Status SsdTierImpl::CheckHeader(const Op& op) const {
  const auto& page = *reinterpret_cast<const BlockPage*>(op.host_slot);
  Status status = CheckBlockPage(uuid(), layout_, op.slot, page);
  if (!status.ok()) return Status(Code::kCorrupt, op.Where() + ": " + status.message());
  if (HeaderOf(page) == op.header) return Status();
  return Status(Code::kCorrupt, op.Where() + ": the slot holds another block");
}

// What it reads is proven, and plain, when this says ok.
Status SsdTierImpl::CheckPiece(const Op& op) const {
  if (cipher_ == nullptr && file_->superblock().cipher != kNoCipher) {
    return Status(Code::kMismatch, op.Where() + ": it is encrypted, and there is no master key");
  }
  const auto& page = *reinterpret_cast<const BlockPage*>(op.host_slot);
  const auto bad =
      cipher_ ? cipher_->Decrypt(page, op.first_layer, op.num_layers, op.host_slot)
              : FirstBadLayer(uuid(), layout_, page, op.first_layer, op.num_layers, op.host_slot);
  if (!bad) return Status();
  return Status(Code::kCorrupt, op.Where() + (cipher_ ? ": the tag" : ": the checksum") +
                                    " of layer " + std::to_string(*bad) + " does not match");
}

bool SsdTierImpl::HeaderInFlight(const std::byte* host_slot) const {
  return std::any_of(ops_.begin(), ops_.end(), [host_slot](const Op& op) {
    return op.state != Op::kFree && op.has_header() && op.host_slot == host_slot;
  });
}

// Ends an operation. The end of the piece with the header releases the pieces that wait for it.
void SsdTierImpl::Finish(uint32_t index, Status status, std::vector<SsdCompletion>* out) {
  const Op op = ops_[index];
  ops_[index].state = Op::kFree;
  free_ops_.push_back(index);
  if (cipher_ != nullptr) cipher_->End(index);
  num_late_ -= op.late;
  const bool ok = status.ok();
  out->push_back({op.tag, std::move(status)});
  if (!op.has_header()) return;
  // What is left of a failed header must not vouch for the other layers.
  if (!ok) std::memset(op.host_slot, 0, KvLayout::kHeaderBytes);
  for (uint32_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].state == Op::kWaiting && ops_[i].host_slot == op.host_slot) VerifyRead(i, out);
  }
}

Result<std::vector<ScannedBlock>> SsdTierImpl::Scan(const ScanProgress& progress) {
  if (!file_->index()) return ScanHeaders(progress);
  damaged_.clear();
  if (progress) progress(num_slots(), num_slots());
  return NewestOfEachKey(*file_->index());
}

Result<std::vector<ScannedBlock>> SsdTierImpl::ScanHeaders(const ScanProgress& progress) {
  CA_CHECK(in_flight() == 0);
  damaged_.clear();
  auto blocks = ReadHeaders(file_.get(), options_, progress, &damaged_);
  for (const SlotDamage& damage : damaged_) checksum_failures_ += !damage.unreadable;
  return blocks;
}

}  // namespace

Result<std::unique_ptr<SsdTier>> SsdTier::OpenOn(const SsdOptions& options,
                                                 std::unique_ptr<BlockFile> file) {
  Status status = options.Validate();
  if (!status.ok()) return status;
  auto opened = std::make_unique<SsdFile>(options);
  status = opened->Open(std::move(file));
  if (!status.ok()) return status;
  auto cipher = BlockCipher::Open(options, opened->superblock().uuid, NumOps(opened->engine()));
  if (!cipher.ok()) return cipher.status();
  return std::unique_ptr<SsdTier>(
      std::make_unique<SsdTierImpl>(options, std::move(opened), std::move(cipher.value())));
}

}  // namespace cachedattn
