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
  states_.assign(bytes / 2, kUnwritten);
  writers_.assign(bytes / 2, {});
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
  if (offset % bytes != 0) {
    block.Fail(at, "%d bytes at shared memory + %td are misaligned", bytes, offset);
  }
  return static_cast<int>(offset);
}

void SharedSpace::FailState(int offset, const char* access, const Location& at) {
  const char* what = states_[offset / 2] == kUnwritten  ? "uninitialised memory"
                     : states_[offset / 2] == kInFlight ? "bytes of a copy that is still under way"
                     : states_[offset / 2] == kBarrier  ? "an mbarrier"
                                                        : "written bytes";
  block.Fail(at, "%s of %s, at shared memory + %d", access, what, offset);
}

// Are the last writes of these bytes, where others made them, before this access?
void SharedSpace::CheckOrder(int offset, int bytes, bool as_lane, const Location& at) {
  const int thread = block.thread(), warp = block.warp_index();
  const Writer* before = nullptr;
  for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
    const Writer& writer = writers_[i];
    if (states_[i] == kUnwritten || states_[i] == kInFlight ||
        (before != nullptr && *before == writer))
      continue;
    before = &writer;
    if (as_lane && writer.thread == thread) continue;
    const int source = writer.thread == kEngine ? kAsync : writer.thread / 32;
    const uint32_t known = source == warp ? lanes_synced_[warp] : clocks_[warp][source];
    if (known > writer.clock) continue;
    if (source == kAsync) {
      block.Fail(at, "race: shared memory + %d was written by a TMA load that was not waited for",
                 2 * i);
    }
    block.Fail(at, "race: shared memory + %d was written by thread %d with no barrier since", 2 * i,
               writer.thread);
  }
}

void SharedSpace::CheckRead(const void* p, int bytes, Access access, const Location& at) {
  const int offset = Offset(p, bytes, at);
  for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
    if (states_[i] != kWritten) FailState(2 * i, "read", at);
  }
  CheckOrder(offset, bytes, access == Access::kThread, at);
  if (access == Access::kAsyncProxy) CheckProxyFence(offset, bytes, at);
}

// Did those whose ordinary writes an asynchronous access meets call FenceProxyAsync?
void SharedSpace::CheckProxyFence(int offset, int bytes, const Location& at) {
  for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
    const Writer& writer = writers_[i];
    if (states_[i] != kWritten || writer.thread == kEngine) continue;
    if (writer.fence != fences_[writer.thread]) continue;
    block.Fail(at, "shared memory + %d was written by thread %d, without FenceProxyAsync since",
               2 * i, writer.thread);
  }
}

void SharedSpace::CheckWrite(int offset, int bytes, const char* access, const Location& at) {
  for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
    if (states_[i] > kWritten) FailState(2 * i, access, at);
  }
  for (int i = offset / 16; i <= (offset + bytes - 1) / 16; ++i) {
    if (pins_[i] > 0) {
      block.Fail(at, "%s of shared memory + %d, which a wgmma under way reads", access, 16 * i);
    }
  }
  CheckOrder(offset, bytes, true, at);
}

void SharedSpace::Write(void* p, int bytes, const Location& at) {
  CheckWrite(Offset(p, bytes, at), bytes, "write", at);
  EndCopy(p, bytes, block.thread());
}

void SharedSpace::BeginCopy(void* p, int bytes, Access access, const Location& at) {
  const int offset = Offset(p, bytes, at);
  CheckWrite(offset, bytes, "asynchronous write", at);
  if (access == Access::kAsyncProxy) CheckProxyFence(offset, bytes, at);
  std::fill_n(&states_[offset / 2], bytes / 2, kInFlight);
}

void SharedSpace::EndCopy(void* p, int bytes, int thread) {
  const int offset = static_cast<int>(static_cast<char*>(p) - data_);
  Writer writer = {static_cast<uint16_t>(thread), 0, engine_clock_};
  if (thread != kEngine) {
    writer = {static_cast<uint16_t>(thread), fences_[thread], clocks_[thread / 32][thread / 32]};
  }
  std::fill_n(&states_[offset / 2], bytes / 2, kWritten);
  std::fill_n(&writers_[offset / 2], bytes / 2, writer);
}

void SharedSpace::SetBarrier(const void* p, const Location& at) {
  const int offset = Offset(p, 8, at);
  CheckWrite(offset, 8, "MbarrierInit", at);
  EndCopy(data_ + offset, 8, block.thread());
  std::fill_n(&states_[offset / 2], 4, kBarrier);
}

void SharedSpace::CheckBarrier(const void* p, const Location& at) {
  CheckOrder(Offset(p, 8, at), 8, true, at);
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
