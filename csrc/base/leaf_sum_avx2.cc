#include <xxhash.h>

#include "csrc/base/slice_sum.h"

namespace cachedattn {

uint64_t FullLeafSumAvx2(const std::byte* leaf, const LeafSecret* secret) {
  return XXH3_64bits_withSecret(leaf, kLeafBytes, secret, LeafSecret::kBytes);
}

}  // namespace cachedattn
