#include "csrc/kernels/cuda/attn_decode.h"

#include "csrc/kernels/cuda/launch.h"

namespace cachedattn::cuda {
namespace {

template <typename T>
const char* LaunchElement(const AttnLaunch& launch, int num_items, void* stream) {
  return WithTensorCoreDim(launch.p.kv.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const Index3 grid = {num_items, launch.p.kv.num_kv_heads * launch.row_blocks, 1};
    return Launch(DecodeKernel<T, kDim>, grid, 32 * kDecodeWarps, DecodeShared<kDim>::kBytes,
                  stream, launch);
  });
}

}  // namespace

const char* LaunchDecode(const AttnLaunch& launch, int num_items, void* stream) {
  return launch.p.kv.dtype == DType::kBFloat16 ? LaunchElement<Bf16>(launch, num_items, stream)
                                               : LaunchElement<Fp16>(launch, num_items, stream);
}

}  // namespace cachedattn::cuda
