// Small types that every layer shares.
#pragma once

#include <cstddef>
#include <cstdint>

#define CA_API __attribute__((visibility("default")))

namespace cachedattn {

// Element type of K and V.
enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr uint32_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr const char* Name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// A place that can hold blocks, fastest first.
enum class Tier : uint8_t { kDevice = 0, kDram = 1, kSsd = 2 };
constexpr uint32_t kNumTiers = 3;

using TokenId = int32_t;
using SlotId = uint32_t;  // a place for one block in a tier
constexpr SlotId kNoSlot = UINT32_MAX;

constexpr uint64_t kPage = 4096;         // alignment of O_DIRECT offsets, sizes and buffers
constexpr uint64_t kHugePage = 2 << 20;  // alignment of slabs, for MADV_HUGEPAGE

constexpr uint64_t AlignUp(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace cachedattn
