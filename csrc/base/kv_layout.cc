#include "csrc/base/kv_layout.h"

namespace cachedattn {
namespace {

Status CheckRange(const char* field, uint64_t value, uint64_t low, uint64_t high) {
  if (value >= low && value <= high) return Status();
  return Status(Code::kInvalidArgument, std::string("layout.") + field + " is " +
                                            std::to_string(value) + ", must be " +
                                            std::to_string(low) + " to " + std::to_string(high));
}

}  // namespace

Status KvLayout::Validate() const {
  struct Field {
    const char* name;
    uint64_t value, low, high;
  };
  // The product of the limits fits 64 bits, so the sizes below cannot overflow.
  const Field fields[] = {
      {"num_layers", num_layers, 1, kMaxLayers},
      {"num_kv_heads", num_kv_heads, 1, 1024},
      {"head_dim", head_dim, 2, 1024},
      {"block_size", block_size, 1, 4096},
      {"dtype", static_cast<uint64_t>(dtype), 0, static_cast<uint64_t>(DType::kFloat16)},
  };
  for (const Field& field : fields) {
    Status status = CheckRange(field.name, field.value, field.low, field.high);
    if (!status.ok()) return status;
  }
  if (head_dim % 2 != 0) {
    return Status(Code::kInvalidArgument,
                  "layout.head_dim is " + std::to_string(head_dim) + ", must be even");
  }
  if (host_slot_bytes() > kMaxSlotBytes) {
    return Status(Code::kInvalidArgument, "a block of " + std::to_string(block_size) +
                                              " tokens takes " + std::to_string(host_slot_bytes()) +
                                              " bytes, more than " + std::to_string(kMaxSlotBytes) +
                                              "; use a smaller block_size");
  }
  return Status();
}

}  // namespace cachedattn
