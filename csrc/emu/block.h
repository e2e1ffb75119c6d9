// A block of threads under emulation: its fibers, who may run, what they wait for, and its shared
// memory. The device functions (device.h, device_sm90.h) are written on it.
//
// The scheduler picks a warp at random and lets it run as far as it can, its lanes in a random
// order: where a barrier is missing, some seed runs the threads in the order that breaks.
#pragma once

#include <array>
#include <cstdarg>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "csrc/emu/fiber.h"
#include "csrc/emu/hopper.h"
#include "csrc/emu/shared_space.h"
#include "csrc/kernels/cuda/device.h"

namespace cachedattn::emu {

using cuda::Index3;
using cuda::U4;
using Location = std::source_location;

constexpr int kMaxThreads = 1024;
constexpr uint32_t kAllLanes = ~0u;

// A cp.async of a thread: the bytes that will land.
struct PendingCopy {
  char* shared;
  U4 bytes;
  int group;
};

struct Thread {
  Fiber* fiber = nullptr;
  bool started = false, ended = false, fenced = false;  // fenced: ThreadFence was called
  const char* waits_for = nullptr;                      // where it stopped; null while runnable
  Location at;
  std::vector<PendingCopy> copies;
  int open_group = 0;
};

struct Warp {
  uint32_t runnable = 0, ended = 0;  // lanes
  uint32_t order = 0;                // lanes run in the order 0 ^ order, 1 ^ order, ..
  // The collective that lanes have begun to come to.
  const char* collective = nullptr;
  uint64_t key = 0;
  uint32_t arrived = 0;  // lanes
  std::array<void*, 32> args = {};
};

// Barrier 0 (SyncThreads) to 15.
struct NamedBarrier {
  int expected = 0, arrived = 0;  // threads; 0: nobody is at it
  std::vector<int> waiting;       // warps
  VectorClock clock;
};

class Block {
 public:
  // Runs body(context) as the block's kernel. False: Error() says what went wrong.
  bool Run(void (*body)(const void*), const void* context, Index3 index, int threads,
           int shared_bytes, uint64_t seed);
  const std::string& Error() const { return error_; }

  // ---- for the device functions, which run on the current thread's fiber ----

  int thread() const { return current_; }
  int lane() const { return current_ % 32; }
  int warp_index() const { return current_ / 32; }
  int num_threads() const { return static_cast<int>(threads_.size()); }
  Index3 index() const { return index_; }
  Thread& self() { return threads_[current_]; }
  Warp& warp() { return warps_[current_ / 32]; }
  SharedSpace& shared() { return shared_; }
  HopperState& hopper() { return hopper_; }
  uint64_t Random();

  // Ends the block with an error, that of the current thread. Nothing on its stack is destroyed:
  // kernels and device functions must own no memory when they call it.
  [[noreturn]] void Fail(const Location& at, const char* format, ...)
      __attribute__((format(printf, 3, 4)));

  // Waits until some other thread calls Wake.
  void Suspend(const char* waits_for, const Location& at);
  void Wake(int thread);

  // Waits until all 32 lanes are here, with the same name and key. The last one calls
  // compute(args of the lanes), which returns whether the warp may go on; if not, WakeWarp will.
  template <typename Args, typename Compute>
  void Collective(const char* name, uint64_t key, Args& args, const Location& at, Compute compute) {
    if (!Arrive(name, key, &args, at)) return;
    if (compute(reinterpret_cast<Args* const*>(warp().args.data()))) {
      WakeWarp(warp_index());
    } else {
      SuspendWarp(name, at);
    }
  }
  void WakeWarp(int warp);

  // The warp's part of a barrier, inside a Collective: true when the barrier is complete.
  bool ArriveAtBarrier(int id, int threads, bool waits, const Location& at);

 private:
  static void ThreadMain();
  [[noreturn]] void EndThread();
  void Abandon();
  bool Arrive(const char* name, uint64_t key, void* args, const Location& at);
  void SuspendWarp(const char* waits_for, const Location& at);
  void SwitchTo(int thread, bool ends);
  // The warp and the thread to run next; -1 when none can, when all have ended.
  int PickWarp();
  int PickNext();
  [[noreturn]] void FailDeadlock();
  void Describe(int thread, const Location& at, const char* format, va_list args);

  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  Index3 index_ = {};
  int current_ = 0;
  bool failed_ = false;
  uint64_t random_ = 0;
  std::string error_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::array<NamedBarrier, 16> barriers_;
  SharedSpace shared_;
  HopperState hopper_;
};

// The block that runs; blocks of a grid run one after the other, in one host thread at a time.
extern Block block;

}  // namespace cachedattn::emu
