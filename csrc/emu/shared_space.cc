#include "csrc/emu/shared_space.h"

#include <algorithm>
#include <cstring>

#include "csrc/emu/block.h"

namespace cachedattn::emu {

SharedSpace::SharedSpace() : memory_(new char[kMaxSharedBytes + 1024]) {
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  data_ = memory_.get() + (1024 - address % 1024) % 1024;
}

void SharedSpace::Reset(int bytes, int num_warps) {
  bytes_ = bytes;
  std::memset(data_, 0xff, bytes);  // NaN in every type
  granules_.assign(bytes / 2, {});
  clocks_.assign(num_warps, {});
  lanes_synced_.assign(num_warps, 0);
  pins_.assign((bytes + 15) / 16, 0);
  fences_.assign(num_warps * 32, 0);
  engine_clock_ = 0;
}

uint32_t SharedSpace::AddressOf(const void* p, const Location& at) {
  return kFirstAddress + Offset(p, 1, at);
}

int SharedSpace::Offset(const void* p, int bytes, const Location& at) {
  const intptr_t offset = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(data_);
  if (offset < 0 || offset > bytes_ - bytes) {
    block.Fail(at, "%d bytes at shared memory + %td are out of bounds: the block has %d", bytes,
               offset, bytes_);
  }
  if ((offset & (bytes - 1)) != 0) {
    block.Fail(at, "%d bytes at shared memory + %td are misaligned", bytes, offset);
  }
  return static_cast<int>(offset);
}

void SharedSpace::CheckGranule(int i, bool reads, Access access, const Location& at) {
  const Granule& granule = granules_[i];
  if (reads ? granule.state != kWritten : granule.state > kWritten) {
    constexpr const char* kNames[] = {"uninitialised memory", "written bytes",
                                      "bytes of a copy that is still under way", "an mbarrier"};
    block.Fail(at, "%s of %s, at shared memory + %d", reads ? "read" : "write",
               kNames[granule.state], 2 * i);
  }
  if (granule.state == kUnwritten) return;
  CheckOrder(i, access, at);
  // Did the writer call FenceProxyAsync, where its ordinary write meets an asynchronous access?
  if (access == Access::kAsyncProxy && granule.thread != kEngine &&
      granule.fence == fences_[granule.thread]) {
    block.Fail(at, "shared memory + %d was written by thread %d, without FenceProxyAsync since",
               2 * i, static_cast<int>(granule.thread));
  }
}

// Does something order this access after the last write, where another thread made it?
void SharedSpace::CheckOrder(int i, Access access, const Location& at) {
  const Granule& granule = granules_[i];
  const int writer = granule.thread, warp = block.warp_index();
  if (access == Access::kThread && writer == block.thread()) return;
  const int source = writer == kEngine ? kAsync : writer / 32;
  const uint32_t known = source == warp ? lanes_synced_[warp] : clocks_[warp][source];
  if (known > granule.clock) return;
  if (source == kAsync) {
    block.Fail(at, "race: shared memory + %d was written by a TMA load that was not waited for",
               2 * i);
  }
  block.Fail(at, "race: shared memory + %d was written by thread %d with no barrier since", 2 * i,
             writer);
}

void SharedSpace::CheckGranules(int offset, int bytes, bool reads, Access access,
                                const Location& at) {
  const int begin = offset / 2, end = (offset + bytes) / 2;
  CheckGranule(begin, reads, access, at);
  for (int i = begin + 1; i < end; ++i) {
    if (granules_[i] != granules_[i - 1]) CheckGranule(i, reads, access, at);
  }
}

void SharedSpace::CheckRead(const void* p, int bytes, Access access, const Location& at) {
  CheckGranules(Offset(p, bytes, at), bytes, true, access, at);
}

void SharedSpace::CheckWrite(int offset, int bytes, Access access, const Location& at) {
  CheckGranules(offset, bytes, false, access, at);
  for (int i = offset / 16; i <= (offset + bytes - 1) / 16; ++i) {
    if (pins_[i] > 0) {
      block.Fail(at, "write to shared memory + %d, which a wgmma under way reads", 16 * i);
    }
  }
}

void SharedSpace::Set(int offset, int bytes, State state, int thread) {
  Granule granule = {engine_clock_, 0, static_cast<uint64_t>(thread), state};
  if (thread != kEngine) {
    granule.fence = fences_[thread];
    granule.clock = clocks_[thread / 32][thread / 32];
  }
  std::fill_n(&granules_[offset / 2], bytes / 2, granule);
}

void SharedSpace::Write(void* p, int bytes, const Location& at) {
  const int offset = Offset(p, bytes, at);
  CheckWrite(offset, bytes, Access::kThread, at);
  Set(offset, bytes, kWritten, block.thread());
}

void SharedSpace::BeginCopy(void* p, int bytes, Access access, const Location& at) {
  const int offset = Offset(p, bytes, at);
  CheckWrite(offset, bytes, access, at);
  Set(offset, bytes, kInFlight, block.thread());
}

void SharedSpace::EndCopy(void* p, int bytes, int thread) {
  Set(static_cast<int>(static_cast<char*>(p) - data_), bytes, kWritten, thread);
}

void SharedSpace::SetBarrier(const void* p, const Location& at) {
  const int offset = Offset(p, 8, at);
  CheckWrite(offset, 8, Access::kThread, at);
  Set(offset, 8, kBarrier, block.thread());
}

void SharedSpace::CheckBarrier(const void* p, const Location& at) {
  CheckOrder(Offset(p, 8, at) / 2, Access::kThread, at);
}

void SharedSpace::SyncLanes(int warp) { lanes_synced_[warp] = ++clocks_[warp][warp]; }

void SharedSpace::Release(int warp, VectorClock& into) {
  ++clocks_[warp][warp];
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], clocks_[warp][i]);
}

void SharedSpace::Acquire(int warp, const VectorClock& clock) {
  VectorClock& mine = clocks_[warp];
  for (size_t i = 0; i < mine.size(); ++i) mine[i] = std::max(mine[i], clock[i]);
}

void SharedSpace::ReleaseEngine(VectorClock& into) {
  into[kAsync] = std::max(into[kAsync], ++engine_clock_);
}

}  // namespace cachedattn::emu
