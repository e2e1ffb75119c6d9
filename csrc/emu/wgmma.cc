// wgmma: products of a warpgroup from shared memory. Every warp's 16 rows are computed when the
// warp issues the operation; until the wait its sums are NaN, and nobody may write what it read.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/emu/block.h"

namespace cachedattn::emu {

void HopperState::Reset(int num_warps) {
  barriers.clear();
  copies.clear();
  warps.assign(num_warps, {});
  groups.assign((num_warps + 3) / 4, {});
}

void HopperState::CheckEnd() {
  const Location at = Location::current();
  if (!copies.empty()) block.Fail(at, "the block ends while TMA loads are under way");
  int registers = 0;
  bool all_set = true;
  for (const Warpgroup& group : groups) {
    registers += group.registers;
    all_set = all_set && group.registers > 0;
  }
  // 65536 registers, over warpgroups of 128 threads.
  if (all_set && registers > 512) {
    block.Fail(at, "warpgroups claim %d registers a thread together, of 512", registers);
  }
  for (size_t i = 0; i < warps.size(); ++i) {
    if (!warps[i].sums.empty()) block.Fail(at, "warp %zu ends while a wgmma is under way", i);
    if (warps[i].calls != groups[i / 4].calls.size()) {
      block.Fail(at, "divergent warpgroup: warp %zu did not call the last %s", i,
                 groups[i / 4].calls.back().name);
    }
  }
}

namespace {

// An operand's descriptor, decoded.
struct Operand {
  uint32_t start;
  int leading, stride;
  bool mn_major;

  // Address of the 16-byte chunk that holds element (k, mn), before the swizzle. K-major: rows of
  // depth, 128 bytes each, 8 rows to a group. MN-major: rows of 64 columns.
  uint32_t Chunk(int k, int mn) const {
    return mn_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 / 8 * 16
                    : start + mn / 8 * stride + mn % 8 * 128 + k / 8 * 16;
  }
};

Operand Decode(uint64_t descriptor, bool mn_major, const Location& at) {
  const auto field = [&](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; };
  const Operand operand = {static_cast<uint32_t>(field(0)), field(16), field(32), mn_major};
  if (descriptor >> 62 != 1) block.Fail(at, "descriptor without the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) block.Fail(at, "descriptor with a base offset");
  const uint32_t in_atom = operand.start % 1024;
  if (mn_major ? in_atom != 0 : in_atom > 96 || in_atom % 32 != 0) {
    block.Fail(at, "descriptor whose operand starts %u bytes into an atom of 1024", in_atom);
  }
  return operand;
}

// All lanes of the warp call it; all warps of the warpgroup must make the same calls.
template <typename Args, typename Compute>
void OfWarpgroup(const char* name, uint64_t first, uint64_t second, Args& args, const Location& at,
                 Compute compute) {
  block.Collective(name, first ^ second << 1, args, at, [&](Args* const* lanes) {
    Warpgroup& group = block.hopper().groups[block.warp_index() / 4];
    WgmmaWarp& warp = block.hopper().warps[block.warp_index()];
    if (block.num_threads() % 128 != 0) block.Fail(at, "%s in a block of part warpgroups", name);
    const Warpgroup::Call call = {name, first, second};
    if (warp.calls == group.calls.size()) group.calls.push_back(call);
    if (group.calls[warp.calls++] != call) {
      block.Fail(at, "divergent warpgroup: call %zu is %s here, %s in another warp, or differs",
                 warp.calls, name, group.calls[warp.calls - 1].name);
    }
    compute(warp, lanes);
    return true;
  });
}

// Reads 8 elements that a wgmma of the warp reads until the wait for its group.
template <typename T>
void ReadChunkOf(WgmmaWarp& warp, const Operand& operand, int k, int mn, float (&out)[8],
                 const Location& at) {
  const uint32_t address = Swizzle(operand.Chunk(k, mn));
  const char* place = block.shared().PointerTo(address);
  block.shared().CheckRead(place, 16, Access::kAsyncProxy, at);
  block.shared().Pin(address);
  warp.reads.push_back({address, warp.open_group});
  for (int i = 0; i < 8; ++i) {
    uint16_t bits;
    std::memcpy(&bits, place + 2 * i, sizeof(bits));
    out[i] = ToFloat<T>(bits);
  }
}

struct Multiplication {
  float* d;
  const uint32_t* a;  // registers, or nullptr
};

// The 16 rows of A that the warp multiplies.
template <typename T>
void LoadA(WgmmaWarp& warp, Multiplication* const* lanes, uint64_t descriptor, const Location& at,
           float (&a)[16][16]) {
  if (lanes[0]->a == nullptr) {
    const Operand operand = Decode(descriptor, false, at);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; k += 8) {
        float chunk[8];
        ReadChunkOf<T>(warp, operand, k, block.warp_index() % 4 * 16 + row, chunk, at);
        std::copy_n(chunk, 8, &a[row][k]);
      }
    }
    return;
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const cuda::F2 pair = cuda::UnpackPair<T>(lanes[l]->a[i]);
      float* place = &a[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8];
      place[0] = pair.x, place[1] = pair.y;
    }
  }
}

// B [16, n].
template <typename T>
void LoadB(WgmmaWarp& warp, const Operand& operand, int n, const Location& at, float* b) {
  float chunk[8];
  if (operand.mn_major) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < n; j += 8) {
        ReadChunkOf<T>(warp, operand, k, j, chunk, at);
        std::copy_n(chunk, 8, b + k * n + j);
      }
    }
    return;
  }
  for (int j = 0; j < n; ++j) {
    for (int k = 0; k < 16; k += 8) {
      ReadChunkOf<T>(warp, operand, k, j, chunk, at);
      for (int i = 0; i < 8; ++i) b[(k + i) * n + j] = chunk[i];
    }
  }
}

