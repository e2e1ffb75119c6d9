// The sum of a layer slice's bytes, which a GPU takes as well as the host: before the slice leaves
// it, so that a copy that came too early or went astray cannot be sealed in.
//
// A slice, filled up with zeros, is cut into leaves of 4 KiB. Each leaf's sum is XXH3-64 under a
// secret of ours. The slice's is XXH3-128 of these sums; of more than 512, it is that of each 512,
// seeded with the first half of the one before. So the leaves are independent of each other, and
// the host's rate is that of one XXH3.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "csrc/base/types.h"

namespace cachedattn {

using SliceSum = std::array<uint8_t, 16>;

constexpr uint64_t kLeafBytes = 4096;
constexpr uint64_t NumLeaves(uint64_t slice_bytes) {
  return (slice_bytes + kLeafBytes - 1) / kLeafBytes;
}

// The secret of the leaves: the first 24 numbers of SplitMix64 from 0, 192 bytes. XXH3 takes some
// of its words from odd places: those of the last stripe from byte 121, of the end from byte 11.
struct LeafSecret {
  static constexpr size_t kBytes = 192;
  std::array<uint64_t, kBytes / 8> words;
  std::array<uint64_t, 8> last, end;
};
const LeafSecret& TheLeafSecret();

// `leaf` is 1 to kLeafBytes long.
uint64_t LeafSum(std::span<const std::byte> leaf);
// Of a whole leaf: by what every x86-64 has, and in half the time, where memory gives the bytes as
// fast, by AVX2. LeafSum chooses.
uint64_t FullLeafSumSse2(const std::byte* leaf, const LeafSecret* secret);
uint64_t FullLeafSumAvx2(const std::byte* leaf, const LeafSecret* secret);
SliceSum SumOfLeaves(std::span<const uint64_t> leaf_sums);
SliceSum SumOfSlice(std::span<const std::byte> slice);

}  // namespace cachedattn
