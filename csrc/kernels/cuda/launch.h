// Starting a kernel: on a stream under nvcc, at once and block by block under emulation.
#pragma once

#include "csrc/kernels/cuda/device.h"

#ifndef __CUDACC__
#include "csrc/emu/launch.h"
#else

#include <cuda_runtime.h>

namespace cachedattn::cuda {

// nullptr, or what went wrong.
template <typename... Params, typename... Args>
const char* Launch(void (*kernel)(Params...), Index3 grid, int threads, int shared_bytes,
                   void* stream, const Args&... args) {
  constexpr int kSharedWithoutAsking = 48 << 10;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Fills device memory with zero bytes, in stream order.
inline const char* ZeroMemory(void* p, int64_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Compute capability of the current device, 80 or 90 say; 0 where there is none.
inline int ComputeCapability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return 0;
  }
  return 10 * major + minor;
}

}  // namespace cachedattn::cuda

#endif
