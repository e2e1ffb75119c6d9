#include "csrc/io/uring_engine.h"

#include <liburing.h>

#include <cerrno>
#include <system_error>

// ThreadSanitizer cannot see that a completion follows its submission through the kernel, and
// reports false races between the two sides' uses of the buffer. Tell it.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#else
static inline void __tsan_acquire(void*) {}
static inline void __tsan_release(void*) {}
#endif

namespace cachedattn {
namespace {

std::string ErrorText(int error) { return std::generic_category().message(error); }

class UringEngine : public IoEngine {
 public:
  UringEngine(int fd, uint32_t depth) : fd_(fd), depth_(depth) {}
  ~UringEngine() override;

  Status Start();
  void Submit(const IoRequest& request) override;
  void SubmitAll(std::span<const IoRequest> requests) override;
  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override;

  uint32_t depth() const override { return depth_; }
  uint32_t in_flight() const override { return in_flight_; }
  const char* name() const override { return "io_uring"; }
  const std::string& why() const override { return why_; }

 private:
  Status OpenRing();
  Status Probe();
  void Prepare(const IoRequest& request);
  size_t Reap(std::span<IoCompletion> out);
  void Wait(int64_t timeout_us);

  const int fd_;
  const uint32_t depth_;
  const std::string why_ = "io_uring";
  uint32_t in_flight_ = 0;
  io_uring ring_{};
  bool ring_open_ = false;
};

UringEngine::~UringEngine() {
  if (!ring_open_) return;
  // The kernel may still write to the callers' buffers. What it has not taken it never will.
  IoCompletion finished[16];
  while (in_flight_ > io_uring_sq_ready(&ring_)) {
    if (Reap(finished) == 0) Wait(100'000);
  }
  io_uring_queue_exit(&ring_);
}

Status UringEngine::Start() {
  Status status = OpenRing();
  return status.ok() ? Probe() : status;
}

Status UringEngine::OpenRing() {
  // COOP_TASKRUN: finished I/O does not interrupt the computing thread; TASKRUN_FLAG tells Reap
  // when to enter the kernel for it. Not SINGLE_ISSUER | DEFER_TASKRUN: they bind the ring to one
  // thread, and the last owner (a garbage collector, say) may close the store from another.
  int error =
      io_uring_queue_init(depth_, &ring_, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
  if (error == -EINVAL) error = io_uring_queue_init(depth_, &ring_, 0);  // before Linux 5.19
  if (error < 0) return Status(Code::kIo, "io_uring_setup: " + ErrorText(-error));
  ring_open_ = true;
  if ((ring_.features & IORING_FEAT_EXT_ARG) == 0) {
    return Status(Code::kIo, "io_uring of this kernel cannot wait with a timeout (Linux < 5.11)");
  }
  return Status();
}

// One empty request through the ring: a sandbox may allow the set-up and refuse the use.
Status UringEngine::Probe() {
  io_uring_prep_nop(io_uring_get_sqe(&ring_));
  int error;
  do {
    error = io_uring_submit_and_wait(&ring_, 1);
  } while (error == -EINTR);
  io_uring_cqe* cqe = nullptr;
  if (error >= 0) error = io_uring_peek_cqe(&ring_, &cqe);
  if (error < 0) return Status(Code::kIo, "io_uring_enter: " + ErrorText(-error));
  io_uring_cqe_seen(&ring_, cqe);
  return Status();
}

void UringEngine::Submit(const IoRequest& request) { SubmitAll({&request, 1}); }

void UringEngine::SubmitAll(std::span<const IoRequest> requests) {
  CA_CHECK(in_flight_ + requests.size() <= depth_);
  for (const IoRequest& request : requests) Prepare(request);
  in_flight_ += static_cast<uint32_t>(requests.size());
  __tsan_release(this);
  // EINTR, EAGAIN and EBUSY leave entries in the ring; Wait and the next Submit try again.
  (void)io_uring_submit(&ring_);
}

void UringEngine::Prepare(const IoRequest& request) {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  CA_CHECK(sqe != nullptr);  // the ring has `depth_` entries
  switch (request.op) {
    case IoOp::kRead:
      io_uring_prep_read(sqe, fd_, request.data, request.size, request.offset);
      break;
    case IoOp::kWrite:
      io_uring_prep_write(sqe, fd_, request.data, request.size, request.offset);
      break;
    case IoOp::kSync:
      io_uring_prep_fsync(sqe, fd_, IORING_FSYNC_DATASYNC);
      break;
  }
  io_uring_sqe_set_data64(sqe, request.tag);
}

size_t UringEngine::Reap(std::span<IoCompletion> out) {
  size_t count = 0;
  io_uring_cqe* cqe = nullptr;
  while (count < out.size() && io_uring_peek_cqe(&ring_, &cqe) == 0) {
    out[count++] = {io_uring_cqe_get_data64(cqe), cqe->res};
    io_uring_cqe_seen(&ring_, cqe);
  }
  if (count > 0) __tsan_acquire(this);
  in_flight_ -= static_cast<uint32_t>(count);
  return count;
}

void UringEngine::Wait(int64_t timeout_us) {
  __kernel_timespec timeout{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
  io_uring_cqe* cqe = nullptr;
  // ETIME and EINTR end the wait; the caller looks at the ring in any case.
  (void)io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &timeout, nullptr);
}

size_t UringEngine::Poll(std::span<IoCompletion> out, int64_t timeout_us) {
  if (in_flight_ == 0 || out.empty()) return 0;
  if (io_uring_sq_ready(&ring_) > 0) (void)io_uring_submit(&ring_);
  const size_t count = Reap(out);
  if (count > 0 || timeout_us <= 0) return count;
  Wait(timeout_us);
  return Reap(out);
}

}  // namespace

Result<std::unique_ptr<IoEngine>> OpenUringEngine(int fd, const IoOptions& options) {
  auto engine = std::make_unique<UringEngine>(fd, options.depth);
  Status status = engine->Start();
  if (!status.ok()) return status;
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace cachedattn
