// One worker thread a stream, each with its own queue. Every copy is a memcpy.
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "csrc/base/check.h"
#include "csrc/copy/copy_engine.h"

namespace cachedattn {

namespace {

class HostCopyEngine final : public CopyEngine {
 public:
  // Not in the constructor, so that the worker of a failed start is joined.
  void Start() {
    for (int i = 0; i < kNumStreams; ++i) {
      streams_[i].worker = std::thread([this, i] { Run(&streams_[i]); });
    }
  }

  ~HostCopyEngine() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    for (Stream& stream : streams_) stream.wake.notify_one();
    for (Stream& stream : streams_) {
      if (stream.worker.joinable()) stream.worker.join();
    }
  }

  void Enqueue(const CopyRequest& request) override {
    Stream& stream = streams_[static_cast<int>(request.stream)];
    {
      const std::lock_guard lock(mutex_);
      stream.queue.push_back(request);
      // A worker must not run out of memory.
      if (finished_.capacity() <= in_flight_) finished_.reserve(2 * in_flight_ + 16);
    }
    stream.wake.notify_one();
    ++in_flight_;
  }

  void Poll(std::vector<uint64_t>* tags, int64_t timeout_us) override {
    if (in_flight_ == 0) return;
    std::unique_lock lock(mutex_);
    if (finished_.empty() && timeout_us > 0) {
      landed_.wait_for(lock, std::chrono::microseconds(timeout_us),
                       [this] { return !finished_.empty(); });
    }
    in_flight_ -= static_cast<uint32_t>(finished_.size());
    tags->insert(tags->end(), finished_.begin(), finished_.end());
    finished_.clear();
  }

  uint32_t in_flight() const override { return in_flight_; }

 private:
  static constexpr int kNumStreams = 2;

  struct Stream {
    std::deque<CopyRequest> queue;  // guarded by mutex_
    std::condition_variable wake;
    std::thread worker;
  };

  // Finishes what is queued before it stops.
  void Run(Stream* stream) {
    std::unique_lock lock(mutex_);
    while (true) {
      stream->wake.wait(lock, [&] { return stopping_ || !stream->queue.empty(); });
      if (stream->queue.empty()) return;
      const CopyRequest request = stream->queue.front();
      stream->queue.pop_front();
      lock.unlock();
      std::memcpy(request.target, request.source, request.size);
      lock.lock();
      finished_.push_back(request.tag);
      landed_.notify_one();
    }
  }

  std::mutex mutex_;
  std::vector<uint64_t> finished_;  // guarded by mutex_
  bool stopping_ = false;           // guarded by mutex_
  std::condition_variable landed_;
  Stream streams_[kNumStreams];
  uint32_t in_flight_ = 0;  // of the control thread
};

}  // namespace

std::unique_ptr<CopyEngine> NewHostCopyEngine() {
  auto engine = std::make_unique<HostCopyEngine>();
  engine->Start();
  return engine;
}

}  // namespace cachedattn
