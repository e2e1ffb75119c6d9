// The state of a block's mbarriers, TMA loads and wgmma operations.
#pragma once

#include <array>
#include <cstdint>
#include <source_location>
#include <vector>

#include "csrc/emu/device_sm90.h"
#include "csrc/emu/shared_space.h"

namespace cachedattn::emu {

// The 128-byte swizzle of an address: its bits 7 to 9 are added, without carry, to bits 4 to 6.
constexpr uint32_t Swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct Mbarrier {
  const uint64_t* place;
  int arrivals;    // that end a phase
  int left;        // of the phase that runs
  int64_t bytes;   // expected and not landed; below 0 where they landed first
  uint32_t phase;  // phases that have ended
  int owner;       // the thread that initialised it
  bool fenced;
  VectorClock open, ended;   // of arrivals of this phase; of the last one that ended
  std::vector<int> waiting;  // threads
};

struct TensorCopy {
  char* shared;
  cuda::TensorMap map;  // the kernel's parameter outlives its threads on a GPU
  uint64_t* barrier;
  std::array<int, 5> at;
};

// The sums of wgmma operations under way, in a warp: where they are to land, and what they are.
struct Sums {
  std::array<float*, 32> places;
  int n;
  int group;                  // the last that adds to them
  std::vector<float> values;  // [16, n]
};
// 16 bytes of shared memory that a wgmma under way reads.
struct ReadChunk {
  uint32_t address;
  int group;
};
struct WgmmaWarp {
  std::vector<Sums> sums;
  std::vector<ReadChunk> reads;
  int open_group = 0;
  bool fenced = false;
  size_t calls = 0;  // of the warpgroup's functions
};
struct Warpgroup {
  // What its warps called, in order: all must call the same.
  struct Call {
    const char* name;
    uint64_t first, second;
    bool operator==(const Call&) const = default;
  };
  std::vector<Call> calls;
  int registers = 0;  // a thread, where SetRegisters was called
};

struct HopperState {
  void Reset(int num_warps);
  // Lands one of the loads under way, if there is one.
  bool Progress();
  // Fails if something is under way, or warps of a warpgroup called different functions.
  void CheckEnd();

  Mbarrier& Find(const uint64_t* place, const std::source_location& at);
  void EndPhaseIfDone(Mbarrier& barrier);

  std::vector<Mbarrier> barriers;
  std::vector<TensorCopy> copies;
  std::vector<WgmmaWarp> warps;
  std::vector<Warpgroup> groups;
};

}  // namespace cachedattn::emu
