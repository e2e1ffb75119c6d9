// Sums of slices on the host, and those of their leaves by the CUDA source on the emulated device:
// random sizes, rows and fills, against the host's. Buffers end where the last word does; what must
// not be written is poison before and after.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "csrc/base/slice_sum.h"
#include "csrc/kernels/params.h"

namespace cachedattn {
namespace {

using Words = std::vector<uint64_t>;

Words RandomWords(std::mt19937_64* random, uint64_t count) {
  Words words(count);
  std::ranges::generate(words, *random);
  return words;
}

std::span<const std::byte> BytesOf(const Words& words) { return std::as_bytes(std::span(words)); }

Words LeafSums(std::span<const std::byte> slice) {
  Words sums;
  while (!slice.empty()) {
    const auto leaf = slice.first(std::min<uint64_t>(kLeafBytes, slice.size()));
    sums.push_back(LeafSum(leaf));
    slice = slice.subspan(leaf.size());
  }
  return sums;
}

TEST(SliceSum, IsThatOfItsLeaves) {
  std::mt19937_64 random(1);
  for (const uint64_t words : {1, 511, 512, 513, 16 * 512, 512 * 512, 512 * 512 + 1, 600 * 512}) {
    const Words slice = RandomWords(&random, words);
    EXPECT_EQ(SumOfSlice(BytesOf(slice)), SumOfLeaves(LeafSums(BytesOf(slice)))) << words;
  }
}

TEST(SliceSum, IsTheSameByEveryInstructionSet) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 100; ++i) {
    const Words leaf = RandomWords(&random, kLeafBytes / 8);
    const uint64_t sum = FullLeafSumSse2(BytesOf(leaf).data(), &TheLeafSecret());
    EXPECT_EQ(LeafSum(BytesOf(leaf)), sum);
    if (!__builtin_cpu_supports("avx2")) continue;
    EXPECT_EQ(FullLeafSumAvx2(BytesOf(leaf).data(), &TheLeafSecret()), sum);
  }
}

TEST(SliceSum, AnyFlippedBitChangesIt) {
  std::mt19937_64 random(2);
  for (const uint64_t words : {3, 512, 700, 513 * 512}) {
    Words slice = RandomWords(&random, words);
    const SliceSum before = SumOfSlice(BytesOf(slice));
    for (int i = 0; i < 200; ++i) {
      const uint64_t word = random() % words, bit = uint64_t{1} << random() % 64;
      slice[word] ^= bit;
      EXPECT_NE(SumOfSlice(BytesOf(slice)), before) << "word " << word << " of " << words;
      slice[word] ^= bit;
    }
    std::swap(slice.front(), slice.back());
    EXPECT_NE(SumOfSlice(BytesOf(slice)), before);
  }
}

TEST(CudaLeafSums, AreTheHosts) {
  constexpr uint64_t kPoison = 0xABCDEF;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const uint64_t row_words = 1 + random() % 300, rows = 1 + random() % 12;
    const uint64_t words = rows * row_words;
    LeafSumsParams p;
    p.num_slices = static_cast<int>(1 + random() % (seed == 0 ? LeafSumsParams::kMaxSlices : 6));
    p.size = static_cast<uint32_t>(8 * words);
    p.row_bytes = static_cast<uint32_t>(8 * row_words);
    const LeafSecret& secret = TheLeafSecret();
    std::ranges::copy(secret.words, p.secret);
    std::ranges::copy(secret.last, p.secret_last);
    std::ranges::copy(secret.end, p.secret_end);
    std::vector<Words> slices, sums;
    for (int i = 0; i < p.num_slices; ++i) {
      slices.push_back(RandomWords(&random, words));
      sums.emplace_back(NumLeaves(p.size) + 1, kPoison);
      p.slices[i] = slices[i].data();
      p.sums[i] = sums[i].data();
      const uint64_t used = random() % 3 == 0 ? row_words : random() % (row_words + 1);
      p.used_bytes[i] = static_cast<uint32_t>(8 * used);
    }
    ASSERT_EQ(CudaLeafSums(p, nullptr), nullptr);
    for (int i = 0; i < p.num_slices; ++i) {
      for (uint64_t word = 0; word < words; ++word) {
        if (word % row_words * 8 >= p.used_bytes[i]) slices[i][word] = 0;
      }
      Words expected = LeafSums(BytesOf(slices[i]));
      expected.push_back(kPoison);
      EXPECT_EQ(sums[i], expected) << "slice " << i;
    }
  }
}

}  // namespace
}  // namespace cachedattn
