// CudaAttnPaged on the emulated device: every kernel against float64, on the shapes that tell.
#include <gtest/gtest.h>

#include "csrc/emu/launch.h"
#include "tests/native/testing/attention_case.h"

namespace cachedattn {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// Relative L2 of the output, and absolute error of lse. The tensor core kernels round rotated q and
// k, which a row of few keys shows in full.
double Tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kBFloat16 ? 5e-3 : 8e-4;
}
double LseTolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-4 : dtype == DType::kBFloat16 ? 1.5e-2 : 2e-3;
}

// L2 norms of x - y and of y, over [begin, end).
struct Norms {
  double error = 0., expected = 0.;
};
Norms NormsOf(const std::vector<float>& x, const std::vector<float>& y, size_t begin, size_t end) {
  Norms n;
  for (size_t i = begin; i < end; ++i) {
    n.error += (double{x[i]} - y[i]) * (double{x[i]} - y[i]);
    n.expected += double{y[i]} * y[i];
  }
  return {std::sqrt(n.error), std::sqrt(n.expected)};
}
double RelativeError(const AttentionResult& actual, const AttentionResult& expected) {
  const Norms n = NormsOf(actual.out, expected.out, 0, expected.out.size());
  return n.error / std::max(n.expected, 1e-30);
}

void Check(const AttentionShape& shape) {
  SCOPED_TRACE(Describe(shape));
  AttentionCase one(shape);
  const AttentionResult actual = one.Run(), expected = one.Reference(false);
  if (testing::Test::HasFailure()) return;
  ASSERT_LE(RelativeError(actual, expected), Tolerance(shape.dtype));
  // A relative error of the whole hides a wrong row: every row on its own, with some room.
  for (size_t row = 0; row < expected.lse.size(); ++row) {
    const size_t begin = row * shape.head_dim, end = begin + shape.head_dim;
    const Norms n = NormsOf(actual.out, expected.out, begin, end);
    ASSERT_LE(n.error, 8 * Tolerance(shape.dtype) * std::max(n.expected, .05)) << "row " << row;
    if (std::isinf(expected.lse[row])) {
      ASSERT_EQ(actual.lse[row], expected.lse[row]) << "row " << row;
      ASSERT_EQ(n.error, 0.) << "row " << row;
    } else {
      ASSERT_NEAR(actual.lse[row], expected.lse[row], LseTolerance(shape.dtype)) << "row " << row;
    }
  }
}

