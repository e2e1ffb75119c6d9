// The bodies of csrc/kernels/cuda/device.h under g++: a block's threads run as fibers (block.h).
// What a GPU would let pass in silence is an error here, which Launch returns with the place of the
// call: misaligned or out of bounds accesses to shared memory, bytes that nobody wrote, bytes of a
// copy not waited for, writes that no barrier orders, divergent warps, wrong barriers, deadlock.
// Global memory is plain: AddressSanitizer watches it.
//
// Each function takes, after the arguments of its twin, the place it is called from.
#pragma once

#include <cmath>
#include <source_location>

#include "csrc/emu/float16.h"
#include "csrc/kernels/cuda/device.h"

#define CA_DEVICE inline
#define CA_KERNEL(threads, blocks) void
#define CA_GRID_CONSTANT const
#define CA_UNROLL

#define CA_HERE const std::source_location& at = std::source_location::current()

namespace cachedattn::cuda {

int ThreadIndex();
int LaneIndex();
Index3 BlockIndex();

char* SharedMemory();
uint32_t SharedAddress(const void* p, CA_HERE);

void CheckLoad(const void* p, int bytes, const std::source_location& at);
void CheckStore(void* p, int bytes, const std::source_location& at);
template <typename V>
V LoadShared(const void* p, CA_HERE) {
  static_assert(sizeof(V) >= 2 && sizeof(V) <= 16);
  CheckLoad(p, sizeof(V), at);
  return *static_cast<const V*>(p);
}
template <typename V>
void StoreShared(void* p, V value, CA_HERE) {
  static_assert(sizeof(V) >= 2 && sizeof(V) <= 16);
  CheckStore(p, sizeof(V), at);
  *static_cast<V*>(p) = value;
}

inline int Here(int x) { return x; }
inline float Here(float x) { return x; }
inline const char* Here(const char* x) { return x; }

// ---- barriers, shuffles, atomics ----

void SyncThreads(CA_HERE);
void SyncWarp(CA_HERE);
void NamedBarrierSync(int id, int threads, CA_HERE);
void NamedBarrierArrive(int id, int threads, CA_HERE);
float ShuffleXor(float value, int mask, CA_HERE);
uint32_t ShuffleFrom(uint32_t value, int lane, CA_HERE);
// Blocks run one after the other here, so that a missing fence cannot show in results: an
// AtomicAdd of a thread that has not called ThreadFence is an error.
int AtomicAdd(int* p, int value, CA_HERE);
void ThreadFence();
inline float LoadFresh(const float* p) { return *p; }

// ---- arithmetic ----

inline float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float Log2(float x) { return std::log2(x); }
inline float Divide(float a, float b) { return a / b; }
inline float Fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float Max(float a, float b) { return std::fmax(a, b); }
inline float Infinity() { return INFINITY; }

template <typename T>
uint32_t PackPair(float lower, float upper) {
  return emu::ToBits<T>(lower) | static_cast<uint32_t>(emu::ToBits<T>(upper)) << 16;
}
template <typename T>
F2 UnpackPair(uint32_t word) {
  return {emu::ToFloat<T>(static_cast<uint16_t>(word)),
          emu::ToFloat<T>(static_cast<uint16_t>(word >> 16))};
}

// ---- asynchronous copies ----

// The bytes land when the thread waits for their group. Until then nobody may touch the place, so
// that landing earlier would make no difference.
void CpAsync16(void* shared, const void* global, bool valid, CA_HERE);
void CpAsyncCommit();
void WaitForCopies(int pending);
template <int kPending>
void CpAsyncWait() {
  WaitForCopies(kPending);
}

// ---- tensor cores ----

void LoadMatrix4(const void* row, uint32_t (&r)[4], CA_HERE);
void LoadMatrix4Transposed(const void* row, uint32_t (&r)[4], CA_HERE);
uint32_t TransposeMatrix(uint32_t r, CA_HERE);
template <typename T>
void Mma16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CA_HERE);

template <>
void Mma16816<Bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const std::source_location& at);
template <>
void Mma16816<Fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const std::source_location& at);

}  // namespace cachedattn::cuda
