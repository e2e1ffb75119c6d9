// Sums of the leaves of layer slices on CUDA (csrc/base/slice_sum.h): XXH3-64 of 4 KiB under a
// secret. A warp takes a leaf: 8 lanes have an accumulator each, and 4 such groups every fourth
// stripe of 64 bytes; what they add up is brought together before each scrambling.
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/params.h"

namespace cachedattn {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kLanes = 8;     // accumulators, words of a stripe
constexpr int kGroups = 4;    // of lanes in a warp
constexpr int kStripes = 16;  // between two scramblings
constexpr int kTurns = kStripes / kGroups;
constexpr int kParts = 4;  // of a leaf, each of kStripes
constexpr int kPartBytes = kStripes * kLanes * 8;
constexpr int kLeaf = kParts * kPartBytes;

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F,
                   kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63,
                   kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kAvalanche = 0x165667919E3779F9;

// What accumulator i begins with. Chosen without an array, which would lie in memory.
CA_DEVICE uint64_t First(int i) {
  const uint64_t low = i == 0 ? kPrime32_3 : i == 1 ? kPrime64_1 : i == 2 ? kPrime64_2 : kPrime64_3;
  const uint64_t high = i == 4   ? kPrime64_4
                        : i == 5 ? kPrime32_2
                        : i == 6 ? kPrime64_5
                                 : kPrime32_1;
  return i < 4 ? low : high;
}

CA_DEVICE uint64_t ShuffleXor64(uint64_t value, int mask) {
  const int from = LaneIndex() ^ mask;
  const uint64_t low = ShuffleFrom(static_cast<uint32_t>(value), from);
  return low | static_cast<uint64_t>(ShuffleFrom(static_cast<uint32_t>(value >> 32), from)) << 32;
}

CA_DEVICE uint64_t MultiplyFold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// The word at `at` of a slice; 0 where it ends, and after the first bytes of each row that count.
CA_DEVICE uint64_t WordAt(const LeafSumsParams& p, const uint64_t* slice, uint32_t used,
                          uint32_t at) {
  if (at >= p.size || (used < p.row_bytes && at % p.row_bytes >= used)) return 0;
  return slice[at / 8];
}

// What is added to lane i's accumulator for a part of a leaf; keys[n] is for stripe n * kGroups +
// the group.
CA_DEVICE uint64_t PartSum(const LeafSumsParams& p, const uint64_t* slice, uint32_t used,
                           uint32_t begin, const uint64_t (&keys)[kTurns]) {
  uint64_t words[kTurns];
  CA_UNROLL
  for (int n = 0; n < kTurns; ++n) {
    words[n] = WordAt(p, slice, used, begin + (n * 32 + LaneIndex()) * 8);
  }
  uint64_t own = 0, others = 0;
  CA_UNROLL
  for (int n = 0; n < kTurns; ++n) {
    const uint64_t keyed = words[n] ^ keys[n];
    own += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    others += words[n];
  }
  own += ShuffleXor64(others, 1);
  own += ShuffleXor64(own, kLanes);
  return own + ShuffleXor64(own, 2 * kLanes);
}

CA_KERNEL(kThreads, 1) LeafSumsKernel(CA_GRID_CONSTANT LeafSumsParams p) {
  const int which = BlockIndex().y;
  const int leaf = BlockIndex().x * kWarps + ThreadIndex() / 32;
  const uint32_t begin = static_cast<uint32_t>(leaf) * kLeaf;
  if (begin >= p.size) return;  // the whole warp
  const auto* slice = static_cast<const uint64_t*>(p.slices[which]);
  const uint32_t used = p.used_bytes[which];
  const int i = LaneIndex() % kLanes, group = LaneIndex() / kLanes;
  const uint64_t scramble = p.secret[kStripes + i];
  uint64_t keys[kTurns];
  CA_UNROLL
  for (int n = 0; n < kTurns; ++n) keys[n] = p.secret[n * kGroups + group + i];
  uint64_t sum = First(i);
  for (int part = 0; part < kParts - 1; ++part) {
    sum += PartSum(p, slice, used, begin + part * kPartBytes, keys);
    sum = (sum ^ sum >> 47 ^ scramble) * kPrime32_1;
  }
  if (group == kGroups - 1) keys[kTurns - 1] = p.secret_last[i];
  sum += PartSum(p, slice, used, begin + (kParts - 1) * kPartBytes, keys);
  sum ^= p.secret_end[i];
  sum = MultiplyFold(sum, ShuffleXor64(sum, 1));
  sum += ShuffleXor64(sum, 2);
  sum += ShuffleXor64(sum, 4);
  sum += kLeaf * kPrime64_1;
  sum = (sum ^ sum >> 37) * kAvalanche;
  if (LaneIndex() == 0) p.sums[which][leaf] = sum ^ sum >> 32;
}

}  // namespace
}  // namespace cuda

const char* CudaLeafSums(const LeafSumsParams& p, void* stream) {
  const int leaves = static_cast<int>((p.size + cuda::kLeaf - 1) / cuda::kLeaf);
  return cuda::Launch(cuda::LeafSumsKernel,
                      {(leaves + cuda::kWarps - 1) / cuda::kWarps, p.num_slices, 1}, cuda::kThreads,
                      0, stream, p);
}

}  // namespace cachedattn
