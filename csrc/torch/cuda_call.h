// What the ops do on CUDA beside filling parameters.
#pragma once

#include <functional>

#include "csrc/torch/checks.h"

namespace cachedattn {

// Without CUDA in the build the ops are not registered for it. The entry points of params.h are
// then not defined: name them under `if constexpr (kHasCuda)` only.
#ifdef CACHEDATTN_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Calls `start` with torch's current stream of `device`, which is the current device meanwhile, and
// raises the error that it returns.
void CallOnStream(const char* op, const Device& device,
                  const std::function<const char*(void* stream)>& start);

}  // namespace cachedattn
