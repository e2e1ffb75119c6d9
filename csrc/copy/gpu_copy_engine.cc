// Copies in batches, each behind a mark that tells when it has ended.
#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <thread>

#include "csrc/base/check.h"
#include "csrc/copy/gpu.h"

namespace cachedattn {

namespace {

class GpuCopyEngine final : public CopyEngine {
 public:
  explicit GpuCopyEngine(Gpu* gpu) : gpu_(gpu) {}
  ~GpuCopyEngine() override {
    Submit();
    std::vector<uint64_t> tags;
    while (in_flight_ > 0) Poll(&tags, kWaitUs);
  }

  void Enqueue(const CopyRequest& request) override {
    LaneOf(request.stream).pending.push_back(request);
    ++in_flight_;
  }

  void Submit() override {
    for (CopyStream stream : {CopyStream::kLoad, CopyStream::kSave}) {
      Lane& lane = LaneOf(stream);
      if (lane.pending.empty()) continue;
      const auto queue = static_cast<Gpu::Queue>(stream);
      if (stream == CopyStream::kSave || places_changed_) {
        const Gpu::Mark computed = gpu_->Record(Gpu::Queue::kCompute);
        gpu_->Wait(queue, computed);
        gpu_->Forget(computed);
        if (stream == CopyStream::kLoad) places_changed_ = false;
      }
      gpu_->Copy(queue, lane.pending);
      Batch batch{gpu_->Record(queue), {}};
      for (const CopyRequest& request : lane.pending) batch.tags.push_back(request.tag);
      lane.pending.clear();
      lane.batches.push_back(std::move(batch));
    }
  }

  void Poll(std::vector<uint64_t>* tags, int64_t timeout_us) override {
    Submit();
    FindStalls();
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::microseconds(timeout_us);
    while (in_flight_ > 0 && !Collect(tags) && std::chrono::steady_clock::now() < give_up) {
      std::this_thread::sleep_for(std::chrono::microseconds(kLookAgainUs));
    }
  }

  uint32_t in_flight() const override { return in_flight_; }
  uint32_t load_depth() const override { return 1024; }
  bool computes_alone() const override { return true; }

  bool OrderComputeAfter(uint64_t tag) override {
    if (computed_after_ && tag <= *computed_after_) return true;
    const std::deque<Batch>& loads = LaneOf(CopyStream::kLoad).batches;
    const auto batch = std::ranges::lower_bound(loads, tag, {}, &Batch::last_tag);
    if (batch == loads.end()) return true;  // it has ended
    gpu_->Wait(Gpu::Queue::kCompute, batch->mark);
    computed_after_ = batch->last_tag();
    return true;
  }

  void OrderLoadsAfterCompute() override { places_changed_ = true; }

  void BeginStall() override { stall_begin_ = gpu_->RecordTime(); }
  void EndStall(std::function<void(int64_t ns)> found) override {
    stalls_.push_back({stall_begin_, gpu_->RecordTime(), std::move(found)});
  }

 private:
  static constexpr int64_t kWaitUs = 10'000;
  static constexpr int64_t kLookAgainUs = 20;

  struct Batch {
    Gpu::Mark mark;
    std::vector<uint64_t> tags;
    uint64_t last_tag() const { return tags.back(); }
  };
  struct Lane {
    std::vector<CopyRequest> pending;  // to be submitted
    std::deque<Batch> batches;         // in the order of their ends
  };

  struct Stall {
    Gpu::Mark begin, end;
    std::function<void(int64_t ns)> found;
  };

  void FindStalls() {
    for (; !stalls_.empty() && gpu_->Reached(stalls_.front().end); stalls_.pop_front()) {
      const Stall& stall = stalls_.front();
      stall.found(gpu_->NsBetween(stall.begin, stall.end));
      gpu_->Forget(stall.begin);
      gpu_->Forget(stall.end);
    }
  }

  Lane& LaneOf(CopyStream stream) { return lanes_[static_cast<int>(stream)]; }

  bool Collect(std::vector<uint64_t>* tags) {
    const uint32_t before = in_flight_;
    for (Lane& lane : lanes_) {
      while (!lane.batches.empty() && gpu_->Reached(lane.batches.front().mark)) {
        const Batch& batch = lane.batches.front();
        gpu_->Forget(batch.mark);
        tags->insert(tags->end(), batch.tags.begin(), batch.tags.end());
        in_flight_ -= static_cast<uint32_t>(batch.tags.size());
        lane.batches.pop_front();
      }
    }
    return in_flight_ != before;
  }

  Gpu* const gpu_;
  Lane lanes_[2];
  bool places_changed_ = false;
  std::optional<uint64_t> computed_after_;  // the last load that the computing waits for
  uint32_t in_flight_ = 0;
  Gpu::Mark stall_begin_ = 0;
  std::deque<Stall> stalls_;  // in the order of their ends
};

}  // namespace

std::unique_ptr<CopyEngine> NewGpuCopyEngine(Gpu* gpu) {
  return std::make_unique<GpuCopyEngine>(gpu);
}

}  // namespace cachedattn
