#include "csrc/kernels/cuda/tensor_map.h"

namespace cachedattn::cuda {

// The driver's conditions, and rows of 128 bytes.
bool MakeTensorMap(TensorMap* map, const void* base, DType dtype, const int64_t sizes[5],
                   const int64_t strides_bytes[4], const int box[5]) {
  constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStride = int64_t{1} << 40;
  if (SizeOf(dtype) != 2 || reinterpret_cast<uintptr_t>(base) % 16 != 0 || box[0] != 64) {
    return false;
  }
  TensorMap made = {static_cast<const char*>(base), {}, {2}, {}};
  for (int i = 0; i < 5; ++i) {
    if (sizes[i] <= 0 || sizes[i] > kMaxSize || box[i] <= 0 || box[i] > 256) return false;
    made.sizes[i] = sizes[i];
    made.box[i] = box[i];
    if (i == 0) continue;
    const int64_t stride = strides_bytes[i - 1];
    if (stride < 0 || stride >= kMaxStride || stride % 16 != 0) return false;
    made.strides[i] = stride;
  }
  *map = made;
  return true;
}

}  // namespace cachedattn::cuda
