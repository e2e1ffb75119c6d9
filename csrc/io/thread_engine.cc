#include "csrc/io/thread_engine.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace cachedattn {
namespace {

// More threads gain nothing on the disks this was measured on (csrc/README.md, "I/O engines").
constexpr int kNumThreads = 4;

class ThreadEngine : public IoEngine {
 public:
  ThreadEngine(int fd, uint32_t depth, std::string why)
      : fd_(fd), depth_(depth), why_(std::move(why)) {
    finished_.reserve(depth);  // a worker must not run out of memory
  }

  ~ThreadEngine() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Not in the constructor, so that the threads of a failed start are joined.
  void Start() {
    for (int i = 0; i < kNumThreads; ++i) threads_.emplace_back([this] { Run(); });
  }

  void Submit(const IoRequest& request) override {
    CA_CHECK(in_flight_ < depth_);
    ++in_flight_;
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(request);
    }
    work_.notify_one();
  }

  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override {
    if (in_flight_ == 0 || out.empty()) return 0;
    std::unique_lock lock(mutex_);
    if (finished_.empty() && timeout_us > 0) {
      done_.wait_for(lock, std::chrono::microseconds(timeout_us),
                     [this] { return !finished_.empty(); });
    }
    const size_t count = std::min(out.size(), finished_.size());
    std::copy_n(finished_.begin(), count, out.begin());
    finished_.erase(finished_.begin(), finished_.begin() + count);
    in_flight_ -= static_cast<uint32_t>(count);
    return count;
  }

  uint32_t depth() const override { return depth_; }
  uint32_t in_flight() const override { return in_flight_; }
  const char* name() const override { return "threads"; }
  const std::string& why() const override { return why_; }

 private:
  // A worker: ends when the engine stops and the queue is empty.
  void Run() {
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const IoRequest request = queue_.front();
      queue_.pop_front();
      lock.unlock();
      const int32_t result = Execute(fd_, request);
      lock.lock();
      finished_.push_back({request.tag, result});
      done_.notify_one();
    }
  }

  const int fd_;
  const uint32_t depth_;
  const std::string why_;
  uint32_t in_flight_ = 0;  // of the control thread

  std::mutex mutex_;  // guards what follows
  std::condition_variable work_, done_;
  std::deque<IoRequest> queue_;
  std::vector<IoCompletion> finished_;
  bool stopping_ = false;

  std::vector<std::thread> threads_;
};

}  // namespace

int32_t Execute(int fd, const IoRequest& request) {
  const off_t offset = static_cast<off_t>(request.offset);
  ssize_t moved;
  do {
    moved = request.op == IoOp::kSync   ? ::fdatasync(fd)
            : request.op == IoOp::kRead ? ::pread(fd, request.data, request.size, offset)
                                        : ::pwrite(fd, request.data, request.size, offset);
  } while (moved < 0 && errno == EINTR);
  return static_cast<int32_t>(moved < 0 ? -errno : moved);
}

Result<std::unique_ptr<IoEngine>> OpenThreadEngine(int fd, const IoOptions& options,
                                                   std::string why) {
  auto engine = std::make_unique<ThreadEngine>(fd, options.depth, std::move(why));
  try {
    engine->Start();
  } catch (const std::system_error& error) {
    return Status(Code::kIo, std::string("cannot start the I/O threads: ") + error.what());
  }
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace cachedattn
