// Stands in for xxHash where a benchmark asks what checksums cost: every sum is 0, at once.
#pragma once

#include <cstddef>
#include <cstdint>

struct XXH128_hash_t {
  uint64_t low64, high64;
};

inline uint64_t XXH3_64bits(const void*, size_t) { return 0; }
inline uint64_t XXH3_64bits_withSeed(const void*, size_t, uint64_t) { return 0; }
inline uint64_t XXH3_64bits_withSecret(const void*, size_t, const void*, size_t) { return 0; }
inline XXH128_hash_t XXH3_128bits_withSeed(const void*, size_t, uint64_t) { return {0, 0}; }
