// The pread/pwrite engine: worker threads for machines where io_uring is refused.
#pragma once

#include <memory>
#include <string>

#include "csrc/io/io_engine.h"

namespace cachedattn {

// `why` is what `IoEngine::why` will return. kIo when no thread can be started.
Result<std::unique_ptr<IoEngine>> OpenThreadEngine(int fd, const IoOptions& options,
                                                   std::string why);

}  // namespace cachedattn
