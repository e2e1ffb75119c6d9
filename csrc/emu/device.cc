#include "csrc/emu/device.h"

#include <algorithm>
#include <cstring>

#include "csrc/emu/block.h"

namespace cachedattn::cuda {

using emu::block;
using emu::Location;

int ThreadIndex() { return block.thread(); }
int LaneIndex() { return block.lane(); }
Index3 BlockIndex() { return block.index(); }

char* SharedMemory() { return block.shared().data(); }
uint32_t SharedAddress(const void* p, const Location& at) {
  return block.shared().AddressOf(p, at);
}
void CheckLoad(const void* p, int bytes, const Location& at) {
  block.shared().CheckRead(p, bytes, emu::Access::kThread, at);
}
void CheckStore(void* p, int bytes, const Location& at) { block.shared().Write(p, bytes, at); }

// ---- barriers, shuffles, atomics ----

namespace {

struct Nothing {};

void Barrier(const char* name, int id, int threads, bool waits, const Location& at) {
  Nothing nothing;
  block.Collective(name, static_cast<uint64_t>(id) << 32 | static_cast<uint32_t>(threads), nothing,
                   at,
                   [&](Nothing* const*) { return block.ArriveAtBarrier(id, threads, waits, at); });
}

}  // namespace

void SyncThreads(const Location& at) { Barrier("SyncThreads", 0, block.num_threads(), true, at); }
void NamedBarrierSync(int id, int threads, const Location& at) {
  Barrier("NamedBarrierSync", id, threads, true, at);
}
void NamedBarrierArrive(int id, int threads, const Location& at) {
  Barrier("NamedBarrierArrive", id, threads, false, at);
}
void SyncWarp(const Location& at) {
  Nothing nothing;
  block.Collective("SyncWarp", 0, nothing, at, [](Nothing* const*) {
    block.shared().SyncLanes(block.warp_index());
    return true;
  });
}

float ShuffleXor(float value, int mask, const Location& at) {
  struct Args {
    float value, result;
  } args = {value, 0.f};
  block.Collective("ShuffleXor", mask, args, at, [mask](Args* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[(i ^ mask) & 31]->value;
    return true;
  });
  return args.result;
}

uint32_t ShuffleFrom(uint32_t value, int lane, const Location& at) {
  struct Args {
    uint32_t value, result;
    int from;
  } args = {value, 0, lane};
  block.Collective("ShuffleFrom", 0, args, at, [](Args* const* lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[lanes[i]->from & 31]->value;
    return true;
  });
  return args.result;
}

int AtomicAdd(int* p, int value, const Location& at) {
  if (!block.self().fenced) {
    block.Fail(at, "AtomicAdd before any ThreadFence: nothing orders the writes it announces");
  }
  const int before = *p;
  *p += value;
  return before;
}
void ThreadFence() { block.self().fenced = true; }

// ---- asynchronous copies ----

void CpAsync16(void* shared, const void* global, bool valid, const Location& at) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    block.Fail(at, "cp.async from %p: misaligned", global);
  }
  block.shared().BeginCopy(shared, 16, emu::Access::kThread, at);
  U4 bytes = {};
  if (valid) std::memcpy(&bytes, global, sizeof(bytes));
  emu::Thread& self = block.self();
  self.copies.push_back({static_cast<char*>(shared), bytes, self.open_group});
}

void CpAsyncCommit() { ++block.self().open_group; }

void WaitForCopies(int pending) {
  emu::Thread& self = block.self();
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.open_group - pending; ++copy) {
    std::memcpy(copy->shared, &copy->bytes, sizeof(copy->bytes));
    block.shared().EndCopy(copy->shared, sizeof(copy->bytes), block.thread());
  }
  self.copies.erase(self.copies.begin(), copy);
}

// ---- tensor cores ----

namespace {

struct Matrices {
  const char* row;
  uint32_t* r;
};

// Word of elements (row, column) and (row, column + 1) of a matrix, whose rows lanes point to.
uint16_t Element(Matrices* const* rows, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, rows[row]->row + 2 * column, sizeof(bits));
  return bits;
}

void CheckRows(Matrices* const* lanes, const Location& at) {
  for (int i = 0; i < 32; ++i) {
    block.shared().CheckRead(lanes[i]->row, 16, emu::Access::kWarp, at);
  }
}

}  // namespace

void LoadMatrix4(const void* row, uint32_t (&r)[4], const Location& at) {
  Matrices args = {static_cast<const char*>(row), r};
  block.Collective("LoadMatrix4", 0, args, at, [&](Matrices* const* lanes) {
    CheckRows(lanes, at);
    for (int i = 0; i < 4; ++i) {
      for (int l = 0; l < 32; ++l) {
        std::memcpy(&lanes[l]->r[i], lanes[8 * i + l / 4]->row + l % 4 * 4, 4);
      }
    }
    return true;
  });
}

void LoadMatrix4Transposed(const void* row, uint32_t (&r)[4], const Location& at) {
  Matrices args = {static_cast<const char*>(row), r};
  block.Collective("LoadMatrix4Transposed", 0, args, at, [&](Matrices* const* lanes) {
    CheckRows(lanes, at);
    for (int i = 0; i < 4; ++i) {
      for (int l = 0; l < 32; ++l) {
        const uint32_t upper = Element(lanes + 8 * i, l % 4 * 2 + 1, l / 4);
        lanes[l]->r[i] = Element(lanes + 8 * i, l % 4 * 2, l / 4) | upper << 16;
      }
    }
    return true;
  });
}

uint32_t TransposeMatrix(uint32_t r, const Location& at) {
  struct Args {
    uint32_t r, result;
  } args = {r, 0};
  block.Collective("TransposeMatrix", 0, args, at, [](Args* const* lanes) {
    // Element (row, column) lies in lane 4 row + column / 2.
    const auto element = [&](int row, int column) {
      return lanes[4 * row + column / 2]->r >> (column % 2 * 16) & 0xffffu;
    };
    for (int l = 0; l < 32; ++l) {
      lanes[l]->result = element(l % 4 * 2, l / 4) | element(l % 4 * 2 + 1, l / 4) << 16;
    }
    return true;
  });
  return args.result;
}

namespace {

struct MmaArgs {
  float* c;
  const uint32_t *a, *b;
};

template <typename T>
void Multiply(MmaArgs* const* lanes) {
  float a[16][16], b[16][8], c[16][8];
  const auto unpack = [](uint32_t word, float* first, float* second) {
    const F2 pair = UnpackPair<T>(word);
    *first = pair.x, *second = pair.y;
  };
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      float* place = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      unpack(lanes[l]->a[i], place, place + 1);
      c[g + i / 2 * 8][2 * t + i % 2] = lanes[l]->c[i];
    }
    for (int i = 0; i < 2; ++i) {
      unpack(lanes[l]->b[i], &b[2 * t + 8 * i][g], &b[2 * t + 8 * i + 1][g]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) lanes[l]->c[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

}  // namespace

template <>
void Mma16816<Bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const Location& at) {
  MmaArgs args = {c, a, b};
  block.Collective("Mma16816<Bf16>", 0, args, at, [](MmaArgs* const* lanes) {
    Multiply<Bf16>(lanes);
    return true;
  });
}
template <>
void Mma16816<Fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const Location& at) {
  MmaArgs args = {c, a, b};
  block.Collective("Mma16816<Fp16>", 0, args, at, [](MmaArgs* const* lanes) {
    Multiply<Fp16>(lanes);
    return true;
  });
}

}  // namespace cachedattn::cuda
