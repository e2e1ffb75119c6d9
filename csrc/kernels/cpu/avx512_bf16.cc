#define CA_SIMD_HEADER "csrc/kernels/cpu/simd_avx512.h"
#define CA_SIMD_NAME "avx512_bf16"
#define CA_SIMD_TABLE kAvx512Bf16Kernels
#define CA_SIMD_NARROWER kAvx2Kernels
#include "csrc/kernels/cpu/simd_kernels.h"
