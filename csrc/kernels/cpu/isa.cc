#include "csrc/kernels/cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace cachedattn {
namespace {

bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The table that CACHEDATTN_CPU_ISA names, or the fastest one; never one the machine lacks.
const CpuKernels& Choose() {
  const auto supported = SupportedCpuKernels();
  const char* asked = std::getenv("CACHEDATTN_CPU_ISA");
  for (const CpuKernels* kernels : supported) {
    if (asked != nullptr && std::strcmp(asked, kernels->name) == 0) return *kernels;
  }
  // Intel's VDPBF16PS is slower than its float32 FMA (simd_pairs.h).
  const bool avoid_pairs = supported.back() == &kAvx512Bf16Kernels && !__builtin_cpu_is("amd");
  return avoid_pairs ? kAvx512Kernels : *supported.back();
}

}  // namespace

std::span<const CpuKernels* const> SupportedCpuKernels() {
  static constexpr const CpuKernels* kAll[] = {&kReferenceKernels, &kAvx2Kernels, &kAvx512Kernels,
                                               &kAvx512Bf16Kernels};
  const bool bf16 = HasAvx512() && __builtin_cpu_supports("avx512bf16");
  return std::span(kAll).first(bf16 ? 4 : HasAvx512() ? 3 : HasAvx2() ? 2 : 1);
}

const CpuKernels& ActiveCpuKernels() {
  static const CpuKernels& kernels = Choose();
  return kernels;
}

const char* CpuIsaName() { return ActiveCpuKernels().name; }

}  // namespace cachedattn
