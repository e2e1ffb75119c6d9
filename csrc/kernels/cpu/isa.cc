#include "csrc/kernels/cpu/isa.h"

namespace cachedattn {

const CpuKernels& ActiveCpuKernels() { return kReferenceKernels; }

const char* CpuIsaName() { return ActiveCpuKernels().name; }

}  // namespace cachedattn