// Element of a thread's sums: row and column of the warp's [16, n].
int RowOf(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int ColumnOf(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

Sums& FindSums(WgmmaWarp& warp, Multiplication* const* lanes, int n, const Location& at) {
  for (Sums& sums : warp.sums) {
    if (sums.places[0] != lanes[0]->d) continue;
    if (sums.n != n) block.Fail(at, "sums of another shape are under way here");
    return sums;
  }
  Sums& sums = warp.sums.emplace_back();
  sums.n = n;
  sums.values.resize(16 * n);
  for (int l = 0; l < 32; ++l) {
    sums.places[l] = lanes[l]->d;
    for (int i = 0; i < n / 2; ++i) {
      sums.values[RowOf(l, i) * n + ColumnOf(l, i)] = lanes[l]->d[i];
      lanes[l]->d[i] = NAN;
    }
  }
  return sums;
}

}  // namespace
}  // namespace cachedattn::emu

namespace cachedattn::cuda {

using emu::block;
using emu::Location;
using emu::WgmmaWarp;

namespace {

struct Nothing {};

template <typename T>
void Multiply(float* d, int n, const WgmmaA& a, uint64_t desc_b, bool transpose_b, bool accumulate,
              const Location& at) {
  emu::Multiplication args = {d, a.registers};
  const uint64_t options = static_cast<uint64_t>(n) << 3 | (a.registers != nullptr ? 4 : 0) |
                           (transpose_b ? 2 : 0) | (accumulate ? 1 : 0);
  const auto compute = [&](WgmmaWarp& warp, emu::Multiplication* const* lanes) {
    if (!warp.fenced) block.Fail(at, "wgmma without a WgmmaFence since the last wait");
    float a_rows[16][16], b[16 * 128];
    emu::LoadA<T>(warp, lanes, a.descriptor, at, a_rows);
    emu::LoadB<T>(warp, emu::Decode(desc_b, transpose_b, at), n, at, b);
    emu::Sums& sums = emu::FindSums(warp, lanes, n, at);
    sums.group = warp.open_group;
    if (!accumulate) std::fill(sums.values.begin(), sums.values.end(), 0.f);
    for (int i = 0; i < 16; ++i) {
      float* row = &sums.values[i * n];
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < n; ++j) row[j] += a_rows[i][k] * b[k * n + j];
      }
    }
  };
  emu::OfWarpgroup("wgmma", desc_b ^ options << 20, a.descriptor, args, at, compute);
}

}  // namespace

template <>
void Wgmma<Bf16>(float* d, int n, const WgmmaA& a, uint64_t desc_b, bool transpose_b,
                 bool accumulate, const Location& at) {
  Multiply<Bf16>(d, n, a, desc_b, transpose_b, accumulate, at);
}
template <>
void Wgmma<Fp16>(float* d, int n, const WgmmaA& a, uint64_t desc_b, bool transpose_b,
                 bool accumulate, const Location& at) {
  Multiply<Fp16>(d, n, a, desc_b, transpose_b, accumulate, at);
}

uint64_t WgmmaDescriptor(const void* p, int leading, int stride, const Location& at) {
  const uint64_t address = block.shared().AddressOf(p, at);
  if (address % 16 != 0 || leading % 16 != 0 || stride % 16 != 0) {
    block.Fail(at, "descriptor of numbers that are not multiples of 16");
  }
  return address >> 4 | static_cast<uint64_t>(leading) >> 4 << 16 |
         static_cast<uint64_t>(stride) >> 4 << 32 | uint64_t{1} << 62;
}

void WgmmaFence(const Location& at) {
  Nothing args;
  emu::OfWarpgroup("WgmmaFence", 0, 0, args, at,
                   [](WgmmaWarp& warp, Nothing* const*) { warp.fenced = true; });
}

void WgmmaCommit(const Location& at) {
  Nothing args;
  emu::OfWarpgroup("WgmmaCommit", 0, 0, args, at,
                   [](WgmmaWarp& warp, Nothing* const*) { ++warp.open_group; });
}

void WaitForWgmma(int pending, const Location& at) {
  Nothing args;
  const auto wait = [&](WgmmaWarp& warp, Nothing* const*) {
    const int end = warp.open_group - pending;  // groups before it are done
    warp.fenced = false;
    const auto lands = [&](emu::Sums& sums) {
      if (sums.group >= end) return false;
      for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < sums.n / 2; ++i) {
          if (!std::isnan(sums.places[l][i])) {
            block.Fail(at, "the sums of a wgmma under way were written");
          }
          sums.places[l][i] = sums.values[emu::RowOf(l, i) * sums.n + emu::ColumnOf(l, i)];
        }
      }
      return true;
    };
    std::erase_if(warp.sums, lands);
    std::erase_if(warp.reads, [&](const emu::ReadChunk& read) {
      if (read.group < end) block.shared().Unpin(read.address);
      return read.group < end;
    });
  };
  emu::OfWarpgroup("WgmmaWait", pending, 0, args, at, wait);
}

void SetRegisters(int registers, const Location& at) {
  Nothing args;
  emu::OfWarpgroup("setmaxnreg", registers, 0, args, at, [&](WgmmaWarp&, Nothing* const*) {
    block.hopper().groups[block.warp_index() / 4].registers = registers;
  });
}

}  // namespace cachedattn::cuda
