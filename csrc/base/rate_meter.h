// RateMeter: bytes a second that a device moves while it has work.
//
// Who counts them looks only now and then, so the end of what is finished may lie long before a
// look finds it. A device that still has work at a look has been busy all the time; one that has
// none counts only if the last look was not long ago, or if it is faster than was known.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cachedattn {

class RateMeter {
 public:
  // The device has work from now on.
  void Begin(int64_t now_ns) {
    if (busy_) return;
    busy_ = true;
    since_ns_ = seen_ns_ = now_ns;
  }

  // A look, or a wait for the first thing to finish, that took from `asked_ns` to `now_ns` and
  // found `bytes` moved. `idle`: the device has no work left.
  void Look(int64_t asked_ns, int64_t now_ns, uint64_t bytes, bool idle) {
    if (!busy_) return;
    const int64_t spent_ns = now_ns - since_ns_;
    const bool exact = !idle || kPrecision * (asked_ns - seen_ns_) <= spent_ns;
    const bool faster = ns_ >= kLeastNs && 1e9 * bytes > mean() * spent_ns;
    if (bytes > 0 && spent_ns > 0 && (exact || faster)) Add(now_ns, bytes, spent_ns);
    if (bytes > 0) since_ns_ = now_ns;
    seen_ns_ = now_ns;
    busy_ = !idle;
  }

  // Bytes a second; 0: not known, or not measured for so long that it may have changed.
  double rate(int64_t now_ns) const {
    return ns_ >= kLeastNs && now_ns - added_ns_ <= kFreshNs ? mean() : 0;
  }

 private:
  static constexpr int64_t kPrecision = 8;  // an end is known to a part of this
  static constexpr double kLeastNs = 1e6;   // less tells more of latency than of rate
  static constexpr double kMeanNs = 1e9;    // of busy time, about, is what counts
  static constexpr int64_t kFreshNs = 60'000'000'000;

  void Add(int64_t now_ns, uint64_t bytes, int64_t spent_ns) {
    const double keep = kMeanNs / std::max(kMeanNs, ns_ + spent_ns);
    bytes_ = (bytes_ + static_cast<double>(bytes)) * keep;
    ns_ = (ns_ + static_cast<double>(spent_ns)) * keep;
    added_ns_ = now_ns;
  }
  double mean() const { return 1e9 * bytes_ / ns_; }

  bool busy_ = false;
  int64_t since_ns_ = 0;  // from when on what is to come counts
  int64_t seen_ns_ = 0;   // the last look that found it busy
  int64_t added_ns_ = 0;
  double bytes_ = 0, ns_ = 0;
};

}  // namespace cachedattn
