// Hopper's part of the emulated machine: mbarriers, TMA and wgmma, what they compute and which
// mistakes they report.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "csrc/emu/device_sm90.h"
#include "csrc/emu/launch.h"
#include "csrc/kernels/cuda/tensor_map.h"
#include "tests/native/testing/elements.h"

namespace cachedattn::cuda {
namespace {

#define EXPECT_HAS(text, part) EXPECT_PRED_FORMAT2(::testing::IsSubstring, part, text)

std::string OrEmpty(const char* error) { return error == nullptr ? "" : error; }

// What the kernel fails with under some seed of 20; "" if it never does.
std::string EverErrorOf(void (*kernel)(), int threads = 128) {
  for (int seed = 0; seed < 20; ++seed) {
    emu::SetSeed(seed);
    const char* error = Launch(kernel, {1, 1, 1}, threads, 64 << 10, nullptr);
    if (error != nullptr) return error;
  }
  return "";
}

// ---- TMA ----

constexpr int kBarrierPlace = 32 << 10;

struct Box {
  int c[5];
  int rows;
};

// Loads a box and copies its rows out, unswizzled.
CA_KERNEL(128, 1) LoadBox(CA_GRID_CONSTANT TensorMap map, Box box, uint16_t* out) {
  char* shared = SharedMemory();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kBarrierPlace);
  if (ThreadIndex() == 0) {
    MbarrierInit(barrier, 1);
    FenceBarrierInit();
  }
  SyncThreads();
  if (ThreadIndex() == 5) {
    MbarrierArriveExpect(barrier, 128 * box.rows);
    TmaLoad5(shared, &map, barrier, box.c[0], box.c[1], box.c[2], box.c[3], box.c[4]);
  }
  MbarrierWait(barrier, 0);
  for (int i = ThreadIndex(); i < box.rows * 64; i += 128) {
    const int row = i / 64, column = i % 64;
    out[i] = LoadShared<uint16_t>(shared + SwizzledOffset(row, column / 8) + column % 8 * 2);
  }
}

TEST(EmuHopperTest, TmaLoadsSwizzledBoxesAndZeros) {
  const int64_t sizes[5] = {80, 10, 3, 2, 4}, strides[4] = {160, 1600, 4800, 16000};
  const int box_size[5] = {64, 4, 2, 1, 1};
  std::vector<uint16_t> tensor(4 * 8000);
  for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<uint16_t>(i + 1);
  TensorMap map;
  ASSERT_TRUE(MakeTensorMap(&map, tensor.data(), DType::kBFloat16, sizes, strides, box_size));
  const Box boxes[] = {{{0, 0, 0, 0, 0}, 8}, {{16, 7, 2, 1, 3}, 8}, {{64, -2, -1, 0, 1}, 8}};
  for (const Box& box : boxes) {
    std::vector<uint16_t> out(8 * 64);
    ASSERT_EQ(OrEmpty(Launch(LoadBox, {1, 1, 1}, 128, 40 << 10, nullptr, map, box, out.data())),
              "");
    for (int i = 0; i < 8 * 64; ++i) {
      const int64_t c[5] = {box.c[0] + i % 64, box.c[1] + i / 64 % 4, box.c[2] + i / 256, box.c[3],
                            box.c[4]};
      int64_t place = c[0];
      bool inside = c[0] >= 0 && c[0] < sizes[0];
      for (int j = 1; j < 5; ++j) {
        inside = inside && c[j] >= 0 && c[j] < sizes[j];
        place += c[j] * strides[j - 1] / 2;
      }
      ASSERT_EQ(out[i], inside ? tensor[place] : 0) << i;
    }
  }
}

TEST(EmuHopperTest, TensorMapsHaveConditions) {
  alignas(16) static uint16_t data[64];
  const int64_t sizes[5] = {64, 1, 1, 1, 1}, strides[4] = {128, 128, 128, 128};
  const int64_t odd_strides[4] = {128, 136, 128, 128};
  const int box[5] = {64, 1, 1, 1, 1}, large_box[5] = {64, 257, 1, 1, 1};
  TensorMap map;
  EXPECT_TRUE(MakeTensorMap(&map, data, DType::kFloat16, sizes, strides, box));
  EXPECT_FALSE(MakeTensorMap(&map, data + 4, DType::kFloat16, sizes, strides, box));
  EXPECT_FALSE(MakeTensorMap(&map, data, DType::kFloat16, sizes, odd_strides, box));
  EXPECT_FALSE(MakeTensorMap(&map, data, DType::kFloat16, sizes, strides, large_box));
  EXPECT_FALSE(MakeTensorMap(&map, data, DType::kFloat32, sizes, strides, box));
}

// A load with one mistake.
enum class Mistake {
  kNone,
  kNoWait,
  kWrongParity,
  kUnfencedBarrier,
  kMisaligned,
  kUnfencedWrite,
  kTooManyBytes,
  kTwoArrivals
};
CA_KERNEL(128, 1) WrongLoad(CA_GRID_CONSTANT TensorMap map, Mistake mistake) {
  char* shared = SharedMemory();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kBarrierPlace);
  if (ThreadIndex() == 0) {
    MbarrierInit(barrier, 1);
    if (mistake != Mistake::kUnfencedBarrier) FenceBarrierInit();
    StoreShared(shared, 1);
    if (mistake != Mistake::kUnfencedWrite) FenceProxyAsync();
  }
  SyncThreads();
  if (ThreadIndex() == 5) {
    MbarrierArriveExpect(barrier, mistake == Mistake::kTooManyBytes ? 256 : 128);
    TmaLoad5(shared + (mistake == Mistake::kMisaligned ? 128 : 0), &map, barrier, 0, 0, 0, 0, 0);
    if (mistake == Mistake::kTwoArrivals) MbarrierArrive(barrier);
  }
  if (mistake != Mistake::kNoWait) MbarrierWait(barrier, mistake == Mistake::kWrongParity ? 1 : 0);
  LoadShared<int>(shared);
}

