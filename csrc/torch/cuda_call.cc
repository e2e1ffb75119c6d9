#include "csrc/torch/cuda_call.h"

#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda.so, which a CPU build of torch does not have.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace cachedattn {

void CallOnStream(const char* op, const Device& device,
                  const std::function<const char*(void* stream)>& start) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                  ": this build of torch has no CUDA streams");
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  const char* error = start(stream);
  STD_TORCH_CHECK(error == nullptr, op, ": ", error);
}

}  // namespace cachedattn