class CudaAttention : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    emu::SetSeed(1);
    emu::SetComputeCapability(GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(ComputeCapability, CudaAttention, testing::Values(80, 90),
                         testing::PrintToStringParamName());

TEST_P(CudaAttention, TakesEveryHeadDimAndPairing) {
  uint32_t seed = 0;
  for (const DType dtype : kDTypes) {
    for (const int head_dim : {16, 64, 80, 96, 128, 256}) {
      for (const bool interleaved : {false, true}) {
        AttentionShape shape{{1, 35, 2}, {100, 70, 17}};
        shape.dtype = dtype;
        shape.head_dim = head_dim;
        shape.interleaved = interleaved;
        shape.block_size = 16 << seed % 4;
        shape.seed = seed++;
        Check(shape);
      }
    }
  }
}

TEST_P(CudaAttention, TakesEveryGroup) {
  uint32_t seed = 100;
  for (const int group : {1, 3, 4, 7, 8, 16, 17}) {
    AttentionShape shape{{1, 2, 9}, {65, 130, 40}, 2 * group, 2, 64};
    shape.dtype = seed % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    shape.block_size = 16 << seed % 4;
    shape.seed = seed++;
    Check(shape);
  }
}

TEST_P(CudaAttention, TakesEveryLength) {
  AttentionShape shape;
  for (const int q_len : {1, 2, 5, 17, 64, 130}) {
    for (const int kv_len : {0, 1, 63, 64, 65, 300}) {
      shape.q_lens.push_back(q_len);
      shape.kv_lens.push_back(kv_len);
    }
  }
  shape.q_lens.push_back(0);
  shape.kv_lens.push_back(40);
  shape.q_heads = 3;
  shape.kv_heads = 1;
  Check(shape);
}

TEST_P(CudaAttention, MergesManySplits) {
  for (const DType dtype : kDTypes) {
    AttentionShape shape{{1, 70, 4}, {2200, 900, 300}, 3, 1};
    shape.dtype = dtype;
    shape.block_size = 64;
    shape.sinks = true;  // join the denominator once, not once a split
    Check(shape);
  }
}

// Splits of two kernels in one call, with unlike numbers of row blocks.
TEST_P(CudaAttention, KeepsTheSplitsOfKernelsApart) {
  Check({{130, 70, 1}, {900, 800, 700}, 1, 1});
}

// As many splits as there are, of as few rows: the workspace is filled.
TEST_P(CudaAttention, DecodesALongContext) {
  AttentionShape shape{{1}, {8300}, 4, 1};
  shape.block_size = 128;
  Check(shape);
}
TEST_P(CudaAttention, HidesKeysOutsideOfTheWindow) {
  for (const int window : {1, 17, 64, 100}) {
    AttentionShape shape{{1, 40, 3}, {700, 200, 64}};
    shape.window = window;
    shape.seed = window;
    Check(shape);
    shape.dtype = DType::kFloat32;
    Check(shape);
  }
}

TEST_P(CudaAttention, CapsLogitsAndAddsSinks) {
  for (const DType dtype : kDTypes) {
    AttentionShape shape{{1, 30}, {150, 90}, 6, 2, 128};
    shape.dtype = dtype;
    shape.softcap = 2.f;
    Check(shape);
    shape.sinks = true;
    shape.window = 20;
    Check(shape);
    shape.softcap = 0.f;
    Check(shape);
  }
}

TEST_P(CudaAttention, RotatesTheFirstDimsOnly) {
  uint32_t seed = 200;
  for (const DType dtype : kDTypes) {
    for (const int rotary_dim : {0, 2, 20, 32, 64}) {
      for (const bool interleaved : {false, true}) {
        AttentionShape shape{{1, 33}, {90, 80}, 4, 2, 80};
        shape.dtype = dtype;
        shape.rotary_dim = rotary_dim;
        shape.interleaved = interleaved;
        shape.seed = seed++;
        Check(shape);
      }
    }
  }
}

TEST_P(CudaAttention, GivesRowsWithoutKeysZerosAndMinusInfinity) {
  for (const DType dtype : kDTypes) {
    AttentionShape shape{{2, 5, 0, 1, 80}, {0, 3, 40, 9, 20}};  // no key; more rows than keys
    shape.dtype = dtype;
    shape.sinks = true;
    Check(shape);
  }
}

TEST_P(CudaAttention, TakesRowsThatAreNotAligned) {
  AttentionShape shape{{1, 33}, {90, 80}};
  for (const int gap : {8, 3}) {
    shape.q_gap = gap;
    Check(shape);
  }
}

TEST(CudaAttentionPlan, IsRefusedWhereNoPlanHasItsSize) {
  AttnParams p;
  p.num_rows = 1, p.num_q_heads = p.kv.num_kv_heads = 1, p.kv.head_dim = 64;
  for (const int64_t size : {0, 5, 13, 15}) {  // no header; no item; half of one, one and a bit
    p.plan_size = size;
    EXPECT_GE(CudaAttnWorkspaceBytes(p), 0);
    const char* error = CudaAttnPaged(p, 1, nullptr, nullptr);
    ASSERT_NE(error, nullptr) << size;
    EXPECT_STREQ(error, "plan: was not made by attn_plan for these rows");
  }
}

// The usual pipeline: rotate, round to the dtype, attend with rounded weights.
void CheckAgainstRounding(const AttentionShape& shape) {
  AttentionCase one(shape);
  const AttentionResult expected = one.Reference(false);
  EXPECT_LE(RelativeError(one.Run(), expected), 1.5 * RelativeError(one.Reference(true), expected))
      << Describe(shape);
}

TEST_P(CudaAttention, IsNoWorseThanRotatingRoundingAndAttending) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int q_len : {1, 40}) {
      AttentionShape shape{{q_len}, {700}, 6, 2, 128};
      shape.dtype = dtype;
      shape.seed = q_len;
      CheckAgainstRounding(shape);
    }
  }
}

