#include "csrc/kernels/cuda/tensor_map.h"

#include <cuda_runtime.h>

namespace cachedattn::cuda {
namespace {

// The driver's function. It is asked for by name: the library then needs no libcuda to link or to
// load, on machines without a GPU too.
decltype(&cuTensorMapEncodeTiled) FindEncode() {
  constexpr unsigned int kSince = 12000;  // the CUDA version that brought it
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kSince, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

bool MakeTensorMap(TensorMap* map, const void* base, DType dtype, const int64_t sizes[5],
                   const int64_t strides_bytes[4], const int box[5]) {
  static const auto encode = FindEncode();
  if (encode == nullptr) return false;
  cuuint64_t global_sizes[5], global_strides[4];
  cuuint32_t box_sizes[5], element_strides[5];
  for (int i = 0; i < 5; ++i) {
    global_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    box_sizes[i] = static_cast<cuuint32_t>(box[i]);
    element_strides[i] = 1;
  }
  for (int i = 0; i < 4; ++i) global_strides[i] = static_cast<cuuint64_t>(strides_bytes[i]);
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 5, const_cast<void*>(base), global_sizes, global_strides, box_sizes,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace cachedattn::cuda
