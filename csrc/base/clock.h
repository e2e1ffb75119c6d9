// Clock: the time that deadlines, probes and traces are measured in. A simulation brings its own.
#pragma once

#include <cstdint>

#include "csrc/base/types.h"

namespace cachedattn {

class CA_API Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t NowNs() const = 0;  // never goes back
};

// CLOCK_MONOTONIC.
CA_API const Clock& SystemClock();

}  // namespace cachedattn
