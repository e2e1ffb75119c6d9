#include "csrc/base/fork.h"

#include <pthread.h>

#include <atomic>

#include "csrc/base/check.h"

namespace cachedattn {

uint32_t ForkDepth() {
  static std::atomic<uint32_t> depth = 0;
  static const int error = pthread_atfork(nullptr, nullptr, [] { ++depth; });
  CA_CHECK(error == 0);
  return depth.load(std::memory_order_relaxed);
}

}  // namespace cachedattn
