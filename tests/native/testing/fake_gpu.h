// FakeGpu: a Gpu without one. Its memory is memory of this process that the store may not touch,
// each queue is a thread, and all work takes a random while, so that what is not ordered by a mark
// comes in the wrong order soon.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/base/check.h"
#include "csrc/base/clock.h"
#include "csrc/copy/gpu.h"
#include "tests/native/testing/sim_disk.h"

namespace cachedattn {

class FakeGpu final : public Gpu {
 public:
  explicit FakeGpu(uint64_t seed) {
    for (uint32_t i = 0; i < kNumQueues; ++i) {
      lanes_[i].thread = std::thread([this, i, seed] { Run(&lanes_[i], seed * kNumQueues + i); });
    }
  }
  ~FakeGpu() override {
    for (Lane& lane : lanes_) Push(&lane, [&lane] { lane.stopping = true; });
    for (Lane& lane : lanes_) lane.thread.join();
  }

  // Work of the framework's.
  void Compute(std::function<void()> work) { Push(&LaneOf(Queue::kCompute), std::move(work)); }
  // What `queue` gets from now on begins this much later.
  void Delay(Queue queue, std::chrono::milliseconds time) {
    Push(&LaneOf(queue), [time] { std::this_thread::sleep_for(time); });
  }
  // Waits until all of it is done.
  void Synchronize(Queue queue = Queue::kCompute) {
    const Mark mark = Record(queue);
    while (!Reached(mark)) std::this_thread::yield();
    Forget(mark);
  }
  // Waits of the computing, and of saves, for a mark that was not reached yet.
  uint32_t compute_waits() const { return LaneOf(Queue::kCompute).num_waits; }
  uint32_t save_waits() const { return LaneOf(Queue::kSave).num_waits; }

  Result<std::unique_ptr<Slab>> Allocate(uint64_t bytes) override {
    auto memory = MapHostSlab(bytes);
    if (!memory.ok()) return memory.status();
    return std::unique_ptr<Slab>(std::make_unique<DeviceSlab>(this, std::move(memory.value())));
  }
  Result<std::unique_ptr<Slab>> AllocateHost(uint64_t bytes) override { return MapHostSlab(bytes); }
  Status Pin(std::span<std::byte> host) override {
    if (fail_pin_after_ == 0) return Status(Code::kExhausted, "cannot pin more");
    --fail_pin_after_;
    pinned_ += host.size();
    return Status();
  }
  void Unpin(std::span<std::byte> host) override { pinned_ -= host.size(); }
  void SetCompute(void*) override {}

  void Copy(Queue queue, std::span<const CopyRequest> copies) override {
    std::vector<CopyRequest> batch(copies.begin(), copies.end());
    const bool spoil = queue == Queue::kSave && std::exchange(spoil_next_save_, false);
    Push(&LaneOf(queue), [batch = std::move(batch), spoil] {
      for (const CopyRequest& copy : batch) std::memcpy(copy.target, copy.source, copy.size);
      if (spoil) *batch.front().target ^= std::byte{1};
    });
  }
  void Sum(std::span<const CopyRequest> copies, std::span<uint64_t* const> leaf_sums) override {
    std::vector<CopyRequest> batch(copies.begin(), copies.end());
    std::vector<uint64_t*> sums(leaf_sums.begin(), leaf_sums.end());
    Push(&LaneOf(Queue::kCompute), [batch = std::move(batch), sums = std::move(sums)] {
      for (size_t i = 0; i < batch.size(); ++i) SumLeaves(batch[i], sums[i]);
    });
  }
  Mark Record(Queue queue) override {
    if (free_marks_.empty()) {
      free_marks_.push_back(static_cast<Mark>(marks_.size()));
      marks_.emplace_back();
    }
    const Mark mark = free_marks_.back();
    free_marks_.pop_back();
    marks_[mark] = std::make_shared<std::atomic<int64_t>>(0);
    Push(&LaneOf(queue), [reached = marks_[mark]] { *reached = SystemClock().NowNs(); });
    return mark;
  }
  Mark RecordTime() override { return Record(Queue::kCompute); }
  int64_t NsBetween(Mark first, Mark last) override { return *marks_[last] - *marks_[first]; }
  void Wait(Queue queue, Mark mark) override {
    Lane* lane = &LaneOf(queue);
    Push(lane, [lane, reached = marks_[mark]] {
      lane->num_waits += *reached == 0;
      while (*reached == 0) std::this_thread::yield();
    });
  }
  bool Reached(Mark mark) override { return *marks_[mark] != 0; }
  void Forget(Mark mark) override { free_marks_.push_back(mark); }