std::string WrongLoadError(Mistake mistake) {
  alignas(16) static uint16_t data[64];
  const int64_t sizes[5] = {64, 1, 1, 1, 1}, strides[4] = {128, 128, 128, 128};
  const int box[5] = {64, 1, 1, 1, 1};
  TensorMap map;
  if (!MakeTensorMap(&map, data, DType::kFloat16, sizes, strides, box)) return "no map";
  std::string found;
  for (int seed = 0; seed < 20 && found.empty(); ++seed) {
    emu::SetSeed(seed);
    found = OrEmpty(Launch(WrongLoad, {1, 1, 1}, 128, 40 << 10, nullptr, map, mistake));
  }
  return found;
}
TEST(EmuHopperTest, WrongLoads) {
  EXPECT_EQ(WrongLoadError(Mistake::kNone), "");
  EXPECT_HAS(WrongLoadError(Mistake::kNoWait), "shared memory + 0");
  EXPECT_HAS(WrongLoadError(Mistake::kWrongParity), "shared memory + 0");
  EXPECT_HAS(WrongLoadError(Mistake::kUnfencedBarrier), "did not call FenceBarrierInit");
  EXPECT_HAS(WrongLoadError(Mistake::kMisaligned), "not a multiple of 1024");
  EXPECT_HAS(WrongLoadError(Mistake::kUnfencedWrite), "without FenceProxyAsync");
  EXPECT_HAS(WrongLoadError(Mistake::kTooManyBytes), "deadlock; thread ");
  EXPECT_HAS(WrongLoadError(Mistake::kTwoArrivals), "more than 1 arrivals");
}

// ---- mbarriers ----

// Two warps hand a place in shared memory to and fro.
CA_KERNEL(64, 1) PingPong() {
  char* shared = SharedMemory();
  auto* full = reinterpret_cast<uint64_t*>(shared + 64);
  uint64_t* empty = full + 1;
  if (ThreadIndex() == 0) {
    MbarrierInit(full, 32);
    MbarrierInit(empty, 32);
    FenceBarrierInit();
  }
  SyncThreads();
  for (int i = 0; i < 6; ++i) {
    if (ThreadIndex() < 32) {
      MbarrierWait(empty, (i + 1) % 2);  // passes at once in the first round
      if (ThreadIndex() == 0) StoreShared(shared, i);
      MbarrierArrive(full);
    } else {
      MbarrierWait(full, i % 2);
      if (LoadShared<int>(shared) != i) LoadShared<int>(nullptr);
      MbarrierArrive(empty);
    }
  }
}
TEST(EmuHopperTest, MbarriersAlternate) { EXPECT_EQ(EverErrorOf(PingPong, 64), ""); }

