// The inline engine: a request is done when Submit returns, and is reported by the next Poll in its
// turn. So the same calls see the same completions however fast the disk is: for tests.
#pragma once

#include <memory>

#include "csrc/io/io_engine.h"

namespace cachedattn {

std::unique_ptr<IoEngine> OpenInlineEngine(int fd, const IoOptions& options);

}  // namespace cachedattn
