// The emulation of the CUDA kernels' machine (csrc/emu): each check fires on a kernel made for it,
// and the tensor core functions lay their fragments out as the PTX manual says.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "csrc/emu/launch.h"

namespace cachedattn::cuda {
namespace {

std::string ErrorOf(void (*kernel)(), int threads = 64, int shared_bytes = 4096) {
  const char* error = Launch(kernel, {1, 1, 1}, threads, shared_bytes, nullptr);
  return error == nullptr ? "" : error;
}

// What the kernel fails with under some seed of 20; "" if it never does.
std::string EverErrorOf(void (*kernel)(), int threads = 64) {
  for (int seed = 0; seed < 20; ++seed) {
    emu::SetSeed(seed);
    const std::string error = ErrorOf(kernel, threads);
    if (!error.empty()) return error;
  }
  return "";
}

#define EXPECT_HAS(text, part) EXPECT_PRED_FORMAT2(::testing::IsSubstring, part, text)

// ---- what is an error ----

CA_KERNEL(64, 1) Fine() {
  char* shared = SharedMemory();
  StoreShared<int>(shared + 4 * ThreadIndex(), ThreadIndex());
  SyncThreads();
  const int other = 63 - ThreadIndex();
  if (LoadShared<int>(shared + 4 * other) != other) StoreShared<int>(nullptr, 0);
}
TEST(EmuTest, RunsAKernel) { EXPECT_EQ(EverErrorOf(Fine), ""); }

CA_KERNEL(64, 1) Misaligned() { StoreShared<F4>(SharedMemory() + 8, F4{}); }
TEST(EmuTest, Misaligned) {
  const std::string error = ErrorOf(Misaligned);
  EXPECT_HAS(error, "16 bytes at shared memory + 8 are misaligned");
  EXPECT_HAS(error, "emu_test.cc:");
  EXPECT_HAS(error, "block (0, 0, 0)");
}

CA_KERNEL(64, 1) OutOfBounds() { StoreShared<int>(SharedMemory() + 4096, 0); }
TEST(EmuTest, OutOfBounds) { EXPECT_HAS(ErrorOf(OutOfBounds), "out of bounds"); }

CA_KERNEL(64, 1) Uninitialised() {
  if (ThreadIndex() == 3) LoadShared<int>(SharedMemory() + 12);
}
TEST(EmuTest, UninitialisedRead) { EXPECT_HAS(ErrorOf(Uninitialised), "uninitialised memory"); }

CA_KERNEL(64, 1) NoBarrier() {
  if (ThreadIndex() == 0) StoreShared<int>(SharedMemory(), 1);
  if (ThreadIndex() == 40 || ThreadIndex() == 0) LoadShared<int>(SharedMemory());
}
TEST(EmuTest, MissingBarrier) { EXPECT_HAS(EverErrorOf(NoBarrier), "shared memory + 0"); }

CA_KERNEL(64, 1) NoSyncWarp() {
  StoreShared<int>(SharedMemory() + 4 * ThreadIndex(), 1);
  LoadShared<int>(SharedMemory() + 4 * (ThreadIndex() ^ 1));
}
TEST(EmuTest, MissingSyncWarp) { EXPECT_HAS(EverErrorOf(NoSyncWarp), "shared memory + "); }

CA_KERNEL(64, 1) DivergentWarp() {
  if (LaneIndex() < 16) {
    SyncWarp();
  } else {
    ShuffleXor(1.f, 1);
  }
}
TEST(EmuTest, DivergentWarp) { EXPECT_HAS(ErrorOf(DivergentWarp), "divergent warp: at "); }

CA_KERNEL(64, 1) EndsEarly() {
  if (LaneIndex() != 7) SyncWarp();
}
TEST(EmuTest, LaneEndsWhileOthersWait) { EXPECT_HAS(ErrorOf(EndsEarly), "divergent warp"); }

CA_KERNEL(64, 1) HalfBarrier() {
  if (ThreadIndex() < 32) SyncThreads();
}
TEST(EmuTest, Deadlock) { EXPECT_HAS(ErrorOf(HalfBarrier), "deadlock"); }

CA_KERNEL(96, 1) WrongCount() { NamedBarrierSync(1, ThreadIndex() < 32 ? 64 : 96); }
TEST(EmuTest, WrongBarrierCount) { EXPECT_HAS(ErrorOf(WrongCount, 96), "others came to it for"); }

// A copy that nobody waits for, and one that only its own thread may see.
alignas(16) const uint32_t kWords[4] = {1, 2, 3, 4};
CA_KERNEL(64, 1) NoWait() {
  if (ThreadIndex() != 0) return;
  CpAsync16(SharedMemory(), kWords, true);
  CpAsyncCommit();
  CpAsync16(SharedMemory() + 16, kWords, true);
  CpAsyncCommit();
  CpAsyncWait<1>();
  LoadShared<U4>(SharedMemory());
  LoadShared<U4>(SharedMemory() + 16);
}
TEST(EmuTest, MissingWait) {
  EXPECT_HAS(ErrorOf(NoWait), "read of bytes of a copy that is still under way");
  EXPECT_HAS(ErrorOf(NoWait), "at shared memory + 16");
}

CA_KERNEL(64, 1) WaitWithoutBarrier() {
  CpAsync16(SharedMemory() + 16 * ThreadIndex(), kWords, true);
  CpAsyncCommit();
  CpAsyncWait<0>();
  LoadShared<int>(SharedMemory() + 16 * (ThreadIndex() ^ 1));
}
TEST(EmuTest, WaitIsForOneThread) {
  EXPECT_HAS(EverErrorOf(WaitWithoutBarrier), "at shared memory + ");
}

CA_KERNEL(64, 1) Copies() {
  char* mine = SharedMemory() + 16 * ThreadIndex();
  const bool valid = ThreadIndex() % 2 == 0;
  const auto* nowhere = reinterpret_cast<const void*>(uintptr_t{16});  // must not be read
  CpAsync16(mine, valid ? kWords : nowhere, valid);
  CpAsyncCommit();
  CpAsyncWait<0>();
  const U4 words = LoadShared<U4>(mine);
  if (words.x != (valid ? 1 : 0) || words.w != (valid ? 4 : 0)) LoadShared<int>(nullptr);
}
TEST(EmuTest, CopiesOrFillsWithZeros) { EXPECT_EQ(EverErrorOf(Copies), ""); }

CA_KERNEL(64, 1) Unfenced(int* counter) { AtomicAdd(counter, 1); }
TEST(EmuTest, AtomicWithoutFence) {
  int counter = 0;
  EXPECT_HAS(Launch(Unfenced, {1, 1, 1}, 32, 0, nullptr, &counter), "before any ThreadFence");
}

CA_KERNEL(32, 1) MarkBlock(int* marks) {
  const Index3 block = BlockIndex();
  if (LaneIndex() == 0) ++marks[block.x + 3 * (block.y + 2 * block.z)];
}
TEST(EmuTest, RunsEveryBlockOnce) {
  std::vector<int> marks(30);
  EXPECT_EQ(Launch(MarkBlock, {3, 2, 5}, 32, 0, nullptr, marks.data()), nullptr);
  EXPECT_EQ(marks, std::vector<int>(30, 1));
  EXPECT_NE(Launch(MarkBlock, {0, 1, 1}, 32, 0, nullptr, marks.data()), nullptr);
}

}  // namespace
}  // namespace cachedattn::cuda
