// Device instructions, one source for two machines (design D12): inline PTX under nvcc, and under
// g++ the bodies of csrc/emu/, where a block's threads run as fibers. Kernels touch shared memory,
// barriers, tensor cores and the block's indices only through these functions.
//
// Shared memory is addressed by ordinary pointers into what SharedMemory() returns.
#pragma once

#include <cstdint>

namespace cachedattn::cuda {

// Elements of K, V, q and out, by their bits.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Vectors of the widths that one instruction loads or stores.
struct alignas(8) U2 {
  uint32_t x, y;
};
struct alignas(16) U4 {
  uint32_t x, y, z, w;
};
struct alignas(8) F2 {
  float x, y;
};
struct alignas(16) F4 {
  float x, y, z, w;
};
struct Index3 {
  int x, y, z;
};

}  // namespace cachedattn::cuda

#ifndef __CUDACC__
#include "csrc/emu/device.h"
#else

#define CA_DEVICE __device__ __forceinline__
// A kernel of `threads` threads a block that should fit `blocks` times on a multiprocessor.
#define CA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define CA_GRID_CONSTANT const __grid_constant__
#define CA_UNROLL _Pragma("unroll")

namespace cachedattn::cuda {

CA_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
CA_DEVICE int LaneIndex() { return static_cast<int>(threadIdx.x % 32); }
CA_DEVICE Index3 BlockIndex() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}

// The block's dynamic shared memory, aligned to 1024 bytes. Its content is undefined.
CA_DEVICE char* SharedMemory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
CA_DEVICE uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Ordinary accesses to shared memory. V is 2 to 16 bytes; `p` is aligned to its size.
template <typename V>
CA_DEVICE V LoadShared(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
CA_DEVICE void StoreShared(void* p, V value) {
  *static_cast<V*>(p) = value;
}

// The same value. What follows from it is computed here, each time, and not kept in registers from
// before a loop: for kernels that have none to spare.
CA_DEVICE int Here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
CA_DEVICE float Here(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
CA_DEVICE const char* Here(const char* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// ---- barriers, shuffles, atomics ----

CA_DEVICE void SyncThreads() { __syncthreads(); }
CA_DEVICE void SyncWarp() { __syncwarp(); }
// Barriers 1 to 15 among `threads` threads, whole warps; 0 is SyncThreads.
CA_DEVICE void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
CA_DEVICE void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Every lane of the warp takes part.
CA_DEVICE float ShuffleXor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
CA_DEVICE uint32_t ShuffleFrom(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }
// Global memory. Returns what stood there before.
CA_DEVICE int AtomicAdd(int* p, int value) { return atomicAdd(p, value); }
// Writes before it are seen by other blocks before writes after it.
CA_DEVICE void ThreadFence() { __threadfence(); }
// Reads what other blocks wrote in this launch, past this multiprocessor's own cache.
CA_DEVICE float LoadFresh(const float* p) { return __ldcg(p); }

// ---- arithmetic ----

CA_DEVICE float Exp2(float x) {  // 2^x, relative error 2^-22; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CA_DEVICE float Log2(float x) { return __log2f(x); }
CA_DEVICE float Divide(float a, float b) { return __fdividef(a, b); }  // 2 ulp; |b| < 2^126
CA_DEVICE float Fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
CA_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
CA_DEVICE float Infinity() { return __int_as_float(0x7f800000); }

// Two 16-bit elements in a word, the lower half first, rounded to nearest even.
template <typename T>
CA_DEVICE uint32_t PackPair(float lower, float upper);
template <>
CA_DEVICE uint32_t PackPair<Bf16>(float lower, float upper) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  return word;
}
template <>
CA_DEVICE uint32_t PackPair<Fp16>(float lower, float upper) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  return word;
}
template <typename T>
CA_DEVICE F2 UnpackPair(uint32_t word);
template <>
CA_DEVICE F2 UnpackPair<Bf16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
CA_DEVICE F2 UnpackPair<Fp16>(uint32_t word) {
  F2 pair;
  asm("{.reg .f16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b;}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
}

// ---- asynchronous copies, global to shared, 16 bytes a thread (sm_80) ----

// Copies 16 bytes, or writes zeros and reads nothing when not `valid`. Both aligned to 16.
CA_DEVICE void CpAsync16(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
}
// Closes a group of this thread's copies; then waits until at most kPending groups are under way.
// Other threads see the bytes only after a barrier that follows the wait.
CA_DEVICE void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
CA_DEVICE void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores (sm_80) ----

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and
// receives in r[i] elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i. Rows are 16
// bytes, aligned.
CA_DEVICE void LoadMatrix4(const void* row, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// The same, each matrix transposed: elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
CA_DEVICE void LoadMatrix4Transposed(const void* row, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// Transposes an 8x8 matrix that lies across the warp as LoadMatrix4 leaves it.
CA_DEVICE uint32_t TransposeMatrix(uint32_t r) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(r));
  return out;
}

// c [16, 8] += a [16, 16] b [16, 8], float32 sums. With g = lane / 4, t = lane % 4:
//   a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..)
//   b[0] = (2t.., g), b[1] = (2t + 8.., g)        ".." is an element and the next one in a word
//   c[0], c[1] = (g, 2t), (g, 2t + 1); c[2], c[3] = (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
CA_DEVICE void Mma16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
CA_DEVICE void Mma16816<Bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
CA_DEVICE void Mma16816<Fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace cachedattn::cuda

#endif
