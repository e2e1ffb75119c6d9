// IoQueue: requests that wait until an engine has room for them, first come, first served.
//
// A disk may report all that it was given as finished at once. What waits here by then goes to it
// before the finished bytes are looked at, so that it works meanwhile.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "csrc/io/io_engine.h"

namespace cachedattn {

class IoQueue {
 public:
  static constexpr uint64_t kMaxBytes = 16 << 20;  // the engine gets no more while it holds this

  explicit IoQueue(IoEngine* engine) : engine_(*engine) {}

  void Push(const IoRequest& request) { waiting_.push_back(request); }

  // Hands over what the engine has room for, and says what that was.
  std::span<const IoRequest> Submit() {
    batch_.clear();
    while (!waiting_.empty() && bytes_ < kMaxBytes &&
           engine_.in_flight() + batch_.size() < engine_.depth()) {
      bytes_ += waiting_.front().size;
      batch_.push_back(waiting_.front());
      waiting_.pop_front();
    }
    if (!batch_.empty()) engine_.SubmitAll(batch_);
    return batch_;
  }

  // A request of `size` bytes that was handed over is finished, or so late that it shall take no
  // one else's room.
  void Release(uint32_t size) { bytes_ -= size; }

  // True: the request was still waiting, and is gone.
  bool Drop(uint64_t tag) {
    return std::erase_if(waiting_, [tag](const IoRequest& r) { return r.tag == tag; }) > 0;
  }

 private:
  IoEngine& engine_;
  std::deque<IoRequest> waiting_;
  std::vector<IoRequest> batch_;
  uint64_t bytes_ = 0;  // handed over and not released
};

}  // namespace cachedattn
