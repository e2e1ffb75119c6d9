// SsdOp: what SsdTier knows of one operation under way.
#pragma once

#include <string>

#include "csrc/tier/ssd_format.h"

namespace cachedattn {

// A read piece, a write or a probe. It is queued until the engine has room. A piece without the
// header page is `waiting` from its completion until the header page of its block is there to
// verify it.
struct SsdOp {
  enum State : uint8_t { kFree, kQueued, kInFlight, kWaiting } state = kFree;
  IoOp kind = IoOp::kRead;
  bool probe = false;
  SlotId slot = kNoSlot;
  BlockHeader header = {};
  uint32_t first_layer = 0, num_layers = 0;
  std::byte* host_slot = nullptr;
  uint64_t tag = 0;
  bool reread = false;  // a failed read gets one more chance
  bool late = false;    // the caller knows
  uint8_t tries = 0;
  int64_t deadline_ns = 0;  // from the start, and anew from when the engine got it

  bool has_header() const { return kind == IoOp::kRead && first_layer == 0 && !probe; }

  IoRequest Request(const KvLayout& layout, uint64_t request_tag) const {
    if (probe) return {kind, kScratchOffset, host_slot, kPage, request_tag};
    uint64_t begin = layout.host_slice_offset(first_layer);
    uint64_t size = num_layers * layout.slice_stride();
    if (first_layer == 0) {  // the header page lies in front of the first layer
      begin = 0;
      size += KvLayout::kHeaderBytes;
    }
    const uint64_t offset = kFirstSlot + slot * layout.host_slot_bytes() + begin;
    return {kind, offset, host_slot + begin, static_cast<uint32_t>(size), request_tag};
  }

  std::string Where() const {
    if (probe) return "probing the disk";
    return std::string(kind == IoOp::kRead ? "reading" : "writing") + " slot " +
           std::to_string(slot);
  }
};

}  // namespace cachedattn
