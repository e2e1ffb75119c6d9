// An engine that reads no faster than it may: what a store takes of a disk that others use, too.
#pragma once

#include <memory>

#include "csrc/io/io_engine.h"

namespace cachedattn {

// Hands a read to `inner` when a disk of this rate would have read what came before it, and it.
// Writes are not held up.
std::unique_ptr<IoEngine> LimitReads(std::unique_ptr<IoEngine> inner, uint64_t bytes_per_s);

}  // namespace cachedattn
