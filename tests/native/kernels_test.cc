// Every instruction set's attention against the portable one, with buffers of exactly the size
// that a call may touch: under AddressSanitizer an overrun of scratch, K, V or out fails here.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "csrc/kernels/cpu/isa.h"

namespace cachedattn {
namespace {

struct Shape {
  std::vector<int> q_lens, kv_lens;
  int q_heads = 4, kv_heads = 2, head_dim = 64, block_size = 16, rotary_dim = 64;
  bool interleaved = false;
  int window = 0;
  float softcap = 0.f;
};

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

void RunOnThreads(int n, void (*fn)(void*, int), void* ctx) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; ++i) threads.emplace_back(fn, ctx, i);
  for (std::thread& thread : threads) thread.join();
}

// A batch with blocks in reverse order, float32.
class Batch {
 public:
  explicit Batch(const Shape& shape) : shape_(shape) {
    int slots = 0;
    for (const int kv_len : shape.kv_lens) {
      const int blocks = (kv_len + shape.block_size - 1) / shape.block_size;
      slots += blocks;
      max_blocks_ = std::max(max_blocks_, blocks);
    }
    for (size_t b = 0; b < shape.q_lens.size(); ++b) {
      cu_q_.push_back(cu_q_.back() + shape.q_lens[b]);
      for (int i = 0; i < max_blocks_; ++i)
        table_.push_back(i * shape.block_size < shape.kv_lens[b] ? --slots : -1);
    }
    const int64_t block = int64_t{shape.block_size} * shape.head_dim;
    int64_t num_slots = 0;
    for (const int32_t slot : table_) num_slots = std::max<int64_t>(num_slots, slot + 1);
    kv_ = Random(num_slots * 2 * shape.kv_heads * block, 1);
    q_ = Random(int64_t{cu_q_.back()} * shape.q_heads * shape.head_dim, 2);
    std::vector<double> inv_freq;
    for (int i = 0; i < shape.rotary_dim / 2; ++i) {
      inv_freq.push_back(std::pow(10000., -2. * i / shape.rotary_dim));
    }
    lo_.resize(256 * shape.rotary_dim);
    hi_.resize(12 * shape.rotary_dim);
    RopeTable(inv_freq.data(), shape.rotary_dim / 2, 256, 1, lo_.data());
    RopeTable(inv_freq.data(), shape.rotary_dim / 2, 12, 256, hi_.data());
    plan_ = MakeAttnPlan(cu_q_.data(), shape.kv_lens.data(), static_cast<int>(shape.q_lens.size()),
                         shape.q_heads / shape.kv_heads, 2);
  }

  // out followed by lse.
  std::vector<float> Run(const CpuKernels& kernels, int threads) {
    const int64_t rows = cu_q_.back(), row = int64_t{shape_.q_heads} * shape_.head_dim;
    std::vector<float> out(rows * row), lse(rows * shape_.q_heads);
    AttnParams p;
    p.q = q_.data();
    p.out = out.data();
    p.lse = lse.data();
    p.num_rows = rows;
    p.num_seqs = static_cast<int>(shape_.q_lens.size());
    p.num_q_heads = shape_.q_heads;
    p.q_token_stride = p.out_token_stride = row;
    p.block_table = table_.data();
    p.max_blocks = max_blocks_;
    p.kv_lens = shape_.kv_lens.data();
    p.cu_q = cu_q_.data();
    p.plan = plan_.data();
    p.plan_size = static_cast<int64_t>(plan_.size());
    const int64_t head = int64_t{shape_.block_size} * shape_.head_dim;
    p.kv = {kv_.data(),
            DType::kFloat32,
            static_cast<int64_t>(kv_.size()) / (2 * shape_.kv_heads * head),
            shape_.kv_heads,
            shape_.block_size,
            shape_.head_dim,
            2 * shape_.kv_heads * head,
            shape_.kv_heads * head,
            head,
            shape_.head_dim};
    p.rope = {lo_.data(), hi_.data(), 12, shape_.rotary_dim, shape_.interleaved};
    p.sm_scale = 1.f / std::sqrt(static_cast<float>(shape_.head_dim));
    p.window = shape_.window;
    p.softcap = shape_.softcap;
    // A thread of its own: its scratch is new, so exactly as large as this call asks for.
    std::thread([&] { AttnPagedWith(kernels, p, {threads, RunOnThreads}); }).join();
    out.insert(out.end(), lse.begin(), lse.end());
    return out;
  }

 private:
  Shape shape_;
  int max_blocks_ = 1;
  std::vector<int32_t> cu_q_ = {0}, table_, plan_;
  std::vector<float> kv_, q_, lo_, hi_;
};

class KernelsTest : public testing::TestWithParam<Shape> {};

TEST_P(KernelsTest, EveryInstructionSetAgreesWithTheReference) {
  Batch batch(GetParam());
  const std::vector<float> expected = batch.Run(kReferenceKernels, 1);
  for (const CpuKernels* kernels : SupportedCpuKernels()) {
    const std::vector<float> actual = batch.Run(*kernels, 1);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      if (std::isinf(expected[i])) {
        ASSERT_EQ(actual[i], expected[i]) << kernels->name << " at " << i;
      } else {
        ASSERT_NEAR(actual[i], expected[i], 3e-5) << kernels->name << " at " << i;
      }
    }
  }
}

TEST_P(KernelsTest, ThreadsDoNotChangeABit) {
  Batch batch(GetParam());
  for (const CpuKernels* kernels : SupportedCpuKernels()) {
    EXPECT_EQ(batch.Run(*kernels, 1), batch.Run(*kernels, 3)) << kernels->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, KernelsTest,
                         testing::Values(Shape{{1}, {1}}, Shape{{1}, {65}}, Shape{{1, 1}, {0, 700}},
                                         Shape{{3}, {515}, 9, 3}, Shape{{1, 20}, {2900, 2400}},
                                         Shape{{70}, {70}, 6, 2, 80, 32, 80},
                                         Shape{{65, 5}, {600, 2}, 7, 1, 96, 128, 32, true},
                                         Shape{{10}, {90}, 2, 2, 16, 16, 16},
                                         Shape{{1}, {90}, 2, 1, 256, 16, 0},
                                         Shape{{40}, {300}, 4, 2, 64, 64, 20, false, 33, 2.f}));

TEST(AttnPlan, CoversEveryVisibleKeyOnceAndKnowsItsLengths) {
  const std::vector<int32_t> cu_q = {0, 1, 200, 200}, kv_lens = {3000, 500, 9};
  std::vector<int32_t> plan = MakeAttnPlan(cu_q.data(), kv_lens.data(), 3, 1, 4);
  const auto matches = [&](const std::vector<int32_t>& lens) {
    return AttnPlanMatches(plan.data(), static_cast<int64_t>(plan.size()), cu_q.data(), lens.data(),
                           3);
  };
  EXPECT_TRUE(matches(kv_lens));
  EXPECT_FALSE(matches({3000, 501, 9}));
  plan.back() ^= 1;
  EXPECT_FALSE(matches(kv_lens));
}

}  // namespace
}  // namespace cachedattn
