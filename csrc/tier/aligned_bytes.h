// Memory that a disk can move bytes to and from.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "csrc/base/check.h"
#include "csrc/base/types.h"

namespace cachedattn {

struct FreeDeleter {
  void operator()(void* data) const { std::free(data); }
};
using AlignedBytes = std::unique_ptr<std::byte[], FreeDeleter>;

// Zeroed pages; `size` is a multiple of kPage.
inline AlignedBytes AllocatePages(size_t size) {
  void* data = std::aligned_alloc(kPage, size);
  CA_CHECK(data != nullptr);
  std::memset(data, 0, size);
  return AlignedBytes(static_cast<std::byte*>(data));
}

}  // namespace cachedattn
