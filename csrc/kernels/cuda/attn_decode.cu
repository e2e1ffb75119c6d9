#include "csrc/kernels/cuda/attn_decode.h"

#include "csrc/kernels/cuda/launch.h"

namespace cachedattn::cuda {
namespace {

template <typename T, int kDim>
const char* LaunchDim(const AttnLaunch& launch, int num_items, void* stream) {
  const Index3 grid = {num_items, launch.p.kv.num_kv_heads * launch.row_blocks, 1};
  return Launch(DecodeKernel<T, kDim>, grid, 32 * kDecodeWarps, DecodeShared<kDim>::kBytes, stream,
                launch);
}

template <typename T>
const char* LaunchElement(const AttnLaunch& launch, int num_items, void* stream) {
  switch (launch.p.kv.head_dim) {
    case 64:
      return LaunchDim<T, 64>(launch, num_items, stream);
    case 80:
      return LaunchDim<T, 80>(launch, num_items, stream);
    case 96:
      return LaunchDim<T, 96>(launch, num_items, stream);
    case 128:
      return LaunchDim<T, 128>(launch, num_items, stream);
    case 256:
      return LaunchDim<T, 256>(launch, num_items, stream);
    default:
      return "the decode kernel has no such head_dim";
  }
}

}  // namespace

const char* LaunchDecode(const AttnLaunch& launch, int num_items, void* stream) {
  return launch.p.kv.dtype == DType::kBFloat16 ? LaunchElement<Bf16>(launch, num_items, stream)
                                               : LaunchElement<Fp16>(launch, num_items, stream);
}

}  // namespace cachedattn::cuda