// ---- wgmma ----

struct Product {
  bool a_in_registers, transpose_b, accumulate;
  int depth;  // multiple of 16; up to 64 unless B is transposed
};

// c [64, N] (+)= a [64, depth] b [depth, N]: operands are laid into shared memory, B as [N][depth]
// or, when transposed, as [depth][N].
template <typename T, int N>
CA_KERNEL(128, 1)
WgmmaKernel(Product product, const T* a, const T* b, float* c) {
  char* shared = SharedMemory();
  char* b_place = shared + 8192;
  const int depth = product.depth;
  for (int i = ThreadIndex(); i < 64 * depth; i += 128) {
    const int row = i / depth, k = i % depth;
    StoreShared(shared + SwizzledOffset(row, k / 8) + k % 8 * 2, a[i].bits);
  }
  for (int i = ThreadIndex(); i < depth * N; i += 128) {
    const int k = i / N, n = i % N;
    char* place = product.transpose_b
                      ? b_place + n / 64 * depth * 128 + SwizzledOffset(k, n % 64 / 8) + n % 8 * 2
                      : b_place + SwizzledOffset(n, k / 8) + k % 8 * 2;
    StoreShared(place, b[i].bits);
  }
  FenceProxyAsync();
  SyncThreads();
  const int warp = ThreadIndex() / 32, row = 16 * warp + LaneIndex() / 4;
  const int column = LaneIndex() % 4 * 2;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) {
    d[i] = c[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2];
  }
  WgmmaFence();
  for (int k = 0; k < depth; k += 16) {
    const uint64_t desc_b = product.transpose_b
                                ? WgmmaDescriptor(b_place + k * 128, depth * 128, 1024)
                                : WgmmaDescriptor(b_place + k * 2, 16, 1024);
    const bool accumulate = product.accumulate || k > 0;
    if (!product.a_in_registers) {
      WgmmaShared<T, N>(d, WgmmaDescriptor(shared + k * 2, 16, 1024), desc_b, accumulate);
      continue;
    }
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const T* place = a + (row + i % 2 * 8) * depth + k + column + i / 2 * 8;
      words[i] = place[0].bits | uint32_t{place[1].bits} << 16;
    }
    if (product.transpose_b) {
      WgmmaRegisters<T, N, true>(d, words, desc_b, accumulate);
    } else {
      WgmmaRegisters<T, N, false>(d, words, desc_b, accumulate);
    }
  }
  WgmmaCommit();
  if (!std::isnan(d[0])) LoadShared<int>(nullptr);
  WgmmaWait<0>();
  for (int i = 0; i < N / 2; ++i) {
    c[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
  }
}

template <typename T, int N>
void CheckWgmma(const Product& product) {
  const int depth = product.depth;
  const auto a = RandomElements<T>(64 * depth, 1), b = RandomElements<T>(depth * N, 2);
  std::vector<float> c(64 * N);
  for (int i = 0; i < 64 * N; ++i) c[i] = static_cast<float>(i % 7);
  const std::vector<float> before = c;
  const int shared_bytes = 8192 + 128 * std::max(N, depth * N / 64);
  ASSERT_EQ(OrEmpty(Launch(WgmmaKernel<T, N>, {1, 1, 1}, 128, shared_bytes, nullptr, product,
                           a.data(), b.data(), c.data())),
            "");
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < N; ++j) {
      double sum = product.accumulate ? before[i * N + j] : 0.;
      for (int k = 0; k < depth; ++k) {
        sum += double{emu::ToFloat<T>(a[i * depth + k].bits)} *
               double{emu::ToFloat<T>(b[k * N + j].bits)};
      }
      ASSERT_NEAR(c[i * N + j], sum, 1e-4) << i << " " << j;
    }
  }
}

template <typename T>
void CheckAllWgmma() {
  for (const bool accumulate : {false, true}) {
    CheckWgmma<T, 64>({false, false, accumulate, 64});
    CheckWgmma<T, 128>({false, false, accumulate, 48});
    CheckWgmma<T, 64>({true, false, accumulate, 64});
    CheckWgmma<T, 128>({true, true, accumulate, 64});
    CheckWgmma<T, 64>({true, true, accumulate, 32});
  }
}
TEST(EmuHopperTest, WgmmaOfBf16) { CheckAllWgmma<Bf16>(); }
TEST(EmuHopperTest, WgmmaOfFp16) { CheckAllWgmma<Fp16>(); }

