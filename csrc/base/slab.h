// Slab: a range of memory that a tier cuts into slots.
#pragma once

#include <functional>
#include <memory>
#include <span>

#include "csrc/base/status.h"
#include "csrc/base/types.h"

namespace cachedattn {

class Slab {
 public:
  virtual ~Slab() = default;  // gives the memory back

  std::span<std::byte> bytes() const { return bytes_; }
  // Whether this thread may read and write it. Else only copies and Fill do.
  virtual bool on_host() const = 0;
  // Sets `size` bytes at `at`. On a device: after the compute work that is enqueued by now.
  virtual void Fill(std::byte* at, int value, uint64_t size) = 0;
  // Core dumps are made without this memory, where the system allows that.
  virtual void LeaveOutOfDumps() {}

 protected:
  explicit Slab(std::span<std::byte> bytes) : bytes_(bytes) {}

 private:
  const std::span<std::byte> bytes_;
};

// kExhausted when there is not so much.
using AllocateSlab = std::function<Result<std::unique_ptr<Slab>>(uint64_t bytes)>;

// Memory of this process: 2 MiB-aligned, with huge pages asked for. It is taken from the system
// when it is first written, not here; kExhausted when the address space is refused.
Result<std::unique_ptr<Slab>> MapHostSlab(uint64_t bytes);

}  // namespace cachedattn
