// The extend kernel by element type. Each type is compiled on its own, side by side.
#include "csrc/kernels/cuda/attn_kernels.h"

namespace cachedattn::cuda {

const char* LaunchExtendBf16(const AttnLaunch& launch, int num_items, void* stream);
const char* LaunchExtendFp16(const AttnLaunch& launch, int num_items, void* stream);

const char* LaunchExtend(const AttnLaunch& launch, int num_items, void* stream) {
  const bool bf16 = launch.p.kv.dtype == DType::kBFloat16;
  return (bf16 ? LaunchExtendBf16 : LaunchExtendFp16)(launch, num_items, stream);
}

}  // namespace cachedattn::cuda
