// Random elements for tests of the emulated instructions.
#pragma once

#include <random>
#include <vector>

#include "csrc/emu/float16.h"
#include "csrc/kernels/cuda/device.h"

namespace cachedattn::cuda {

template <typename T>
std::vector<T> RandomElements(int n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) value.bits = emu::ToBits<T>(normal(generator));
  return values;
}

}  // namespace cachedattn::cuda
