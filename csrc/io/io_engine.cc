#include "csrc/io/io_engine.h"

#include <linux/magic.h>
#include <sys/vfs.h>

#include "csrc/io/inline_engine.h"
#include "csrc/io/read_limit.h"
#include "csrc/io/thread_engine.h"
#include "csrc/io/uring_engine.h"

namespace cachedattn {
namespace {

// There the kernel waits inside io_uring_enter once a dozen requests have no answer: a daemon that
// hangs would hold the control thread.
bool IsFuse(int fd) {
  struct statfs info;
  return ::fstatfs(fd, &info) == 0 && info.f_type == FUSE_SUPER_MAGIC;
}

Result<std::unique_ptr<IoEngine>> OpenChosen(int fd, const IoOptions& options) {
  if (options.kind == IoKind::kInline) return OpenInlineEngine(fd, options);
  if (options.kind == IoKind::kThreads) {
    return OpenThreadEngine(fd, options, "pread/pwrite threads, as asked for");
  }
  if (options.kind == IoKind::kAuto && IsFuse(fd)) {
    return OpenThreadEngine(fd, options, "pread/pwrite threads; io_uring may block on FUSE");
  }
  Result<std::unique_ptr<IoEngine>> uring = OpenUringEngine(fd, options);
  if (uring.ok()) return uring;
  if (options.kind == IoKind::kUring) {
    return Status(Code::kIo, "io_uring was asked for and is refused: " + uring.status().message());
  }
  return OpenThreadEngine(fd, options,
                          "pread/pwrite threads; io_uring is refused: " + uring.status().message());
}

}  // namespace

Status IoOptions::Validate() const {
  if (depth >= 1 && depth <= 4096) return Status();
  return Status(Code::kInvalidArgument,
                "io depth is " + std::to_string(depth) + ", must be 1 to 4096");
}

Result<std::unique_ptr<IoEngine>> OpenIoEngine(int fd, const IoOptions& options) {
  Status status = options.Validate();
  if (!status.ok()) return status;
  Result<std::unique_ptr<IoEngine>> engine = OpenChosen(fd, options);
  if (!engine.ok()) return engine;
  if (options.read_bytes_per_s != 0) {
    engine = LimitReads(std::move(engine.value()), options.read_bytes_per_s);
  }
  return options.wrap ? options.wrap(std::move(engine.value())) : std::move(engine);
}

}  // namespace cachedattn
