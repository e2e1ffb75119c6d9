#include "csrc/emu/launch.h"

#include <algorithm>
#include <string>
#include <vector>

#include "csrc/emu/block.h"

namespace cachedattn::emu {
namespace {

uint64_t seed = 1;
int compute_capability = 80;

}  // namespace

void SetSeed(uint64_t value) { seed = value * 0xd1342543de82ef95u; }
void SetComputeCapability(int capability) { compute_capability = capability; }

const char* RunGrid(void (*body)(const void*), const void* context, const Grid& grid, int threads,
                    int shared_bytes) {
  static std::string error;
  const cuda::Index3 size = grid.size;
  if (threads <= 0 || threads > kMaxThreads || threads % 32 != 0 || shared_bytes < 0 ||
      shared_bytes > kMaxSharedBytes || size.x <= 0 || size.y <= 0 || size.z <= 0 ||
      size.y > 65535 || size.z > 65535) {
    error = std::string("invalid launch in ") + grid.at.function_name();
    return error.c_str();
  }
  const int64_t num_blocks = int64_t{size.x} * size.y * size.z;
  std::vector<int64_t> order(num_blocks);
  for (int64_t i = 0; i < num_blocks; ++i) order[i] = i;
  for (int64_t i = 0; i < num_blocks; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i], order[i + static_cast<int64_t>((seed >> 20) % (num_blocks - i))]);
  }
  for (const int64_t i : order) {
    const cuda::Index3 index = {static_cast<int>(i % size.x), static_cast<int>(i / size.x % size.y),
                                static_cast<int>(i / size.x / size.y)};
    if (!block.Run(body, context, index, threads, shared_bytes, seed + i)) {
      error = block.Error() + " (launched in " + grid.at.function_name() + ")";
      return error.c_str();
    }
  }
  return nullptr;
}

}  // namespace cachedattn::emu

namespace cachedattn::cuda {

int ComputeCapability() { return emu::compute_capability; }

}  // namespace cachedattn::cuda
