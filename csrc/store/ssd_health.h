// SsdHealth: whether the SSD tier is in use. A disk that fails or does not answer is switched off,
// so that it costs its readers one deadline and not one each; probes find out when it is back.
#pragma once

#include <deque>
#include <set>
#include <string>

#include "csrc/base/clock.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

class SsdHealth {
 public:
  explicit SsdHealth(const Clock* clock) : clock_(clock) {}

  // Takes note of a finished or late operation; an error, a short count and a late answer are
  // failures, a damaged block is not. True for the probe's: nobody else is told of it.
  bool OnCompletion(const SsdCompletion& done);

  // Draws the conclusion. `quarantined` of `dram_slots` belong to operations that are late;
  // `stuck`: the disk holds all operations that it can take, and each of them is late.
  void Judge(uint32_t quarantined, uint32_t dram_slots, bool stuck);

  // A probe is due: the caller starts one with kProbeTag now.
  bool TakeProbe();
  static constexpr uint64_t kProbeTag = uint64_t{1} << 62;

  bool on() const { return on_; }
  bool probing() const { return probing_; }  // and its answer is not late
  uint64_t num_errors() const { return num_errors_; }
  uint64_t num_late() const { return num_late_; }
  uint64_t num_outages() const { return num_outages_; }
  // Operations whose answer is late and still to come.
  uint32_t late_now() const { return static_cast<uint32_t>(late_.size()); }
  const std::string& report() const { return report_; }  // one line for people

 private:
  void SwitchOff(const std::string& why);

  const Clock* const clock_;
  bool on_ = true;
  bool probing_ = false;
  bool answered_ = false;         // the last probe has succeeded
  int64_t next_probe_ns_ = 0;     // while off
  std::deque<int64_t> failures_;  // of the last minute
  std::set<uint64_t> late_;       // tags
  uint64_t num_errors_ = 0, num_late_ = 0, num_outages_ = 0;
  std::string last_error_;
  std::string report_ = "on";
};

}  // namespace cachedattn
