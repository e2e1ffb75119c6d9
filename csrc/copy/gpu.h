// Gpu: a GPU as the store sees it: its memory, and three queues of work that each run in order.
//
// Only the destructor waits. An error of a call that cannot fail in use, such as a copy's, is that
// of a broken GPU: it ends the process with a message.
#pragma once

#include <memory>
#include <span>

#include "csrc/base/slab.h"
#include "csrc/copy/copy_engine.h"

namespace cachedattn {

class Gpu {
 public:
  enum class Queue : uint8_t { kLoad = 0, kSave = 1, kCompute = 2 };  // as CopyStream, and one more
  static constexpr uint32_t kNumQueues = 3;
  using Mark = uint32_t;

  virtual ~Gpu() = default;  // waits for what is in kLoad and kSave

  virtual Result<std::unique_ptr<Slab>> Allocate(uint64_t bytes) = 0;

  // Memory of this process that kCompute writes to.
  virtual Result<std::unique_ptr<Slab>> AllocateHost(uint64_t bytes) = 0;

  // Makes host memory one that copies do not stage. From any thread; nothing else is.
  virtual Status Pin(std::span<std::byte> host) = 0;
  virtual void Unpin(std::span<std::byte> host) = 0;

  // Whose work kCompute stands for from now on: a cudaStream_t.
  virtual void SetCompute(void* stream) = 0;

  virtual void Copy(Queue queue, std::span<const CopyRequest> copies) = 0;
  // In kCompute: the sums of the leaves of each `source` (slice_sum.h), to leaf_sums[i], memory of
  // AllocateHost.
  virtual void Sum(std::span<const CopyRequest> copies, std::span<uint64_t* const> leaf_sums) = 0;
  // The end of what `queue` holds by now. It is kept until Forget.
  virtual Mark Record(Queue queue) = 0;
  // What `queue` gets from now on runs after `mark`.
  virtual void Wait(Queue queue, Mark mark) = 0;
  virtual bool Reached(Mark mark) = 0;
  // A mark in kCompute that knows when it was reached; from one to the other, of two that were.
  virtual Mark RecordTime() = 0;
  virtual int64_t NsBetween(Mark first, Mark last) = 0;
  // Waits that were asked for stand.
  virtual void Forget(Mark mark) = 0;
};

// kInvalidArgument: there is no such GPU, or no CUDA in this build.
Result<std::unique_ptr<Gpu>> OpenCudaGpu(uint32_t index);

// Copies on the kLoad and kSave queues of `gpu`, which outlives the engine. Errors are those of
// AllocateHost.
Result<std::unique_ptr<CopyEngine>> NewGpuCopyEngine(Gpu* gpu);

}  // namespace cachedattn
