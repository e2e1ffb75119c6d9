// The bodies of csrc/kernels/cuda/launch.h under g++, and what tests set.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>

#include "csrc/kernels/cuda/launch.h"

namespace cachedattn::emu {

// From here on launches make their random choices from this seed.
void SetSeed(uint64_t seed);
// What ComputeCapability() answers; 80 at first.
void SetComputeCapability(int capability);

// The grid of a launch, and where that is.
struct Grid {
  Grid(cuda::Index3 size, std::source_location at = std::source_location::current())
      : size(size), at(at) {}
  Grid(int x, int y, int z, std::source_location at = std::source_location::current())
      : size{x, y, z}, at(at) {}
  cuda::Index3 size;
  std::source_location at;
};

const char* RunGrid(void (*body)(const void*), const void* context, const Grid& grid, int threads,
                    int shared_bytes);

}  // namespace cachedattn::emu

namespace cachedattn::cuda {

// Runs the blocks one after the other, in a random order. The text lives until the next launch.
template <typename... Params, typename... Args>
const char* Launch(void (*kernel)(Params...), const emu::Grid& grid, int threads, int shared_bytes,
                   void* /*stream*/, const Args&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  };
  const Call call = {kernel, std::tuple<Params...>(args...)};
  const auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.params);
  };
  return emu::RunGrid(body, &call, grid, threads, shared_bytes);
}

inline const char* ZeroMemory(void* p, int64_t bytes, void* /*stream*/) {
  std::memset(p, 0, bytes);
  return nullptr;
}

int ComputeCapability();

}  // namespace cachedattn::cuda
