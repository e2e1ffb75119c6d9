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

// The table that CACHEDATTN_CPU_ISA names, or the widest one; never one the machine lacks.
const CpuKernels& Choose() {
  const auto supported = SupportedCpuKernels();
  const char* asked = std::getenv("CACHEDATTN_CPU_ISA");
  for (const CpuKernels* kernels : supported) {
    if (asked != nullptr && std::strcmp(asked, kernels->name) == 0) return *kernels;
  }
  return *supported.back();
}

}  // namespace

std::span<const CpuKernels* const> SupportedCpuKernels() {
  static constexpr const CpuKernels* kAll[] = {&kReferenceKernels, &kAvx2Kernels, &kAvx512Kernels};
  return std::span(kAll).first(HasAvx512() ? 3 : HasAvx2() ? 2 : 1);
}

const CpuKernels& ActiveCpuKernels() {
  static const CpuKernels& kernels = Choose();
  return kernels;
}

const char* CpuIsaName() { return ActiveCpuKernels().name; }

}  // namespace cachedattn
