// SimDisk: a disk in memory, for simulations that a seed repeats byte by byte.
//
// Time is virtual (SimClock): it moves in Poll alone, to the next event, and nothing ever waits.
// A request takes a random time; its bytes move in two pieces at random moments in between, so
// that a buffer that is changed or used again too early shows. The medium survives a crash; what
// was not made durable by a sync may then be lost. Faults fire by chance or by rule, and each kind
// counts how often it did.
//
//   SimClock clock;
//   SimDisk disk(&clock);
//   disk.Format(seed);
//   disk.faults().rate[...] = 10;      // of 1000 requests
//   auto tier = SsdTier::OpenOn(options, disk.OpenFile());
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/base/clock.h"
#include "csrc/io/block_file.h"
#include "csrc/io/io_engine.h"

namespace cachedattn {

// Small and fast; the same numbers everywhere.
class SimRandom {
 public:
  explicit SimRandom(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t Next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(((Next() >> 32) * end) >> 32); }
  bool OneIn(uint32_t n) { return Below(n) == 0; }
  // At least 1, with the same chance for every power of two below 2^bits.
  uint64_t Scale(uint32_t bits) {
    const uint32_t shift = Below(bits);
    return (uint64_t{1} << shift) + (Next() & ((uint64_t{1} << shift) - 1));
  }

 private:
  uint64_t state_;
};

class SimClock final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns_; }
  void Advance(int64_t ns) { AdvanceTo(now_ns_ + ns); }
  void AdvanceTo(int64_t ns) {
    if (ns > now_ns_) now_ns_ = ns;
    CA_CHECK(now_ns_ <= limit_ns_);  // something waits for what never comes
  }
  // The process stops when the time passes `ns`.
  void set_limit(int64_t ns) { limit_ns_ = ns; }

 private:
  int64_t now_ns_ = 0;
  int64_t limit_ns_ = INT64_MAX;
};

enum class DiskFault : uint8_t {
  // Reported.
  kEio,
  kNoSpace,  // writes, and Resize
  kShort,
  kAgain,
  kHang,  // past the deadline; the bytes move then
  kCrashLost,
  // Silent.
  kCrashTorn,
  kFlip,  // in the buffer of a read
  kRot,   // on the medium
  kLostWrite,
  kTornWrite,
  kMisdirectedRead,
  kMisdirectedWrite,
  kStaleRead,
  kNone,
};
constexpr uint32_t kNumDiskFaults = static_cast<uint32_t>(DiskFault::kNone);
const char* Name(DiskFault fault);
constexpr bool Silent(DiskFault fault) { return fault >= DiskFault::kCrashTorn; }

struct DiskFaults {
  std::array<uint16_t, kNumDiskFaults> rate{};  // of 1000 requests; the crash kinds have none
  int64_t hang_ns = 0;                          // a hang lasts from 1 to 4 times this
  uint64_t stride = kPage;                      // misdirected by a few of these

  // By rule: the request that is number `rule_from` (from 0) of those that the kind may hit, and
  // all later ones if `rule_forever`.
  DiskFault rule = DiskFault::kNone;
  uint64_t rule_from = 0;
  bool rule_forever = false;
};

constexpr uint32_t kDiskSector = 512;

class SimEngine;

class SimDisk {
 public:
  static constexpr uint64_t kCapacity = 8 << 20;

  explicit SimDisk(SimClock* clock);
  ~SimDisk();
  SimDisk(const SimDisk&) = delete;
  SimDisk& operator=(const SimDisk&) = delete;

  // An empty disk without faults, whatever was there. REQUIRES: no file is open. A `hostile` one
  // may leave a part of a write that failed, and tear writes in a crash; an honest one leaves all
  // of a write or nothing.
  void Format(uint64_t seed, bool hostile);

  // An empty file again; faults and counts stay. REQUIRES: no file is open.
  void Erase();

