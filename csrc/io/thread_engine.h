// The pread/pwrite engine: worker threads for machines where io_uring is refused.
#pragma once

#include <memory>
#include <string>

#include "csrc/io/io_engine.h"

namespace cachedattn {

// `why` is what `IoEngine::why` will return. kIo when no thread can be started.
Result<std::unique_ptr<IoEngine>> OpenThreadEngine(int fd, const IoOptions& options,
                                                   std::string why);

// Does `request` and waits for it: bytes moved, or -errno.
int32_t Execute(int fd, const IoRequest& request);

}  // namespace cachedattn
