// In place of cuda_gpu.cc where there is no CUDA toolkit.
#include "csrc/copy/gpu.h"

namespace cachedattn {

Result<std::unique_ptr<Gpu>> OpenCudaGpu(uint32_t index) {
  return Status(Code::kInvalidArgument, "device: cuda:" + std::to_string(index) +
                                            " needs a build with CUDA, which this is not");
}

}  // namespace cachedattn
