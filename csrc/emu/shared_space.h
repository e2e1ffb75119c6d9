// A block's shared memory under emulation, with what is known of every byte: never written, written
// (by whom and when), on its way from an asynchronous copy, or part of an mbarrier. Every access is
// checked: bounds, alignment, unwritten bytes, and whether a barrier orders it after the write.
//
// Order is kept by vector clocks, one per warp: a barrier or mbarrier collects the clocks of those
// that arrive and hands them to those that wait; between lanes of a warp SyncWarp counts. What is
// not seen: a read that a later write of another thread overtakes. The scheduler's random choices
// are for that. Nor are clocks kept per lane: an mbarrier arrival by one lane speaks for its warp.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <source_location>
#include <vector>

namespace cachedattn::emu {

constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kMaxWarps = 32;
constexpr int kAsync = kMaxWarps;  // the clock of the asynchronous copy engine, after the warps'
using VectorClock = std::array<uint32_t, kMaxWarps + 1>;

enum class Access { kThread, kWarp, kAsyncProxy };

class SharedSpace {
 public:
  SharedSpace();
  // `bytes` of NaN-like unwritten memory.
  void Reset(int bytes, int num_warps);

  char* data() { return data_; }
  int bytes() const { return bytes_; }
  // Where `p` lies in the shared address space. Blocks do not start at 0 on a GPU either.
  uint32_t AddressOf(const void* p, const std::source_location& at);
  char* PointerTo(uint32_t address) { return data_ + (address - kFirstAddress); }

  // The current thread, its warp as one, or wgmma on behalf of the warp reads or writes. `bytes` is
  // also the alignment.
  void CheckRead(const void* p, int bytes, Access access, const std::source_location& at);
  void Write(void* p, int bytes, const std::source_location& at);
  // An asynchronous copy: from Begin to End nobody may touch the bytes. They are then the writes of
  // `thread`, or of the copy engine (kEngine).
  static constexpr int kEngine = 0xfff;
  void BeginCopy(void* p, int bytes, Access access, const std::source_location& at);
  void EndCopy(void* p, int bytes, int thread);
  // The 8 bytes at p are an mbarrier from now on; the current thread uses it.
  void SetBarrier(const void* p, const std::source_location& at);
  void CheckBarrier(const void* p, const std::source_location& at);
  // From Pin to Unpin nobody may write the 16 bytes at `address`.
  void Pin(uint32_t address) { ++pins_[(address - kFirstAddress) / 16]; }
  void Unpin(uint32_t address) { --pins_[(address - kFirstAddress) / 16]; }

  // ---- order ----

  void SyncLanes(int warp);                          // SyncWarp, or part of a barrier
  void Release(int warp, VectorClock& into);         // what the warp wrote or knows, into `into`
  void Acquire(int warp, const VectorClock& clock);  // and back
  void ReleaseEngine(VectorClock& into);
  void FenceProxy(int thread) { ++fences_[thread]; }

 private:
  enum State { kUnwritten, kWritten, kInFlight, kBarrier };
  // What is known of 2 bytes: who wrote them last, at which time of its warp's clock and after how
  // many of its calls of FenceProxyAsync.
  struct Granule {
    uint64_t clock : 32, fence : 16, thread : 12, state : 4;
    bool operator==(const Granule&) const = default;
  };
  static constexpr uint32_t kFirstAddress = 1024;

  int Offset(const void* p, int bytes, const std::source_location& at);
  // Of one granule, for CheckRead and CheckWrite.
  void CheckGranule(int i, bool reads, Access access, const std::source_location& at);
  void CheckOrder(int i, Access access, const std::source_location& at);
  void CheckGranules(int offset, int bytes, bool reads, Access access,
                     const std::source_location& at);
  void CheckWrite(int offset, int bytes, Access access, const std::source_location& at);
  void Set(int offset, int bytes, State state, int thread);

  std::unique_ptr<char[]> memory_;
  char* data_;  // aligned to 1024
  int bytes_ = 0;
  std::vector<Granule> granules_;  // of each 2 bytes
  std::vector<uint16_t> pins_;     // of each 16 bytes
  std::vector<VectorClock> clocks_;
  std::vector<uint32_t> lanes_synced_;  // of each warp, its clock at the last SyncLanes
  std::vector<uint16_t> fences_;        // of each thread, FenceProxyAsync calls
  uint32_t engine_clock_ = 0;
};

}  // namespace cachedattn::emu
