// mbarriers and the bulk tensor copy engine (TMA).
#include <algorithm>
#include <cstring>

#include "csrc/emu/block.h"

namespace cachedattn::emu {

Mbarrier& HopperState::Find(const uint64_t* place, const Location& at) {
  const auto is_it = [&](const Mbarrier& barrier) { return barrier.place == place; };
  const auto found = std::find_if(barriers.begin(), barriers.end(), is_it);
  if (found == barriers.end()) block.Fail(at, "%p is no initialised mbarrier", (const void*)place);
  if (found->owner != block.thread() && !found->fenced) {
    block.Fail(at, "thread %d did not call FenceBarrierInit for this mbarrier", found->owner);
  }
  block.shared().CheckBarrier(place, at);
  return *found;
}

void HopperState::EndPhaseIfDone(Mbarrier& barrier) {
  if (barrier.left != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.left = barrier.arrivals;
  barrier.ended = barrier.open;
  for (const int thread : barrier.waiting) block.Wake(thread);
  barrier.waiting.clear();
}

bool HopperState::Progress() {
  if (copies.empty()) return false;
  std::swap(copies[block.Random() % copies.size()], copies.back());
  const TensorCopy copy = copies.back();
  copies.pop_back();
  const cuda::TensorMap& map = copy.map;
  const uint32_t start = block.shared().AddressOf(copy.shared, Location::current());
  const int rows = map.box[1] * map.box[2] * map.box[3] * map.box[4];
  for (int row = 0; row < rows; ++row) {
    int64_t c[5] = {copy.at[0], row, 0, 0, 0};
    for (int i = 1; i < 5; ++i) {
      if (i < 4) c[i + 1] = c[i] / map.box[i];
      c[i] = c[i] % map.box[i] + copy.at[i];
    }
    const char* source = map.base;
    bool inside = true;
    for (int i = 1; i < 5; ++i) {
      inside = inside && c[i] >= 0 && c[i] < map.sizes[i];
      source += c[i] * map.strides[i];
    }
    for (int column = 0; column < map.box[0]; ++column) {
      uint16_t element = 0;
      const int64_t c0 = c[0] + column;
      if (inside && c0 >= 0 && c0 < map.sizes[0]) std::memcpy(&element, source + 2 * c0, 2);
      const uint32_t place = Swizzle(start + row * 128 + column * 2);
      std::memcpy(block.shared().PointerTo(place), &element, 2);
    }
    block.shared().EndCopy(copy.shared + row * 128, 128, SharedSpace::kEngine);
  }
  const auto is_it = [&](const Mbarrier& barrier) { return barrier.place == copy.barrier; };
  Mbarrier& barrier = *std::find_if(barriers.begin(), barriers.end(), is_it);
  block.shared().ReleaseEngine(barrier.open);
  barrier.bytes -= int64_t{128} * rows;
  EndPhaseIfDone(barrier);
  return true;
}

}  // namespace cachedattn::emu

namespace cachedattn::cuda {

using emu::block;
using emu::Location;
using emu::Mbarrier;

void MbarrierInit(uint64_t* barrier, int arrivals, const Location& at) {
  if (arrivals <= 0) block.Fail(at, "an mbarrier of %d arrivals", arrivals);
  block.shared().SetBarrier(barrier, at);
  block.hopper().barriers.push_back(
      {barrier, arrivals, arrivals, 0, 0, block.thread(), false, {}, {}, {}});
}

void FenceBarrierInit() {
  for (Mbarrier& barrier : block.hopper().barriers) {
    if (barrier.owner == block.thread()) barrier.fenced = true;
  }
}

void MbarrierArrive(uint64_t* barrier, const Location& at) { MbarrierArriveExpect(barrier, 0, at); }

void MbarrierArriveExpect(uint64_t* place, int bytes, const Location& at) {
  Mbarrier& barrier = block.hopper().Find(place, at);
  if (barrier.left == 0) {
    block.Fail(at, "more than %d arrivals in a phase of the mbarrier", barrier.arrivals);
  }
  --barrier.left;
  barrier.bytes += bytes;
  block.shared().Release(block.warp_index(), barrier.open);
  block.hopper().EndPhaseIfDone(barrier);
}

void MbarrierWait(uint64_t* place, int parity, const Location& at) {
  if (parity != 0 && parity != 1) block.Fail(at, "parity %d", parity);
  // As on a GPU, a phase that ends and is followed by another one before this thread looks again
  // is missed.
  while (static_cast<int>(block.hopper().Find(place, at).phase & 1) == parity) {
    block.hopper().Find(place, at).waiting.push_back(block.thread());
    block.Suspend("MbarrierWait", at);
  }
  block.shared().Acquire(block.warp_index(), block.hopper().Find(place, at).ended);
}

void FenceProxyAsync() { block.shared().FenceProxy(block.thread()); }

void TmaLoad5(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3,
              int c4, const Location& at) {
  block.hopper().Find(barrier, at);
  if (block.shared().AddressOf(shared, at) % 1024 != 0) {
    block.Fail(at, "TMA load to an address that is not a multiple of 1024");
  }
  if (map->base == nullptr) block.Fail(at, "TMA load by a tensor map that was not made");
  const int rows = map->box[1] * map->box[2] * map->box[3] * map->box[4];
  for (int row = 0; row < rows; ++row) {
    block.shared().BeginCopy(static_cast<char*>(shared) + 128 * row, 128, emu::Access::kAsyncProxy,
                             at);
  }
  block.hopper().copies.push_back(
      {static_cast<char*>(shared), *map, barrier, {c0, c1, c2, c3, c4}});
}

}  // namespace cachedattn::cuda
