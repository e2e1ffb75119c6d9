// IoEngine: asynchronous reads and writes of one file (design D11).
//
// The engine sees offsets, buffers and tags only. It belongs to the store's control thread; work
// runs in the kernel (io_uring) or in worker threads (pread/pwrite) and its results are queued
// until Poll. An error is a result, never an exception.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "csrc/base/status.h"
#include "csrc/base/types.h"

namespace cachedattn {

// kSync makes finished writes durable; it has no offset, data or size.
enum class IoOp : uint8_t { kRead, kWrite, kSync };

struct IoRequest {
  IoOp op = IoOp::kRead;
  uint64_t offset = 0;        // multiple of kPage
  std::byte* data = nullptr;  // aligned to kPage; owned by the engine until the completion
  uint32_t size = 0;          // multiple of kPage
  uint64_t tag = 0;           // returned with the completion
};

struct IoCompletion {
  uint64_t tag = 0;
  int32_t result = 0;  // bytes moved (kSync: 0), or -errno. A short count is reported as it is.
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;  // waits for what is in flight

  // Starts `request`. REQUIRES: in_flight() < depth().
  virtual void Submit(const IoRequest& request) = 0;

  // The same for several at once. REQUIRES: in_flight() + requests.size() <= depth().
  virtual void SubmitAll(std::span<const IoRequest> requests) {
    for (const IoRequest& request : requests) Submit(request);
  }

  // Moves finished requests to `out` and returns how many. When none is finished, waits up to
  // `timeout_us` for the first one (0: does not wait).
  virtual size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) = 0;

  virtual uint32_t depth() const = 0;
  virtual uint32_t in_flight() const = 0;

  virtual const char* name() const = 0;        // "io_uring", "threads" or "inline"
  virtual const std::string& why() const = 0;  // what was chosen, and why not the better one
};

// kInline: each request in the calling thread. Slow; for tests (inline_engine.h).
enum class IoKind : uint8_t { kAuto = 0, kUring = 1, kThreads = 2, kInline = 3 };

struct IoOptions {
  IoKind kind = IoKind::kAuto;
  uint32_t depth = 64;            // requests in flight, 1 to 4096
  uint64_t read_bytes_per_s = 0;  // reads go no faster; 0: no limit
  // Tests put a fault-injecting engine around the real one here.
  std::function<std::unique_ptr<IoEngine>(std::unique_ptr<IoEngine>)> wrap = nullptr;

  Status Validate() const;  // kInvalidArgument
};

// Opens an engine on `fd`, which the caller keeps open until the engine is gone. kAuto takes
// io_uring and degrades to threads where it is refused; kUring fails instead.
CA_API Result<std::unique_ptr<IoEngine>> OpenIoEngine(int fd, const IoOptions& options);

}  // namespace cachedattn