// 12 key tiles in a split, more than any ring of stages holds, and logits so far apart that a row's
// peak rises again and again.
TEST_P(CudaAttention, FollowsThePeakOverManyTiles) {
  for (const int head_dim : {64, 128}) {
    AttentionShape shape{{130}, {800}, 2, 1, head_dim};
    shape.dtype = head_dim == 64 ? DType::kBFloat16 : DType::kFloat16;
    shape.spread = 8.f;
    CheckAgainstRounding(shape);
  }
}

// Bit for bit: whatever its batch mates, whatever order the threads and blocks run in.
TEST_P(CudaAttention, DependsOnTheSequenceAlone) {
  for (const DType dtype : kDTypes) {
    AttentionShape shape{{1, 64, 130, 3}, {900, 300, 130, 40}, 6, 2};
    shape.dtype = dtype;
    AttentionCase batch(shape);
    const AttentionResult whole = batch.Run();
    emu::SetSeed(2);
    EXPECT_TRUE(batch.Run(100) == whole) << Describe(shape);
    size_t row = 0;
    for (size_t b = 0; b < shape.q_lens.size(); ++b) {
      const AttentionResult alone = batch.Alone(static_cast<int>(b)).Run();
      const size_t rows = alone.lse.size(), dim = shape.head_dim;
      const auto out = whole.out.begin() + row * dim, lse = whole.lse.begin() + row;
      EXPECT_TRUE(alone == (AttentionResult{{out, out + rows * dim}, {lse, lse + rows}}))
          << Describe(shape) << ", sequence " << b;
      row += rows;
    }
  }
}

// The batch of a CUDA graph: sequences without rows, and a plan that ends with items of zeros.
TEST_P(CudaAttention, LeavesItemsOfZerosAlone) {
  for (const DType dtype : kDTypes) {
    AttentionShape shape{{1, 64, 130, 0, 0}, {900, 300, 130, 0, 0}, 6, 2};
    shape.dtype = dtype;
    AttentionCase batch(shape);
    EXPECT_TRUE(batch.Run(0, 9) == batch.Run()) << Describe(shape);
  }
}

TEST_P(CudaAttention, TakesRandomShapes) {
  std::mt19937 random(7);
  const auto pick = [&](const auto& choices) { return choices[random() % std::size(choices)]; };
  for (int i = 0; i < 12; ++i) {
    AttentionShape shape;
    for (int b = 0; b < 3; ++b) {
      shape.q_lens.push_back(1 + random() % (random() % 2 == 0 ? 8 : 80));
      shape.kv_lens.push_back(random() % 400);
    }
    shape.kv_heads = 1 + random() % 2;
    shape.q_heads = shape.kv_heads * (1 + random() % 9);
    shape.head_dim = pick(std::vector<int>{64, 80, 96, 128, 256, 48});
    shape.dtype = pick(kDTypes);
    shape.block_size = 16 << random() % 4;
    shape.rotary_dim = pick(std::vector<int>{-1, -1, 0, 32, 48});
    shape.interleaved = random() % 2 == 0;
    shape.window = pick(std::vector<int>{0, 0, 1, 50, 150});
    shape.softcap = pick(std::vector<float>{0.f, 0.f, 5.f});
    shape.sinks = random() % 2 == 0;
    shape.seed = 1000 + i;
    Check(shape);
  }
}

}  // namespace
}  // namespace cachedattn
