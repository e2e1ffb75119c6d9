#include "csrc/io/read_limit.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <thread>

#include "csrc/base/clock.h"

namespace cachedattn {
namespace {

class ReadLimitEngine final : public IoEngine {
 public:
  ReadLimitEngine(std::unique_ptr<IoEngine> inner, uint64_t bytes_per_s)
      : inner_(std::move(inner)), bytes_per_s_(static_cast<double>(bytes_per_s)) {}

  void Submit(const IoRequest& request) override {
    CA_CHECK(in_flight() < depth());
    if (request.op != IoOp::kRead) return inner_->Submit(request);
    const auto takes_ns = static_cast<int64_t>(1e9 * request.size / bytes_per_s_);
    free_ns_ = std::max(free_ns_, SystemClock().NowNs()) + takes_ns;
    waiting_.push_back({request, free_ns_});
  }

  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override {
    const int64_t end_ns = SystemClock().NowNs() + timeout_us * 1000;
    while (true) {
      const int64_t now_ns = SystemClock().NowNs();
      for (; !waiting_.empty() && waiting_.front().due_ns <= now_ns; waiting_.pop_front()) {
        inner_->Submit(waiting_.front().request);
      }
      const int64_t until_ns =
          waiting_.empty() ? end_ns : std::min(end_ns, waiting_.front().due_ns);
      const int64_t wait_us = std::max<int64_t>((until_ns - now_ns + 999) / 1000, 0);
      const size_t count = inner_->Poll(out, wait_us);
      if (count > 0 || now_ns >= end_ns || in_flight() == 0) return count;
      if (inner_->in_flight() == 0) std::this_thread::sleep_for(std::chrono::microseconds(wait_us));
    }
  }

  uint32_t depth() const override { return inner_->depth(); }
  uint32_t in_flight() const override {
    return inner_->in_flight() + static_cast<uint32_t>(waiting_.size());
  }
  const char* name() const override { return inner_->name(); }
  const std::string& why() const override { return inner_->why(); }

 private:
  struct Waiting {
    IoRequest request;
    int64_t due_ns = 0;
  };

  std::unique_ptr<IoEngine> inner_;
  const double bytes_per_s_;
  std::deque<Waiting> waiting_;
  int64_t free_ns_ = 0;  // when all that waits has gone
};

}  // namespace

std::unique_ptr<IoEngine> LimitReads(std::unique_ptr<IoEngine> inner, uint64_t bytes_per_s) {
  return std::make_unique<ReadLimitEngine>(std::move(inner), bytes_per_s);
}

}  // namespace cachedattn
