#include "csrc/io/read_limit.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <unordered_map>

#include "csrc/base/clock.h"

namespace cachedattn {
namespace {

class ReadLimitEngine final : public IoEngine {
 public:
  ReadLimitEngine(std::unique_ptr<IoEngine> inner, uint64_t bytes_per_s)
      : inner_(std::move(inner)), bytes_per_s_(static_cast<double>(bytes_per_s)) {}

  void Submit(const IoRequest& request) override {
    if (request.op == IoOp::kRead) {
      const auto takes_ns = static_cast<int64_t>(1e9 * request.size / bytes_per_s_);
      free_ns_ = std::max(free_ns_, SystemClock().NowNs()) + takes_ns;
      due_ns_.emplace(request.tag, free_ns_);
    }
    inner_->Submit(request);
  }

  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override {
    const int64_t end_ns = SystemClock().NowNs() + timeout_us * 1000;
    for (bool waited = false;; waited = true) {
      const int64_t now_ns = SystemClock().NowNs();
      const int64_t until_ns = held_.empty() ? end_ns : std::min(end_ns, held_.begin()->first);
      const int64_t wait_us = waited ? std::max<int64_t>((until_ns - now_ns + 999) / 1000, 0) : 0;
      size_t count = 0;
      if (inner_->in_flight() > 0) {
        count = Hold(out.first(inner_->Poll(out, wait_us)));
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(wait_us));
      }
      const int64_t then_ns = SystemClock().NowNs();
      for (; count < out.size() && !held_.empty() && held_.begin()->first <= then_ns;) {
        out[count++] = held_.extract(held_.begin()).mapped();
      }
      if (count > 0 || then_ns >= end_ns || in_flight() == 0) return count;
    }
  }

  uint32_t depth() const override { return inner_->depth(); }
  uint32_t in_flight() const override {
    return inner_->in_flight() + static_cast<uint32_t>(held_.size());
  }
  const char* name() const override { return inner_->name(); }
  const std::string& why() const override { return inner_->why(); }

 private:
  // Takes the reads out of `done` until they are due; how many others are left, in front.
  size_t Hold(std::span<IoCompletion> done) {
    size_t count = 0;
    for (const IoCompletion& completion : done) {
      const auto due = due_ns_.find(completion.tag);
      if (due == due_ns_.end()) {
        done[count++] = completion;
      } else {
        held_.emplace(due->second, completion);
        due_ns_.erase(due);
      }
    }
    return count;
  }

  std::unique_ptr<IoEngine> inner_;
  const double bytes_per_s_;
  std::unordered_map<uint64_t, int64_t> due_ns_;  // of reads in `inner_`, by tag
  std::multimap<int64_t, IoCompletion> held_;     // read, and not due yet
  int64_t free_ns_ = 0;                           // when all that was submitted is due
};

}  // namespace

std::unique_ptr<IoEngine> LimitReads(std::unique_ptr<IoEngine> inner, uint64_t bytes_per_s) {
  return std::make_unique<ReadLimitEngine>(std::move(inner), bytes_per_s);
}

}  // namespace cachedattn
