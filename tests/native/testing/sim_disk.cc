#include "tests/native/testing/sim_disk.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace cachedattn {

namespace {

constexpr uint64_t kNotYet = UINT64_MAX;

std::byte* MapMedium() {
  void* data = ::mmap(nullptr, SimDisk::kCapacity, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CA_CHECK(data != MAP_FAILED);
  return static_cast<std::byte*>(data);
}

bool MayHit(DiskFault fault, IoOp op, bool resize) {
  if (resize) return fault == DiskFault::kNoSpace;
  switch (fault) {
    case DiskFault::kEio:
    case DiskFault::kAgain:
    case DiskFault::kHang:
      return true;
    case DiskFault::kShort:
      return op != IoOp::kSync;
    case DiskFault::kNoSpace:
    case DiskFault::kLostWrite:
    case DiskFault::kTornWrite:
    case DiskFault::kMisdirectedWrite:
      return op == IoOp::kWrite;
    case DiskFault::kFlip:
    case DiskFault::kRot:
    case DiskFault::kMisdirectedRead:
    case DiskFault::kStaleRead:
      return op == IoOp::kRead;
    default:
      return false;
  }
}

}  // namespace

const char* Name(DiskFault fault) {
  static constexpr const char* kNames[] = {"eio",       "enospc",    "short",    "eagain", "hang",
                                           "crashlost", "crashtorn", "flip",     "rot",    "lost",
                                           "torn",      "misread",   "miswrite", "stale",  "none"};
  static_assert(std::size(kNames) == kNumDiskFaults + 1);
  return kNames[static_cast<int>(fault)];
}

class SimFile final : public BlockFile {
 public:
  explicit SimFile(SimDisk* disk) : disk_(disk) {}
  ~SimFile() override { disk_->open_ = false; }

  uint64_t size() const override { return disk_->size_; }
  Status Resize(uint64_t bytes) override { return disk_->Resize(bytes); }
  Result<std::unique_ptr<IoEngine>> OpenEngine(const IoOptions& options) override {
    std::unique_ptr<IoEngine> engine = std::make_unique<SimEngine>(disk_, options.depth);
    if (options.wrap) engine = options.wrap(std::move(engine));
    return engine;
  }
  const std::string& path() const override { return path_; }
  bool direct() const override { return true; }