  uint32_t fail_pin_after_ = UINT32_MAX;  // parts
  bool spoil_next_save_ = false;  // it brings other bytes than were computed, as an early one does
  std::atomic<uint64_t> pinned_ = 0;

 private:
  struct Lane {
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<std::function<void()>> queue;  // guarded by mutex
    bool stopping = false;                    // of its thread
    std::atomic<uint32_t> num_waits = 0;
    std::thread thread;
  };

  class DeviceSlab final : public Slab {
   public:
    DeviceSlab(FakeGpu* gpu, std::unique_ptr<Slab> memory)
        : Slab(memory->bytes()), gpu_(gpu), memory_(std::move(memory)) {}
    ~DeviceSlab() override {
      for (Queue queue : {Queue::kLoad, Queue::kSave, Queue::kCompute}) gpu_->Synchronize(queue);
    }
    bool on_host() const override { return false; }
    void Fill(std::byte* at, int value, uint64_t size) override {
      gpu_->Order(Queue::kCompute, Queue::kLoad);
      gpu_->Push(&gpu_->LaneOf(Queue::kLoad), [=] { std::memset(at, value, size); });
      gpu_->Order(Queue::kLoad, Queue::kCompute);
    }

   private:
    FakeGpu* const gpu_;
    const std::unique_ptr<Slab> memory_;
  };

  static void SumLeaves(const CopyRequest& copy, uint64_t* sums) {
    const SumRows& rows = copy.rows;
    std::vector<std::byte> slice(copy.source, copy.source + rows.size);
    for (uint64_t row = 0; row < rows.size; row += rows.row_bytes) {
      std::memset(slice.data() + row + rows.used_bytes, 0, rows.row_bytes - rows.used_bytes);
    }
    for (std::span<const std::byte> left = slice; !left.empty();) {
      const auto leaf = left.first(std::min<uint64_t>(left.size(), kLeafBytes));
      *sums++ = LeafSum(leaf);
      left = left.subspan(leaf.size());
    }
  }

  Lane& LaneOf(Queue queue) { return lanes_[static_cast<int>(queue)]; }
  const Lane& LaneOf(Queue queue) const { return lanes_[static_cast<int>(queue)]; }
  void Order(Queue first, Queue second) {
    const Mark mark = Record(first);
    Wait(second, mark);
    Forget(mark);
  }

  static void Push(Lane* lane, std::function<void()> work) {
    {
      const std::lock_guard lock(lane->mutex);
      lane->queue.push_back(std::move(work));
    }
    lane->wake.notify_one();
  }

  static void Run(Lane* lane, uint64_t seed) {
    SimRandom random(seed);
    while (!lane->stopping) {
      std::unique_lock lock(lane->mutex);
      lane->wake.wait(lock, [lane] { return !lane->queue.empty(); });
      const std::function<void()> work = std::move(lane->queue.front());
      lane->queue.pop_front();
      lock.unlock();
      if (random.OneIn(4)) {
        std::this_thread::sleep_for(std::chrono::microseconds(random.Below(200)));
      }
      work();
    }
  }

  Lane lanes_[kNumQueues];
  std::vector<std::shared_ptr<std::atomic<int64_t>>> marks_;  // when each was reached; 0: not yet
  std::vector<Mark> free_marks_;
};

}  // namespace cachedattn
