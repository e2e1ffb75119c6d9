// The io_uring engine (liburing).
#pragma once

#include <memory>

#include "csrc/io/io_engine.h"

namespace cachedattn {

// kIo, with the errno text, where io_uring is refused.
Result<std::unique_ptr<IoEngine>> OpenUringEngine(int fd, const IoOptions& options);

}  // namespace cachedattn
