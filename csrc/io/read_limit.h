// An engine that reads no faster than it may: what a store takes of a disk that others use, too.
#pragma once

#include <memory>

#include "csrc/io/io_engine.h"

namespace cachedattn {

// A read has ended when a disk of this rate would have read what came before it, and it. `inner`
// reads at once, so what is in flight comes in bursts, but nobody has to poll to keep it going.
// Writes are not held up. REQUIRES: no two requests in flight have one tag.
std::unique_ptr<IoEngine> LimitReads(std::unique_ptr<IoEngine> inner, uint64_t bytes_per_s);

}  // namespace cachedattn
