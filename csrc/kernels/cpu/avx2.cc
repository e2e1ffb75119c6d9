#define CA_SIMD_HEADER "csrc/kernels/cpu/simd_avx2.h"
#define CA_SIMD_NAME "avx2"
#define CA_SIMD_TABLE kAvx2Kernels
#define CA_SIMD_NARROWER kReferenceKernels
#include "csrc/kernels/cpu/simd_kernels.h"