enum class Slip {
  kNone,
  kNoProxyFence,
  kNoBarrier,
  kNoWgmmaFence,
  kWriteOperand,
  kWriteSums,
  kNoWait,
  kOneWarpLess,
  kOtherOperand,
  kInRow
};
CA_KERNEL(128, 1) WrongWgmma(Slip slip) {
  char* shared = SharedMemory();
  for (int i = ThreadIndex(); i < 16384 / 16; i += 128) StoreShared(shared + 16 * i, U4{});
  if (slip != Slip::kNoProxyFence) FenceProxyAsync();
  if (slip != Slip::kNoBarrier) SyncThreads();
  const int warp = ThreadIndex() / 32;
  if (slip == Slip::kOneWarpLess && warp == 2) return;
  float d[32];
  for (float& x : d) x = 0.f;
  if (slip != Slip::kNoWgmmaFence) WgmmaFence();
  const char* a = shared + (slip == Slip::kInRow ? 8 * 16 : 0);
  const char* b = shared + 8192 + (slip == Slip::kOtherOperand && warp == 1 ? 32 : 0);
  WgmmaShared<Bf16, 64>(d, WgmmaDescriptor(a, 16, 1024), WgmmaDescriptor(b, 16, 1024), true);
  WgmmaCommit();
  if (slip == Slip::kWriteOperand && ThreadIndex() == 0) StoreShared(shared + 8192, U4{});
  if (slip == Slip::kWriteSums) d[3] = 1.f;
  if (slip != Slip::kNoWait) WgmmaWait<0>();
}
std::string WrongWgmmaError(Slip slip) {
  std::string found;
  for (int seed = 0; seed < 20 && found.empty(); ++seed) {
    emu::SetSeed(seed);
    found = OrEmpty(Launch(WrongWgmma, {1, 1, 1}, 128, 16384, nullptr, slip));
  }
  return found;
}
TEST(EmuHopperTest, WrongWgmmas) {
  EXPECT_EQ(WrongWgmmaError(Slip::kNone), "");
  EXPECT_HAS(WrongWgmmaError(Slip::kNoProxyFence), "without FenceProxyAsync");
  EXPECT_HAS(WrongWgmmaError(Slip::kNoBarrier), "shared memory + ");
  EXPECT_HAS(WrongWgmmaError(Slip::kNoWgmmaFence), "without a WgmmaFence");
  EXPECT_HAS(WrongWgmmaError(Slip::kWriteOperand), "which a wgmma under way reads");
  EXPECT_HAS(WrongWgmmaError(Slip::kWriteSums), "sums of a wgmma under way were written");
  EXPECT_HAS(WrongWgmmaError(Slip::kNoWait), "ends while a wgmma is under way");
  EXPECT_HAS(WrongWgmmaError(Slip::kOneWarpLess), "divergent warpgroup");
  EXPECT_HAS(WrongWgmmaError(Slip::kOtherOperand), "divergent warpgroup");
  EXPECT_HAS(WrongWgmmaError(Slip::kInRow), "starts 128 bytes into an atom");
}

// ---- registers ----

template <int kFirst, int kSecond>
CA_KERNEL(256, 1)
MoveRegisters() {
  if (ThreadIndex() < 128) {
    ReleaseRegisters<kFirst>();
  } else {
    ClaimRegisters<kSecond>();
  }
}
TEST(EmuHopperTest, RegistersOfAllWarpgroups) {
  EXPECT_EQ(EverErrorOf(MoveRegisters<240, 256>, 256), "");
  EXPECT_EQ(EverErrorOf(MoveRegisters<24, 240>, 256), "");
}
CA_KERNEL(512, 1) ClaimTooMany() { ClaimRegisters<136>(); }
TEST(EmuHopperTest, TooManyRegisters) {
  EXPECT_HAS(EverErrorOf(ClaimTooMany, 512), "claim 544 registers");
}

}  // namespace
}  // namespace cachedattn::cuda