 private:
  SimDisk* const disk_;
  const std::string path_ = "the simulated disk";
};

SimDisk::SimDisk(SimClock* clock)
    : clock_(clock), medium_(MapMedium()), dirty_(kCapacity / kPage) {}

SimDisk::~SimDisk() { ::munmap(medium_, kCapacity); }

void SimDisk::Erase() {
  CA_CHECK(!open_ && engines_.empty());
  for (uint32_t page : dirty_pages_) {
    std::memset(medium_ + page * kPage, 0, kPage);
    dirty_[page] = false;
  }
  dirty_pages_.clear();
  size_ = 0;
  undo_.clear();
  undo_bytes_.clear();
}

void SimDisk::Format(uint64_t seed, bool hostile) {
  Erase();
  random_ = SimRandom(seed);
  hostile_ = hostile;
  num_finished_ = num_requests_ = rule_seen_ = 0;
  fired_ = {};
  StopFaults();
}

Result<std::unique_ptr<BlockFile>> SimDisk::OpenFile() {
  if (open_) return Status(Code::kBusy, "the simulated disk is open");
  open_ = true;
  return std::unique_ptr<BlockFile>(std::make_unique<SimFile>(this));
}

Status SimDisk::Resize(uint64_t bytes) {
  const bool full = bytes > size_ && Choose(IoOp::kWrite, true) == DiskFault::kNoSpace;
  if (full) Count(DiskFault::kNoSpace);
  if (full || bytes > kCapacity) {
    return Status(Code::kIo, "cannot reserve " + std::to_string(bytes) + " bytes: no space left");
  }
  if (bytes < size_) {
    std::memset(medium_ + bytes, 0, size_ - bytes);
    std::erase_if(undo_, [bytes](const Undo& undo) { return undo.offset >= bytes; });
  }
  size_ = bytes;
  return Status();
}

DiskFault SimDisk::Choose(IoOp op, bool resize) {
  ++num_requests_;
  if (faults_.rule != DiskFault::kNone && MayHit(faults_.rule, op, resize)) {
    const uint64_t number = rule_seen_++;
    if (number == faults_.rule_from || (number > faults_.rule_from && faults_.rule_forever)) {
      return faults_.rule;
    }
  }
  uint32_t draw = random_.Below(1000);
  for (uint32_t i = 0; i < kNumDiskFaults; ++i) {
    if (draw < faults_.rate[i]) {
      const auto fault = static_cast<DiskFault>(i);
      return MayHit(fault, op, resize) ? fault : DiskFault::kNone;
    }
    draw -= faults_.rate[i];
  }
  return DiskFault::kNone;
}

void SimDisk::MarkDirty(uint64_t offset, uint64_t size) {
  for (uint64_t page = offset / kPage; page * kPage < offset + size; ++page) {
    if (dirty_[page]) continue;
    dirty_[page] = true;
    dirty_pages_.push_back(static_cast<uint32_t>(page));
  }
}

// A byte that matters: the sums leave the padding of small slices out.
void SimDisk::Flip(std::byte* bytes, uint64_t size) {
  const uint64_t byte = random_.Below(static_cast<uint32_t>(size));
  const uint64_t at = random_.OneIn(4) ? byte : byte / kPage * kPage + byte % 128;
  bytes[at] ^= std::byte{1} << random_.Below(8);
}

void SimDisk::Store(uint64_t operation, uint64_t offset, const std::byte* data, uint64_t size) {
  CA_CHECK(offset + size <= kCapacity);
  size_ = std::max(size_, offset + size);
  std::byte* const place = medium_ + offset;
  undo_.push_back({operation, offset, size, undo_bytes_.size(), kNotYet});
  undo_bytes_.insert(undo_bytes_.end(), place, place + size);
  std::memcpy(place, data, size);
  MarkDirty(offset, size);
}

void SimDisk::FinishWrite(uint64_t operation) {
  ++num_finished_;
  for (auto it = undo_.rbegin(); it != undo_.rend(); ++it) {
    if (it->operation == operation) it->finished = num_finished_;
  }
}

void SimDisk::Sync(uint64_t upto) {
  std::erase_if(undo_, [upto](const Undo& undo) { return undo.finished <= upto; });
  if (undo_.empty()) undo_bytes_.clear();
}

bool SimDisk::ReadStale(uint64_t offset, std::byte* data, uint64_t size) {
  for (auto it = undo_.rbegin(); it != undo_.rend(); ++it) {
    const uint64_t begin = std::max(offset, it->offset);
    const uint64_t end = std::min(offset + size, it->offset + it->size);
    if (begin >= end) continue;
    const std::byte* old = undo_bytes_.data() + it->bytes_at + (begin - it->offset);
    if (std::memcmp(data + (begin - offset), old, end - begin) == 0) continue;
    std::memcpy(data + (begin - offset), old, end - begin);
    return true;
  }
  return false;
}

void SimDisk::Crash() {
  for (SimEngine* engine : engines_) engine->Die();
  for (auto it = undo_.rbegin(); it != undo_.rend(); ++it) {
    std::byte* const kept = undo_bytes_.data() + it->bytes_at;
    std::swap_ranges(kept, kept + it->size, medium_ + it->offset);
  }
  const uint64_t seed = random_.Next();
  uint64_t last_counted = 0;
  for (const Undo& undo : undo_) {
    SimRandom fate(seed ^ undo.operation);
    const uint32_t draw = fate.Below(hostile_ ? 3 : 2);
    if (draw > 0 && undo.operation != last_counted) {
      Count(draw == 1 ? DiskFault::kCrashLost : DiskFault::kCrashTorn);
      last_counted = undo.operation;
    }
    if (draw == 1) continue;
    const uint32_t piece = draw == 0 ? static_cast<uint32_t>(undo.size) : kDiskSector;
    for (uint64_t at = 0; at < undo.size; at += piece) {
      if (draw == 2 && fate.OneIn(2)) continue;
      std::memcpy(medium_ + undo.offset + at, undo_bytes_.data() + undo.bytes_at + at, piece);
    }
  }
  undo_.clear();
  undo_bytes_.clear();
}

}  // namespace cachedattn
