// Hopper's instructions (sm_90a): mbarriers, the bulk tensor copy engine (TMA), wgmma, register
// reallocation. As device.h: inline PTX under nvcc, csrc/emu/ under g++.
//
// Shared memory tiles that TMA writes and wgmma reads have rows of 128 bytes (64 elements), eight
// rows to a 1024-byte atom, atoms aligned to 1024 bytes; 16-byte chunk c of row r lies at chunk
// c ^ (r % 8) ("128-byte swizzle"). SwizzledOffset below is that map.
#pragma once

#include "csrc/kernels/cuda/device.h"

namespace cachedattn::cuda {

// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in a swizzled tile of 128-byte rows.
CA_DEVICE constexpr int SwizzledOffset(int row, int chunk) {
  return row * 128 + (chunk ^ (row % 8)) * 16;
}

}  // namespace cachedattn::cuda

#ifndef __CUDACC__
#include "csrc/emu/device_sm90.h"
#else

#include <cuda.h>

namespace cachedattn::cuda {

using TensorMap = CUtensorMap;  // a kernel parameter: CA_GRID_CONSTANT TensorMap

// ---- mbarriers: 8 bytes of shared memory, phases alternate 0, 1, 0, .. ----

// `arrivals` arrivals (and all expected bytes) end a phase. One thread; then FenceBarrierInit and
// SyncThreads before others use it.
CA_DEVICE void MbarrierInit(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
CA_DEVICE void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
CA_DEVICE void MbarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` more of TmaLoad.
CA_DEVICE void MbarrierArriveExpect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// Returns once the phase of this parity has ended.
CA_DEVICE void MbarrierWait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @done bra finish;\n bra again;\nfinish:\n}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
// Orders this thread's ordinary writes to shared memory before reads by wgmma or TMA that follow a
// barrier. Every writing thread calls it before that barrier.
CA_DEVICE void FenceProxyAsync() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA ----

// One thread: copies a box of the 5-D tensor (the box was fixed with the map) at coordinates c,
// innermost first, to swizzled rows at `shared` (aligned to 1024); its bytes complete on `barrier`.
// What lies outside of the tensor arrives as zeros, and counts.
CA_DEVICE void TmaLoad5(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                        int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(SharedAddress(shared)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
CA_DEVICE void PrefetchTensorMap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- wgmma: a warpgroup (4 warps from a multiple of 4) multiplies from shared memory ----

// Descriptor of an operand in 128-byte swizzled atoms. K-major (64 elements of depth in a row):
// `stride` = bytes between groups of 8 rows (1024 where they are adjacent), `leading` unused.
// MN-major (64 columns in a row, depth down the rows): `stride` = bytes between groups of 8 depths,
// `leading` = bytes between blocks of 64 columns. `p` may lie 32, 64 or 96 bytes into a row.
CA_DEVICE uint64_t WgmmaDescriptor(const void* p, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return (static_cast<uint64_t>((SharedAddress(p) & 0x3ffff) >> 4)) |
         (static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16) |
         (static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32) | (kSwizzle128 << 62);
}
// Before the first wgmma that uses registers written by this thread.
CA_DEVICE void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CA_DEVICE void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are under way; only then are their registers valid.
template <int kPending>
CA_DEVICE void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins registers of wgmma to this place: what computes them stays before it, what uses them stays
// after it. The compiler does not know that wgmma works on them until the wait; call this before
// WgmmaFence on registers that were computed, and after WgmmaWait on those it made valid.
template <int N>
CA_DEVICE void PinRegisters(float (&r)[N]) {
  CA_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
CA_DEVICE void PinRegisters(uint32_t (&r)[N]) {
  CA_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// wgmma_mma.h defines, for N = 64 and 128 (the sums in d, N / 2 floats a thread: d[4 j + i] is
// column 8 j + 2 (lane % 4) + i % 2 of row 16 warp + lane / 4 + 8 (i / 2)):
//   WgmmaShared<T, N>(d, desc_a, desc_b, accumulate)            d [64, N] (+)= A [64, 16] B
//   WgmmaRegisters<T, N, kTransposeB>(d, a, desc_b, accumulate)  A in registers, as Mma16816's a of
//                                                                rows 16 warp + 0..15
// A is K-major; B is [16, N]: K-major as [N][16] rows of depth, or MN-major when kTransposeB.

// ---- registers ----

template <int kRegisters>
CA_DEVICE void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
CA_DEVICE void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace cachedattn::cuda

#include "csrc/kernels/cuda/wgmma_mma.h"

#endif
