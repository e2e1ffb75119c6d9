// KvLayout: every size and offset of a block, computed in one place (design D1).
//
// A block is `block_size` consecutive tokens' K and V of all layers. Its bytes are the same in
// every tier:
//
//   payload = [layer][2 (K, V)][kv_head][token][head_dim], each layer slice padded to 4 KiB
//   host slot (DRAM, SSD) = 4 KiB header page, then the payload
//   device slot           = the payload alone
//
// The header page travels with the block so that a DRAM slot and an SSD slot are byte for byte
// equal: a save is one write, a load is one read, and neither copies.
#pragma once

#include "csrc/base/status.h"
#include "csrc/base/types.h"

namespace cachedattn {

struct KvLayout {
  uint32_t num_layers = 0;
  uint32_t num_kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t block_size = 64;  // tokens
  DType dtype = DType::kBFloat16;

  static constexpr uint32_t kMaxLayers = 240;  // the header page holds one seal a layer
  static constexpr uint64_t kHeaderBytes = kPage;
  static constexpr uint64_t kMaxSlotBytes = 1ull << 30;  // a block is one I/O request

  // Bytes of one layer slice (K next to V), and the distance from one to the next.
  uint64_t slice_bytes() const {
    return 2ull * num_kv_heads * block_size * head_dim * SizeOf(dtype);
  }
  uint64_t slice_stride() const { return AlignUp(slice_bytes(), kPage); }
  uint64_t payload_bytes() const { return num_layers * slice_stride(); }
  uint64_t host_slot_bytes() const { return kHeaderBytes + payload_bytes(); }

  // Where layer `layer` begins, from the start of the slot.
  uint64_t host_slice_offset(uint32_t layer) const { return kHeaderBytes + layer * slice_stride(); }
  uint64_t device_slice_offset(uint32_t layer) const { return layer * slice_stride(); }

  uint64_t bytes_per_token() const { return slice_bytes() * num_layers / block_size; }
  uint32_t num_blocks(uint64_t tokens) const {
    return static_cast<uint32_t>((tokens + block_size - 1) / block_size);
  }

  // kInvalidArgument naming the field that is out of range.
  CA_API Status Validate() const;

  bool operator==(const KvLayout&) const = default;
};

}  // namespace cachedattn
