// The bodies of csrc/kernels/cuda/device_sm90.h under g++; device.h says how they behave. Also
// errors here: an mbarrier that others use before its initialisation was fenced and synchronised,
// more arrivals than it expects, accesses by TMA or wgmma to bytes whose writer did not call
// FenceProxyAsync, writes to what a wgmma still reads, warps of a warpgroup that disagree on what
// they multiply, a wgmma with no WgmmaFence since the last wait, work under way when a block ends.
#pragma once

#include <source_location>

#include "csrc/emu/device.h"
#include "csrc/kernels/cuda/device_sm90.h"

namespace cachedattn::cuda {

struct TensorMap {
  const char* base = nullptr;
  int64_t sizes[5] = {}, strides[5] = {};  // elements; bytes, innermost first
  int box[5] = {};
};

void MbarrierInit(uint64_t* barrier, int arrivals, CA_HERE);
void FenceBarrierInit();
void MbarrierArrive(uint64_t* barrier, CA_HERE);
void MbarrierArriveExpect(uint64_t* barrier, int bytes, CA_HERE);
void MbarrierWait(uint64_t* barrier, int parity, CA_HERE);
void FenceProxyAsync();

// The box lands at some moment after the call. Until the barrier's phase ends nobody may touch its
// place, so that landing piece by piece would make no difference.
void TmaLoad5(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3,
              int c4, CA_HERE);
inline void PrefetchTensorMap(const TensorMap*) {}

uint64_t WgmmaDescriptor(const void* p, int leading, int stride, CA_HERE);
void WgmmaFence(CA_HERE);
void WgmmaCommit(CA_HERE);
void WaitForWgmma(int pending, const std::source_location& at);
template <int kPending>
void WgmmaWait(CA_HERE) {
  WaitForWgmma(kPending, at);
}
template <typename Registers>
void PinRegisters(Registers&) {}

// The operand A: a descriptor, or a thread's registers.
struct WgmmaA {
  uint64_t descriptor;
  const uint32_t* registers;  // nullptr: A lies in shared memory
};
// The sums hold a NaN from here to the wait for their group.
template <typename T>
void Wgmma(float* d, int n, const WgmmaA& a, uint64_t desc_b, bool transpose_b, bool accumulate,
           const std::source_location& at);
template <>
void Wgmma<Bf16>(float* d, int n, const WgmmaA& a, uint64_t desc_b, bool transpose_b,
                 bool accumulate, const std::source_location& at);
template <>
void Wgmma<Fp16>(float* d, int n, const WgmmaA& a, uint64_t desc_b, bool transpose_b,
                 bool accumulate, const std::source_location& at);

template <typename T, int N>
void WgmmaShared(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate, CA_HERE) {
  static_assert(N == 64 || N == 128);
  Wgmma<T>(d, N, {desc_a, nullptr}, desc_b, false, accumulate, at);
}
template <typename T, int N, bool kTransposeB>
void WgmmaRegisters(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate,
                    CA_HERE) {
  static_assert(N == 64 || N == 128);
  Wgmma<T>(d, N, {0, a}, desc_b, kTransposeB, accumulate, at);
}

void SetRegisters(int registers, const std::source_location& at);
template <int kRegisters>
void ReleaseRegisters(CA_HERE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  SetRegisters(kRegisters, at);
}
template <int kRegisters>
void ClaimRegisters(CA_HERE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  SetRegisters(kRegisters, at);
}

}  // namespace cachedattn::cuda
