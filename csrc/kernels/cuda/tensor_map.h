// What tells the copy engine (TMA) the shape of a tensor in device memory.
#pragma once

#include "csrc/base/types.h"
#include "csrc/kernels/cuda/device_sm90.h"

namespace cachedattn::cuda {

// Describes a 5-D tensor of 16-bit elements: sizes and the box that one copy moves, innermost
// first, and the strides in bytes of all but the innermost dimension. Rows of a box (box[0]
// elements, 128 bytes at most) are swizzled in shared memory as SwizzledOffset says; what lies
// outside of the tensor arrives as zeros. `base` and strides are multiples of 16, strides below
// 2^40. False: it cannot be described, or the driver is too old.
bool MakeTensorMap(TensorMap* map, const void* base, DType dtype, const int64_t sizes[5],
                   const int64_t strides_bytes[4], const int box[5]);

}  // namespace cachedattn::cuda
