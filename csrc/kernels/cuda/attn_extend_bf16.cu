#include "csrc/kernels/cuda/attn_extend.h"

namespace cachedattn::cuda {

const char* LaunchExtendBf16(const AttnLaunch& launch, int num_items, void* stream) {
  return LaunchExtendOf<Bf16>(launch, num_items, stream);
}

}  // namespace cachedattn::cuda
