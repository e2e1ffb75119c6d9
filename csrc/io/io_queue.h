// IoQueue: requests that wait until an engine has room for them. Reads overtake writes, since
// computing waits for them, but leave writes a third of what the disk moves: DRAM waits for those.
//
// A disk may report all that it was given as finished at once. What waits here by then goes to it
// before the finished bytes are looked at, so that it works meanwhile. And it finishes the first of
// much late, so it gets little at first: the first layer of a turn is what is waited for.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "csrc/io/io_engine.h"

namespace cachedattn {

class IoQueue {
 public:
  // The engine gets no more while it holds so much, at first and later.
  static constexpr uint64_t kFirstBytes = 4 << 20, kMaxBytes = 16 << 20;

  explicit IoQueue(IoEngine* engine) : engine_(*engine) {}

  void Push(const IoRequest& request) {
    if (reads_.empty() && writes_.empty() && bytes_ == 0) limit_ = kFirstBytes;
    (request.op == IoOp::kRead ? reads_ : writes_).push_back(request);
  }

  // Hands over what the engine has room for, and says what that was.
  std::span<const IoRequest> Submit() {
    batch_.clear();
    while (!(reads_.empty() && writes_.empty()) && bytes_ < limit_ &&
           engine_.in_flight() + batch_.size() < engine_.depth()) {
      std::deque<IoRequest>* next = Next();
      bytes_ += next->front().size;
      batch_.push_back(next->front());
      next->pop_front();
    }
    if (!batch_.empty()) engine_.SubmitAll(batch_);
    return batch_;
  }

  // A request of `size` bytes that was handed over is finished, or so late that it shall take no
  // one else's room.
  void Release(uint32_t size) {
    bytes_ -= size;
    limit_ = std::min(limit_ + 2 * size, kMaxBytes);
  }

  // True: the request was still waiting, and is gone.
  bool Drop(uint64_t tag) {
    const auto dropped = [tag](const IoRequest& r) { return r.tag == tag; };
    return std::erase_if(reads_, dropped) + std::erase_if(writes_, dropped) > 0;
  }

 private:
  std::deque<IoRequest>* Next() {
    const bool write =
        reads_.empty() || (!writes_.empty() && overtaken_ >= 2 * writes_.front().size);
    overtaken_ = write || writes_.empty() ? 0 : overtaken_ + reads_.front().size;
    return write ? &writes_ : &reads_;
  }

  IoEngine& engine_;
  std::deque<IoRequest> reads_, writes_;  // that wait
  std::vector<IoRequest> batch_;
  uint64_t bytes_ = 0;      // handed over and not released
  uint64_t overtaken_ = 0;  // bytes of reads that have gone before the first write
  uint64_t limit_ = kFirstBytes;
};

}  // namespace cachedattn
