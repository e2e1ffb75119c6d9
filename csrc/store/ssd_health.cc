#include "csrc/store/ssd_health.h"

namespace cachedattn {

namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr size_t kMaxFailures = 5;
constexpr int64_t kFailureWindowNs = 60 * kSecond;
constexpr int64_t kProbeIntervalNs = 30 * kSecond;
constexpr uint32_t kQuarantineShare = 10;  // one DRAM slot in so many

}  // namespace

bool SsdHealth::OnCompletion(const SsdCompletion& done) {
  const bool probe = done.tag == kProbeTag;
  // Its second completion: the failure has been counted.
  const bool was_late = late_.erase(done.tag) != 0;
  if (done.late) late_.insert(done.tag);
  const bool failed = done.late || done.status.code() == Code::kIo;
  if (failed && !was_late) {
    ++(done.late ? num_late_ : num_errors_);
    last_error_ = done.status.message();
    failures_.push_back(clock_->NowNs());
    if (failures_.size() > kMaxFailures) failures_.pop_front();
  }
  if (probe) {
    probing_ = false;
    answered_ = done.status.ok() && !was_late;
    // A disk that answers at last is asked again at once.
    next_probe_ns_ = clock_->NowNs() + (was_late ? 0 : kProbeIntervalNs);
  }
  return probe;
}

void SsdHealth::Judge(uint32_t quarantined, uint32_t dram_slots, bool stuck) {
  const bool crowded = uint64_t{quarantined} * kQuarantineShare > dram_slots;
  if (!on_) {
    if (!answered_ || crowded) return;
    on_ = true;
    failures_.clear();
    report_ = "on again after outage " + std::to_string(num_outages_) + "; " + last_error_;
    return;
  }
  if (stuck) {
    SwitchOff("no operation comes back");
  } else if (crowded) {
    SwitchOff(std::to_string(quarantined) + " of " + std::to_string(dram_slots) +
              " DRAM slots belong to late operations");
  } else if (failures_.size() == kMaxFailures &&
             clock_->NowNs() - failures_.front() <= kFailureWindowNs) {
    SwitchOff(std::to_string(kMaxFailures) + " failures within a minute");
  }
}

void SsdHealth::SwitchOff(const std::string& why) {
  on_ = false;
  answered_ = false;
  ++num_outages_;
  next_probe_ns_ = clock_->NowNs() + kProbeIntervalNs;
  report_ = "off: " + why + "; the last: " + last_error_;
}

bool SsdHealth::TakeProbe() {
  if (on_ || probing_ || late_.contains(kProbeTag) || clock_->NowNs() < next_probe_ns_) {
    return false;
  }
  answered_ = false;
  return probing_ = true;
}

}  // namespace cachedattn
