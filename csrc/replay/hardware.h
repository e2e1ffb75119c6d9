// Modelled hardware: a clock that the event loop moves, an SSD and copy streams that move no bytes
// but take the time that real ones would.
//
// The store's blocks are tiny stand-ins (TokenTree), so times come from the bytes that they stand
// for. Whoever waits on a device moves the clock to its next completion.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "csrc/copy/copy_engine.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

class VirtualClock final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns_; }
  void MoveTo(int64_t ns) { now_ns_ = std::max(now_ns_, ns); }

 private:
  int64_t now_ns_ = 1;
};

constexpr int64_t kNever = INT64_MAX;

// Operations that one device does one after the other.
class DeviceQueue {
 public:
  explicit DeviceQueue(VirtualClock* clock) : clock_(clock) {}

  // It occupies the device for `busy_ns`; its end is seen `latency_ns` later.
  void Add(uint64_t tag, int64_t busy_ns, int64_t latency_ns);
  int64_t next_ns() const { return pending_.empty() ? kNever : pending_.front().end_ns; }
  uint32_t size() const { return static_cast<uint32_t>(pending_.size()); }
  // True: the oldest operation has ended, and is `tag`.
  bool Take(uint64_t* tag);

 private:
  struct Pending {
    int64_t end_ns = 0;
    uint64_t tag = 0;
  };
  VirtualClock* const clock_;
  std::deque<Pending> pending_;
  int64_t free_ns_ = 0;
};

struct SsdModel {
  double read_bytes_s = 5e9;
  double write_bytes_s = 3e9;
  double latency_s = 100e-6;
  // Operations at a time: few, so that what is urgent does not wait behind what is not. The store
  // keeps the order of what waits.
  uint32_t depth = 4;
};

// Reads and writes of one device, in order.
class ModelSsd final : public SsdTier {
 public:
  // A token of a block stands for `token_bytes`. `clock` outlives the tier.
  ModelSsd(const SsdModel& model, uint32_t num_slots, uint64_t token_bytes, VirtualClock* clock)
      : model_(model),
        num_slots_(num_slots),
        token_bytes_(token_bytes),
        clock_(clock),
        queue_(clock) {}

  int64_t next_ns() const { return queue_.next_ns(); }

  uint32_t num_slots() const override { return num_slots_; }
  const std::array<uint8_t, 16>& uuid() const override { return uuid_; }
  Result<std::vector<ScannedBlock>> Scan(const ScanProgress&) override {
    return std::vector<ScannedBlock>();  // it begins empty
  }
  Result<std::vector<ScannedBlock>> ScanHeaders(const ScanProgress& progress) override {
    return Scan(progress);
  }
  const std::vector<ScannedBlock>* index() const override { return nullptr; }
  const std::vector<SlotDamage>& damaged() const override { return damaged_; }
  bool Seal(const BlockKey&, std::byte*) override { return false; }
  void StartWrite(SlotId, const BlockHeader& header, bool, std::byte*, uint64_t tag) override;
  void StartRead(SlotId, const BlockHeader& header, uint32_t, uint32_t, std::byte*,
                 uint64_t tag) override;
  void StartProbe(uint64_t tag) override { queue_.Add(tag, 0, 0); }
  bool can_submit() const override { return queue_.size() < model_.depth; }
  uint32_t in_flight() const override { return queue_.size(); }
  uint32_t num_late() const override { return 0; }
  void Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) override;
  Status Sync(const StoreCounters&, std::span<const ScannedBlock>) override { return Status(); }
  KeyRing* keys() const override { return nullptr; }
  StoreCounters counters() const override { return {}; }
  uint64_t bytes_read() const override { return bytes_read_; }
  double read_rate() const override { return model_.read_bytes_s; }
  uint64_t bytes_written() const override { return bytes_written_; }
  uint64_t checksum_failures() const override { return 0; }
  const char* io_name() const override { return "model"; }
  const std::string& io_why() const override { return why_; }

 private:
  const SsdModel model_;
  const uint32_t num_slots_;
  const uint64_t token_bytes_;
  VirtualClock* const clock_;
  DeviceQueue queue_;
  uint64_t bytes_read_ = 0, bytes_written_ = 0;
  const std::array<uint8_t, 16> uuid_{};
  std::vector<SlotDamage> damaged_;
  const std::string why_ = "a replay in virtual time";
};

// DRAM <-> device, a stream for each direction.
class ModelCopy final : public CopyEngine {
 public:
  // A copy stands for `block_bytes`; `bytes_s` 0: it takes no time. `clock` outlives the engine.
  ModelCopy(double bytes_s, uint64_t block_bytes, VirtualClock* clock)
      : copy_ns_(bytes_s > 0 ? static_cast<int64_t>(1e9 * block_bytes / bytes_s) : 0),
        clock_(clock),
        streams_{DeviceQueue(clock), DeviceQueue(clock)} {}

  int64_t next_ns() const { return std::min(streams_[0].next_ns(), streams_[1].next_ns()); }

  void Enqueue(const CopyRequest& request) override;
  void Poll(std::vector<uint64_t>* tags, int64_t timeout_us) override;
  uint32_t in_flight() const override { return streams_[0].size() + streams_[1].size(); }
  bool moves_bytes() const override { return false; }

 private:
  const int64_t copy_ns_;
  VirtualClock* const clock_;
  DeviceQueue streams_[2];
};

}  // namespace cachedattn