  // kBusy while another one is open.
  Result<std::unique_ptr<BlockFile>> OpenFile();

  // The power fails. Open engines answer everything with EIO from now on, what they had in hand
  // never reaches its buffer. Writes since the last sync, each for itself, are kept or lost.
  void Crash();

  DiskFaults& faults() { return faults_; }
  void StopFaults() { faults_ = DiskFaults(); }
  void RestartRule() { rule_seen_ = 0; }  // counts from the next request on
  uint64_t fired(DiskFault fault) const { return fired_[static_cast<int>(fault)]; }
  uint64_t num_requests() const { return num_requests_; }
  bool open() const { return open_; }
  uint64_t size() const { return size_; }
  // The bytes, behind everybody's back.
  std::byte* medium() { return medium_; }

 private:
  friend class SimFile;
  friend class SimEngine;

  // What a write that no sync has made durable has replaced. A crash keeps or loses all records of
  // an operation alike.
  struct Undo {
    uint64_t operation = 0;
    uint64_t offset = 0, size = 0;
    uint64_t bytes_at = 0;  // in undo_bytes_
    uint64_t finished = 0;  // when, among all requests; UINT64_MAX: not yet
  };

  DiskFault Choose(IoOp op, bool resize = false);
  void Count(DiskFault fault) { ++fired_[static_cast<int>(fault)]; }
  Status Resize(uint64_t bytes);
  void Store(uint64_t operation, uint64_t offset, const std::byte* data, uint64_t size);
  void FinishWrite(uint64_t operation);
  void Sync(uint64_t upto);
  bool ReadStale(uint64_t offset, std::byte* data, uint64_t size);
  void MarkDirty(uint64_t offset, uint64_t size);
  void Flip(std::byte* bytes, uint64_t size);

  SimClock* const clock_;
  SimRandom random_{0};
  std::byte* const medium_;
  uint64_t size_ = 0;
  bool open_ = false;
  bool hostile_ = false;
  std::vector<bool> dirty_;  // by page: not zero
  std::vector<uint32_t> dirty_pages_;
  std::vector<Undo> undo_;
  std::vector<std::byte> undo_bytes_;
  uint64_t num_finished_ = 0;
  std::vector<SimEngine*> engines_;
  DiskFaults faults_;
  uint64_t rule_seen_ = 0;
  uint64_t num_requests_ = 0;
  std::array<uint64_t, kNumDiskFaults> fired_{};
};

class SimEngine final : public IoEngine {
 public:
  SimEngine(SimDisk* disk, uint32_t depth);
  ~SimEngine() override;

  void Submit(const IoRequest& request) override;
  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override;
  uint32_t depth() const override { return depth_; }
  uint32_t in_flight() const override { return static_cast<uint32_t>(active_.size()); }
  const char* name() const override { return "simulated"; }
  const std::string& why() const override { return why_; }

 private:
  friend class SimDisk;

  struct Active {
    IoRequest request;
    DiskFault fault = DiskFault::kNone;
    uint64_t operation = 0;
    int64_t first_ns = 0, end_ns = 0;  // when the first piece and when all the rest has moved
    uint32_t cut = 0;                  // end of the first piece; 0: all moves at the end
    uint32_t moves = 0;                // bytes that move in all
    uint32_t moved = 0;                // so far
    int32_t result = 0;
    uint64_t place = 0;  // on the medium; of a sync: what it makes durable
  };

  void Plan(Active* active);
  void PlanWay(Active* active);
  void Move(const Active& active, uint32_t begin, uint32_t end);
  void MoveSectors(const Active& active);
  int32_t Finish(const Active& active);
  void Die();
  size_t Collect(std::span<IoCompletion> out);

  SimDisk* const disk_;
  const uint32_t depth_;
  const std::string why_ = "a disk in memory";
  bool dead_ = false;
  std::vector<Active> active_;
};

}  // namespace cachedattn
