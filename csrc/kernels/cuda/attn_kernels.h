// The attention kernels, as attention.cu starts them. Each takes the plan items whose rows are in
// its range and leaves the others alone, so that one call may mix decode, extend and prefill.
#pragma once

#include <type_traits>

#include "csrc/kernels/cuda/attn_tile.h"

namespace cachedattn::cuda {

// What the decode and extend kernels are compiled for.
constexpr bool IsTensorCoreDim(int head_dim) {
  return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}
// fn(std::integral_constant<int, head_dim>), which returns an error or nullptr.
template <typename Fn>
const char* WithTensorCoreDim(int head_dim, const Fn& fn) {
  switch (head_dim) {
    case 64:
      return fn(std::integral_constant<int, 64>{});
    case 80:
      return fn(std::integral_constant<int, 80>{});
    case 96:
      return fn(std::integral_constant<int, 96>{});
    case 128:
      return fn(std::integral_constant<int, 128>{});
    case 256:
      return fn(std::integral_constant<int, 256>{});
    default:
      return "the tensor core kernels have no such head_dim";
  }
}

// Any shape and float32, on CUDA cores: every other kernel's fallback.
const char* LaunchPlain(const AttnLaunch& launch, int num_items, void* stream);
constexpr int kPlainRows = 16;  // row tile

// bf16 and fp16 on tensor cores (sm_80 and up); head_dim 64, 80, 96, 128 or 256; the whole head
// rotated, or nothing. Few rows against many keys: bound by memory.
const char* LaunchDecode(const AttnLaunch& launch, int num_items, void* stream);
constexpr int kDecodeRows = 8;          // row tile
constexpr int kMaxDecodeItemRows = 16;  // items with more rows go to the extend kernels

// bf16 and fp16 on tensor cores (sm_80 and up); head_dim 64, 80, 96, 128 or 256; any rotary_dim.
// Many rows: K is rotated once a tile in shared memory.
const char* LaunchExtend(const AttnLaunch& launch, int num_items, void* stream);

constexpr int ExtendRows(int head_dim) { return head_dim == 256 ? 64 : 128; }  // row tile

// The same on sm_90a: TMA, wgmma, a warpgroup that rotates. head_dim 64 or 128.
const char* LaunchHopper(const AttnLaunch& launch, int num_items, void* stream);
constexpr int kHopperRows = 128;  // row tile

}  // namespace cachedattn::cuda
