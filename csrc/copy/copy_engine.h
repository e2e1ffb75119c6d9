// CopyEngine: asynchronous copies between DRAM and a device, in order on one of two streams.
//
// The store's control thread enqueues copies and reads finished tags. HostCopyEngine moves real
// bytes with one worker thread a stream, so the three-tier path runs without a GPU (design D9).
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "csrc/base/slice_sum.h"

namespace cachedattn {

enum class CopyStream : uint8_t { kLoad = 0, kSave = 1 };  // DRAM -> device, device -> DRAM

// What of a source its sum is taken of: `size` bytes, in rows of which the first `used_bytes` count
// and the others are taken for zero. All are multiples of 8.
struct SumRows {
  uint32_t size = 0, row_bytes = 0, used_bytes = 0;
};

struct CopyRequest {
  CopyStream stream = CopyStream::kLoad;
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  uint64_t size = 0;
  uint64_t tag = 0;  // of the copies on one stream, each is larger than the one before
  // Where the sum of what is computed goes, before the tag does; nullptr: nowhere. REQUIRES:
  // takes_sums(), a save.
  SliceSum* sum = nullptr;
  SumRows rows{};
};

class CopyEngine {
 public:
  virtual ~CopyEngine() = default;  // waits for what is in flight

  virtual void Enqueue(const CopyRequest& request) = 0;
  // Hands over what was enqueued, at the latest: an engine may do many at once.
  virtual void Submit() {}

  // Appends the tags of finished copies, in order per stream. Waits up to `timeout_us` for the
  // first one when none is finished (0: does not wait).
  virtual void Poll(std::vector<uint64_t>* tags, int64_t timeout_us) = 0;

  virtual uint32_t in_flight() const = 0;

  // False: a model that takes time alone. Memory that nobody writes is never taken.
  virtual bool moves_bytes() const { return true; }

  // Loads to have in flight: enough to keep the stream busy, few enough that a lower layer that
  // arrives late does not wait behind many higher ones.
  virtual uint32_t load_depth() const { return 16; }

  // The rest is for devices that compute on their own, after the host has told them to.

  // Whether computing that is started from now on sees what the load `tag` brings. Else the host
  // waits until the load has finished. REQUIRES: submitted.
  virtual bool OrderComputeAfter(uint64_t /*tag*/) { return false; }
  // Loads that are enqueued from now on run after the computing that was started by now: places
  // have changed hands. Saves always do.
  virtual void OrderLoadsAfterCompute() {}
  virtual bool computes_alone() const { return false; }
  // Whether sums are taken in the order of the computing: before a copy that came too early.
  virtual bool takes_sums() const { return false; }
  // The computing that is started between the two has only waited: `found` is told for how long,
  // by a Poll when it has run. REQUIRES: computes_alone().
  virtual void BeginStall() {}
  virtual void EndStall(std::function<void(int64_t ns)> /*found*/) {}
};

std::unique_ptr<CopyEngine> NewHostCopyEngine();
// Copies in the calling thread, so that the same calls see the same completions: for tests.
std::unique_ptr<CopyEngine> NewInlineCopyEngine();

}  // namespace cachedattn
