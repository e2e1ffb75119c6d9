// CopyEngine: asynchronous copies between DRAM and a device, in order on one of two streams.
//
// The store's control thread enqueues copies and reads finished tags. HostCopyEngine moves real
// bytes with one worker thread a stream, so the three-tier path runs without a GPU (design D9).
#pragma once

#include <memory>
#include <vector>

#include "csrc/base/types.h"

namespace cachedattn {

enum class CopyStream : uint8_t { kLoad = 0, kSave = 1 };  // DRAM -> device, device -> DRAM

struct CopyRequest {
  CopyStream stream = CopyStream::kLoad;
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  uint64_t size = 0;
  uint64_t tag = 0;
};

class CopyEngine {
 public:
  virtual ~CopyEngine() = default;  // waits for what is in flight

  virtual void Enqueue(const CopyRequest& request) = 0;

  // Appends the tags of finished copies, in order per stream. Waits up to `timeout_us` for the
  // first one when none is finished (0: does not wait).
  virtual void Poll(std::vector<uint64_t>* tags, int64_t timeout_us) = 0;

  virtual uint32_t in_flight() const = 0;

  // False: a model that takes time alone. Memory that nobody writes is never taken.
  virtual bool moves_bytes() const { return true; }
};

std::unique_ptr<CopyEngine> NewHostCopyEngine();

}  // namespace cachedattn
