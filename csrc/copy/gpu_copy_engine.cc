// Copies in batches, each behind a mark that tells when it has ended.
#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <thread>

#include "csrc/base/check.h"
#include "csrc/base/kv_layout.h"
#include "csrc/copy/gpu.h"

namespace cachedattn {

namespace {

// Sums of leaves under way, of 2 GiB of slices. The longest slice finds room in one piece wherever
// the ring's beginning is.
constexpr uint64_t kRingSums = uint64_t{1} << 19;
static_assert(kRingSums >= 2 * NumLeaves(KvLayout::kMaxSlotBytes));

class GpuCopyEngine final : public CopyEngine {
 public:
  GpuCopyEngine(Gpu* gpu, std::unique_ptr<Slab> leaf_sums)
      : gpu_(gpu), leaf_sums_(std::move(leaf_sums)) {}
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
      Batch batch;
      const std::span<const CopyRequest> copies = WithRoomForSums(lane.pending, &batch);
      if (copies.empty()) continue;
      const auto queue = static_cast<Gpu::Queue>(stream);
      if (!batch.leaf_sums.empty()) gpu_->Sum(copies, batch.leaf_sums);
      if (stream == CopyStream::kSave || places_changed_) {
        const Gpu::Mark computed = gpu_->Record(Gpu::Queue::kCompute);
        gpu_->Wait(queue, computed);
        gpu_->Forget(computed);
        if (stream == CopyStream::kLoad) places_changed_ = false;
      }
      gpu_->Copy(queue, copies);
      batch.mark = gpu_->Record(queue);
      batch.copies.assign(copies.begin(), copies.end());
      lane.pending.erase(lane.pending.begin(), lane.pending.begin() + batch.copies.size());
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
  bool takes_sums() const override { return true; }

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
    Gpu::Mark mark = 0;
    std::vector<CopyRequest> copies;
    std::vector<uint64_t*> leaf_sums;  // of each copy; empty: no sums are wanted
    uint64_t sums_end = 0;
    uint64_t last_tag() const { return copies.back().tag; }
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

  // The first of `copies`, as many as find room for the sums of their leaves.
  std::span<const CopyRequest> WithRoomForSums(std::span<const CopyRequest> copies, Batch* batch) {
    if (copies.empty() || copies.front().sum == nullptr) return copies;
    for (const CopyRequest& copy : copies) {
      uint64_t* const place = TakeSums(NumLeaves(copy.rows.size));
      if (place == nullptr) break;
      batch->leaf_sums.push_back(place);
    }
    batch->sums_end = sums_end_;
    return copies.first(batch->leaf_sums.size());
  }

  // From a ring, in one piece; nullptr: batches that are under way have it.
  uint64_t* TakeSums(uint64_t count) {
    auto* const ring = reinterpret_cast<uint64_t*>(leaf_sums_->bytes().data());
    const uint64_t at = sums_end_ % kRingSums;
    const uint64_t skipped = at + count > kRingSums ? kRingSums - at : 0;
    if (sums_end_ + skipped + count - sums_begin_ > kRingSums) return nullptr;
    sums_end_ += skipped + count;
    return ring + (sums_end_ - count) % kRingSums;
  }

  void FinishSums(const Batch& batch) {
    if (batch.leaf_sums.empty()) return;
    for (size_t i = 0; i < batch.copies.size(); ++i) {
      const CopyRequest& copy = batch.copies[i];
      *copy.sum = SumOfLeaves({batch.leaf_sums[i], NumLeaves(copy.rows.size)});
    }
    sums_begin_ = batch.sums_end;
  }

  bool Collect(std::vector<uint64_t>* tags) {
    const uint32_t before = in_flight_;
    for (Lane& lane : lanes_) {
      while (!lane.batches.empty() && gpu_->Reached(lane.batches.front().mark)) {
        const Batch& batch = lane.batches.front();
        gpu_->Forget(batch.mark);
        FinishSums(batch);
        for (const CopyRequest& copy : batch.copies) tags->push_back(copy.tag);
        in_flight_ -= static_cast<uint32_t>(batch.copies.size());
        lane.batches.pop_front();
      }
    }
    return in_flight_ != before;
  }

  Gpu* const gpu_;
  const std::unique_ptr<Slab> leaf_sums_;
  uint64_t sums_begin_ = 0, sums_end_ = 0;  // what batches under way have of it, counted on
  Lane lanes_[2];
  bool places_changed_ = false;
  std::optional<uint64_t> computed_after_;  // the last load that the computing waits for
  uint32_t in_flight_ = 0;
  Gpu::Mark stall_begin_ = 0;
  std::deque<Stall> stalls_;  // in the order of their ends
};

}  // namespace

Result<std::unique_ptr<CopyEngine>> NewGpuCopyEngine(Gpu* gpu) {
  auto leaf_sums = gpu->AllocateHost(kRingSums * sizeof(uint64_t));
  if (!leaf_sums.ok()) return leaf_sums.status();
  return std::unique_ptr<CopyEngine>(
      std::make_unique<GpuCopyEngine>(gpu, std::move(leaf_sums.value())));
}

}  // namespace cachedattn
