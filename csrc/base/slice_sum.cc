#include "csrc/base/slice_sum.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>

namespace cachedattn {

namespace {

constexpr size_t kGroup = 512;  // sums of leaves

LeafSecret MakeLeafSecret() {
  LeafSecret secret;
  uint64_t state = 0;
  for (uint64_t& word : secret.words) {  // Steele, Lea, Flood: Fast Splittable PRNGs, OOPSLA'14
    state += 0x9E3779B97F4A7C15;
    word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9;
    word = (word ^ word >> 27) * 0x94D049BB133111EB;
    word ^= word >> 31;
  }
  const auto* bytes = reinterpret_cast<const std::byte*>(secret.words.data());
  std::memcpy(secret.last.data(), bytes + 121, sizeof(secret.last));
  std::memcpy(secret.end.data(), bytes + 11, sizeof(secret.end));
  return secret;
}

uint64_t FullLeafSum(const std::byte* leaf) {
  static const bool avx2 = __builtin_cpu_supports("avx2");
  const LeafSecret* secret = &TheLeafSecret();
  return avx2 ? FullLeafSumAvx2(leaf, secret) : FullLeafSumSse2(leaf, secret);
}

// The sum of leaves so far, and one group more.
XXH128_hash_t Add(const XXH128_hash_t& before, std::span<const uint64_t> group) {
  return XXH3_128bits_withSeed(group.data(), group.size_bytes(), before.low64);
}

SliceSum ToBytes(const XXH128_hash_t& hash) {
  SliceSum sum;
  std::memcpy(sum.data(), &hash.low64, 8);
  std::memcpy(sum.data() + 8, &hash.high64, 8);
  return sum;
}

}  // namespace

const LeafSecret& TheLeafSecret() {
  static const LeafSecret secret = MakeLeafSecret();
  return secret;
}

uint64_t FullLeafSumSse2(const std::byte* leaf, const LeafSecret* secret) {
  return XXH3_64bits_withSecret(leaf, kLeafBytes, secret, LeafSecret::kBytes);
}

uint64_t LeafSum(std::span<const std::byte> leaf) {
  if (leaf.size() == kLeafBytes) return FullLeafSum(leaf.data());
  alignas(64) std::array<std::byte, kLeafBytes> filled;
  std::fill(std::copy(leaf.begin(), leaf.end(), filled.begin()), filled.end(), std::byte{0});
  return FullLeafSum(filled.data());
}

SliceSum SumOfLeaves(std::span<const uint64_t> leaf_sums) {
  XXH128_hash_t hash = {0, 0};
  while (!leaf_sums.empty()) {
    const auto group = leaf_sums.first(std::min(kGroup, leaf_sums.size()));
    hash = Add(hash, group);
    leaf_sums = leaf_sums.subspan(group.size());
  }
  return ToBytes(hash);
}

SliceSum SumOfSlice(std::span<const std::byte> slice) {
  XXH128_hash_t hash = {0, 0};
  std::array<uint64_t, kGroup> sums;
  while (!slice.empty()) {
    size_t count = 0;
    for (; count < kGroup && !slice.empty(); ++count) {
      const size_t size = std::min<size_t>(kLeafBytes, slice.size());
      sums[count] = LeafSum(slice.first(size));
      slice = slice.subspan(size);
    }
    hash = Add(hash, std::span(sums).first(count));
  }
  return ToBytes(hash);
}

}  // namespace cachedattn
