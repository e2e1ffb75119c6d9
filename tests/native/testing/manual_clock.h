// A clock that a test moves.
#pragma once

#include "csrc/base/clock.h"

namespace cachedattn {

class ManualClock : public Clock {
 public:
  static constexpr int64_t kSecond = 1'000'000'000;

  int64_t NowNs() const override { return now_ns_; }
  void Advance(int64_t ns) { now_ns_ += ns; }

 private:
  int64_t now_ns_ = kSecond;
};

}  // namespace cachedattn
