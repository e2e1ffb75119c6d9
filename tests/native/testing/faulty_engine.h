// FaultyEngine: an IoEngine that breaks chosen requests of a real one.
//
//   FaultPlan plan;
//   options.io.wrap = plan.Wrap();
//   ... open, then:
//   plan.Add({.op = IoOp::kRead, .kind = FaultKind::kError});   // the next read fails
//   ... act, then: EXPECT_EQ(plan.fired(), 1u);
//
// The plan outlives the engine and belongs to the same thread.
#pragma once

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "csrc/io/io_engine.h"
#include "tests/native/testing/manual_clock.h"

namespace cachedattn {

enum class FaultKind : uint8_t {
  kError,  // completes with -error; the disk is not touched
  kShort,  // completes with half of the bytes
  kFlip,   // one bit differs: in the buffer after a read, on the disk after a write
  kHold,   // does not start before FaultPlan::Release
};

struct Fault {
  IoOp op = IoOp::kRead;
  FaultKind kind = FaultKind::kError;
  uint32_t skip = 0;       // requests of this kind that pass first
  uint32_t count = 1;      // then this many are broken
  int error = EIO;         // kError
  uint64_t flip_byte = 0;  // kFlip: which byte of the request
};

class FaultPlan {
 public:
  void Add(const Fault& fault) { faults_.push_back(fault); }
  void Clear() { faults_.clear(); }
  uint32_t fired() const { return fired_; }
  void Release() { release_ = true; }
  // Who waits while all that is left is held moves this clock instead.
  void set_clock(ManualClock* clock) { clock_ = clock; }

  // For IoOptions::wrap.
  std::function<std::unique_ptr<IoEngine>(std::unique_ptr<IoEngine>)> Wrap();

 private:
  friend class FaultyEngine;

  // The fault that this request meets, or null.
  const Fault* Next(IoOp op) {
    for (Fault& fault : faults_) {
      if (fault.op != op || fault.count == 0) continue;
      if (fault.skip > 0) {
        --fault.skip;
        continue;
      }
      --fault.count;
      ++fired_;
      return &fault;
    }
    return nullptr;
  }

  std::deque<Fault> faults_;
  uint32_t fired_ = 0;
  bool release_ = false;
  ManualClock* clock_ = nullptr;
};

class FaultyEngine : public IoEngine {
 public:
  FaultyEngine(FaultPlan* plan, std::unique_ptr<IoEngine> inner)
      : plan_(plan), inner_(std::move(inner)), active_(inner_->depth()) {}

  void Submit(const IoRequest& request) override {
    CA_CHECK(in_flight() < depth());
    uint64_t index = 0;
    while (active_[index].used) ++index;
    Active& active = active_[index];
    active = {request, true, false, false, 0, nullptr};
    ++in_flight_;
    const Fault* fault = plan_->Next(request.op);
    if (fault == nullptr) return Pass(index);
    active.flip_byte = fault->flip_byte % request.size;
    switch (fault->kind) {
      case FaultKind::kError:
        finished_.push_back({request.tag, -fault->error});
        active.used = false;
        return;
      case FaultKind::kShort:
        active.cut = true;
        return Pass(index);
      case FaultKind::kFlip:
        active.flip = true;
        return Pass(index);
      case FaultKind::kHold:
        held_.push_back(index);
        return;
    }
  }

  size_t Poll(std::span<IoCompletion> out, int64_t timeout_us) override {
    if (plan_->release_) {
      plan_->release_ = false;
      for (uint64_t index : held_) Pass(index);
      held_.clear();
    }
    size_t count = 0;
    while (count < out.size() && !finished_.empty()) {
      out[count++] = finished_.front();
      finished_.pop_front();
    }
    if (plan_->clock_ != nullptr && count == 0 && inner_->in_flight() == 0) {
      plan_->clock_->Advance(timeout_us * 1000);
      return 0;
    }
    const size_t own = count;
    count += inner_->Poll(out.subspan(own), own > 0 ? 0 : timeout_us);
    for (size_t i = own; i < count; ++i) Complete(&out[i]);
    in_flight_ -= static_cast<uint32_t>(count);
    return count;
  }

  uint32_t depth() const override { return inner_->depth(); }
  uint32_t in_flight() const override { return in_flight_; }
  const char* name() const override { return inner_->name(); }
  const std::string& why() const override { return inner_->why(); }

 private:
  struct Active {
    IoRequest request;
    bool used = false, cut = false, flip = false;
    uint64_t flip_byte = 0;
    std::shared_ptr<std::byte> copy;  // what a flipped write really writes
  };

  void Pass(uint64_t index) {
    Active& active = active_[index];
    IoRequest request = active.request;
    request.tag = index;
    if (active.flip && request.op == IoOp::kWrite) {
      auto* copy = static_cast<std::byte*>(std::aligned_alloc(kPage, request.size));
      active.copy.reset(copy, [](std::byte* data) { std::free(data); });
      std::memcpy(copy, request.data, request.size);
      copy[active.flip_byte] ^= std::byte{1};
      request.data = copy;
    }
    inner_->Submit(request);
  }

  void Complete(IoCompletion* completion) {
    Active& active = active_[completion->tag];
    if (active.flip && active.request.op == IoOp::kRead) {
      active.request.data[active.flip_byte] ^= std::byte{1};
    }
    if (active.cut) completion->result /= 2;
    completion->tag = active.request.tag;
    active = Active();
  }

  FaultPlan* const plan_;
  std::unique_ptr<IoEngine> inner_;
  std::vector<Active> active_;
  std::vector<uint64_t> held_;
  std::deque<IoCompletion> finished_;
  uint32_t in_flight_ = 0;
};

inline std::function<std::unique_ptr<IoEngine>(std::unique_ptr<IoEngine>)> FaultPlan::Wrap() {
  return [this](std::unique_ptr<IoEngine> inner) {
    return std::make_unique<FaultyEngine>(this, std::move(inner));
  };
}

}  // namespace cachedattn
