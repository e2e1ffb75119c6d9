#include "csrc/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace cachedattn {

void CheckFailed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "cachedattn: check failed: %s (%s:%d)\n", condition, file, line);
  std::abort();
}

}  // namespace cachedattn
