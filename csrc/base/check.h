// CA_CHECK: programmer errors stop the process. Never for user input, never for disk contents.
#pragma once

namespace cachedattn {

[[noreturn]] __attribute__((visibility("default"))) void CheckFailed(const char* condition,
                                                                     const char* file, int line);

}  // namespace cachedattn

#define CA_CHECK(condition)               \
  (static_cast<bool>(condition) ? void(0) \
                                : ::cachedattn::CheckFailed(#condition, __FILE__, __LINE__))
