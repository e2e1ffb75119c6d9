// SimCopyEngine: copies between DRAM and a device in virtual time. Each stream keeps its order; the
// bytes of a copy move at random moments between its start and its end, in two pieces. Where free
// places hold poison, none is ever copied from.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "csrc/base/check.h"
#include "csrc/copy/copy_engine.h"
#include "tests/native/testing/sim_disk.h"

namespace cachedattn {

class SimCopyEngine final : public CopyEngine {
 public:
  SimCopyEngine(SimClock* clock, uint64_t seed) : clock_(clock), random_(seed) {}
  ~SimCopyEngine() override {
    for (Stream& stream : streams_) {
      for (Active& active : stream.queue) Move(&active, active.request.size);
    }
  }

  void Enqueue(const CopyRequest& request) override {
    Stream& stream = streams_[static_cast<int>(request.stream)];
    // From 1 us to 128 us, after what is before it.
    const int64_t takes = static_cast<int64_t>(random_.Scale(7)) * 1000;
    Active active{request, std::max(stream.free_ns, clock_->NowNs()) + takes, 0};
    stream.free_ns = active.end_ns;
    if (stream.queue.empty() && random_.OneIn(2))
      Move(&active, request.size * random_.Below(5) / 4);
    stream.queue.push_back(active);
    ++in_flight_;
  }

  void Poll(std::vector<uint64_t>* tags, int64_t timeout_us) override {
    if (in_flight_ == 0) return;
    clock_->Advance(1 + random_.Below(4000));
    if (Collect(tags) || timeout_us == 0) return;
    int64_t next = clock_->NowNs() + timeout_us * 1000;
    for (const Stream& stream : streams_) {
      if (!stream.queue.empty()) next = std::min(next, stream.queue.front().end_ns);
    }
    clock_->AdvanceTo(next);
    Collect(tags);
  }

  uint32_t in_flight() const override { return in_flight_; }

 private:
  struct Active {
    CopyRequest request;
    int64_t end_ns = 0;
    uint64_t moved = 0;
  };
  struct Stream {
    std::deque<Active> queue;
    int64_t free_ns = 0;
  };

  // A slice begins with a token's K, and no token's K here begins with so many ones.
  static bool IsPoison(const std::byte* slice) {
    return std::all_of(slice, slice + 32, [](std::byte b) { return b == std::byte{0xFF}; });
  }

  static void Move(Active* active, uint64_t end) {
    const CopyRequest& request = active->request;
    CA_CHECK(!IsPoison(request.source));  // else the place was given back meanwhile
    std::memcpy(request.target + active->moved, request.source + active->moved,
                end - active->moved);
    active->moved = end;
  }

  bool Collect(std::vector<uint64_t>* tags) {
    const uint32_t before = in_flight_;
    for (Stream& stream : streams_) {
      while (!stream.queue.empty() && stream.queue.front().end_ns <= clock_->NowNs()) {
        Move(&stream.queue.front(), stream.queue.front().request.size);
        tags->push_back(stream.queue.front().request.tag);
        stream.queue.pop_front();
        --in_flight_;
      }
    }
    return in_flight_ != before;
  }

  SimClock* const clock_;
  SimRandom random_;
  Stream streams_[2];
  uint32_t in_flight_ = 0;
};

}  // namespace cachedattn
