// kv_append, rope_apply_ and merge_states of the CUDA sources on the emulated device, on random
// shapes, strides and beginnings, against float64. What a call must not touch is NaN before and
// after; buffers end where the last element does.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "csrc/kernels/params.h"
#include "tests/native/testing/attention_case.h"

namespace cachedattn {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();

// Half of the distance between two numbers, relative to them; float32's is within the tests' own
// tolerance.
double Rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 0. : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Choices of a test, from its seed.
class Dice {
 public:
  explicit Dice(uint32_t seed) : generator_(seed) {}
  int64_t Pick(std::initializer_list<int64_t> values) {
    return values.begin()[generator_() % values.size()];
  }
  int64_t Between(int64_t low, int64_t high) { return low + generator_() % (high - low + 1); }
  float Normal() { return normal_(generator_); }
  std::vector<int64_t> Shuffled(int64_t n) {
    std::vector<int64_t> values(n);
    std::iota(values.begin(), values.end(), 0);
    std::shuffle(values.begin(), values.end(), generator_);
    return values;
  }

 private:
  std::mt19937 generator_;
  std::normal_distribution<float> normal_;
};

// A buffer whose element 0 lies `begin` elements after an aligned address.
struct Buffer {
  Buffer(DType dtype, int64_t begin, int64_t count)
      : elements(dtype, begin + count), begin(begin), dtype(dtype) {}
  void* data() { return elements.data() + begin * SizeOf(dtype); }
  float Get(int64_t i) const { return elements.Get(begin + i); }
  void Set(int64_t i, float value) { elements.Set(begin + i, value); }

  Elements elements;
  int64_t begin;
  DType dtype;
};

class CudaCache : public ::testing::TestWithParam<DType> {};

TEST_P(CudaCache, AppendWritesItsPlacesOnly) {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(seed);
    Dice dice(seed);
    const DType dtype = GetParam();
    const int64_t heads = dice.Between(1, 5), block = dice.Pick({16, 32}), slots = 3;
    const int64_t dim = dice.Pick({16, 64, 80, 128}), tokens = dice.Between(0, 40);
    KvAppendParams p;
    p.num_tokens = tokens;
    p.kv.dtype = dtype;
    p.kv.num_slots = slots;
    p.kv.num_kv_heads = static_cast<int>(heads);
    p.kv.block_size = static_cast<int>(block);
    p.kv.head_dim = static_cast<int>(dim);
    p.kv.token_stride = dim + dice.Pick({0, 0, 1, 16});
    p.kv.head_stride = block * p.kv.token_stride;
    p.kv.kv_stride = heads * p.kv.head_stride + dice.Pick({0, 0, 3});
    p.kv.slot_stride = 2 * p.kv.kv_stride + dice.Pick({0, 0, 5, 64});
    p.k_token_stride = heads * dim + dice.Pick({0, 0, 1, 32});
    p.v_token_stride = heads * dim + dice.Pick({0, 0, 1, 32});
    // As long as the last token needs, that a read beyond it is found.
    const auto source = [&](int64_t stride) {
      Buffer buffer(dtype, dice.Pick({0, 0, 1, 8}),
                    tokens > 0 ? (tokens - 1) * stride + heads * dim : 0);
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t i = 0; i < heads * dim; ++i) buffer.Set(n * stride + i, dice.Normal());
      }
      return buffer;
    };
    Buffer k = source(p.k_token_stride), v = source(p.v_token_stride);
    Buffer kv(dtype, dice.Pick({0, 0, 1, 8}), slots * p.kv.slot_stride);
    std::vector<int64_t> places = dice.Shuffled(slots * block);
    places.resize(tokens);
    for (int64_t& place : places) place = dice.Between(0, 5) == 0 ? -1 : place;

    std::vector<float> expected(slots * p.kv.slot_stride, std::nanf(""));
    for (int64_t n = 0; n < tokens; ++n) {
      if (places[n] < 0) continue;
      for (int64_t i = 0; i < heads * dim; ++i) {
        const int64_t to = places[n] / block * p.kv.slot_stride +
                           places[n] % block * p.kv.token_stride + i / dim * p.kv.head_stride +
                           i % dim;
        expected[to] = k.Get(n * p.k_token_stride + i);
        expected[to + p.kv.kv_stride] = v.Get(n * p.v_token_stride + i);
      }
    }
    p.k = k.data(), p.v = v.data(), p.kv.data = kv.data();
    p.slot_mapping = places.data();
    ASSERT_STREQ(CudaKvAppend(p, nullptr), nullptr);
    for (size_t i = 0; i < expected.size(); ++i) {
      const float found = kv.Get(i);
      ASSERT_TRUE(found == expected[i] || (std::isnan(found) && std::isnan(expected[i]))) << i;
    }
  }
}

// The tables of positions below 256 * num_hi, theta 10000.
struct Tables {
  Tables(int rotary_dim, bool interleaved, int num_hi) {
    for (int i = 0; i < rotary_dim / 2; ++i) {
      inv_freq.push_back(std::pow(10000., -2. * i / rotary_dim));
    }
    lo.resize(256 * rotary_dim), hi.resize(num_hi * rotary_dim);
    RopeTable(inv_freq.data(), rotary_dim / 2, 256, 1, lo.data());
    RopeTable(inv_freq.data(), rotary_dim / 2, num_hi, 256, hi.data());
    rope.lo = lo.data(), rope.hi = hi.data();
    rope.num_hi = num_hi, rope.rotary_dim = rotary_dim, rope.interleaved = interleaved;
  }
  std::vector<double> inv_freq;
  std::vector<float> lo, hi;
  RopeTables rope;
};

TEST_P(CudaCache, RopeRotatesInPlace) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Dice dice(seed);
    const int dim = static_cast<int>(dice.Pick({16, 64, 80, 128, 600}));
    const int rotary = static_cast<int>(dice.Pick({dim, dim, dim / 2, 2, 10, 12, 0}));
    const int64_t tokens = dice.Between(0, 6), heads = dice.Between(1, 9);
    const Tables tables(rotary, dice.Between(0, 1) == 1, 16);
    RopeApplyParams p;
    p.dtype = GetParam();
    p.num_tokens = tokens;
    p.num_heads = static_cast<int>(heads), p.head_dim = dim;
    p.head_stride = dim + dice.Pick({0, 0, 1, 16});
    p.token_stride = heads * p.head_stride + dice.Pick({0, 0, 1, 16});
    p.rope = tables.rope;
    p.inverse = dice.Between(0, 1) == 1;
    const int64_t size =
        tokens > 0 ? (tokens - 1) * p.token_stride + (heads - 1) * p.head_stride + dim : 0;
    Buffer x(p.dtype, dice.Pick({0, 0, 1, 8}), size);
    std::vector<double> expected(size, std::nan(""));
    std::vector<int32_t> positions;
    for (int64_t n = 0; n < tokens; ++n) {
      positions.push_back(static_cast<int32_t>(dice.Between(0, 4095)));
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = n * p.token_stride + h * p.head_stride;
        for (int d = 0; d < dim; ++d) {
          x.Set(row + d, dice.Normal());
          expected[row + d] = x.Get(row + d);
        }
        for (int pair = 0; pair < rotary / 2; ++pair) {
          const int64_t a = row + (p.rope.interleaved ? 2 * pair : pair);
          const int64_t b = row + (p.rope.interleaved ? 2 * pair + 1 : pair + rotary / 2);
          const double angle = positions[n] * tables.inv_freq[pair] * (p.inverse ? -1 : 1);
          expected[a] = x.Get(a) * std::cos(angle) - x.Get(b) * std::sin(angle);
          expected[b] = x.Get(b) * std::cos(angle) + x.Get(a) * std::sin(angle);
        }
      }
    }
    p.x = x.data(), p.positions = positions.data();
    ASSERT_STREQ(CudaRopeApply(p, nullptr), nullptr);
    for (int64_t i = 0; i < size; ++i) {
      if (std::isnan(expected[i])) {
        ASSERT_TRUE(std::isnan(x.Get(i))) << i;
      } else {
        ASSERT_NEAR(x.Get(i), expected[i], 3e-6 + Rounding(p.dtype) * std::fabs(expected[i])) << i;
      }
    }
  }
}

TEST_P(CudaCache, MergeWeighsStates) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Dice dice(seed);
    MergeParams p;
    p.dtype = GetParam();
    p.num_states = static_cast<int>(dice.Between(1, 5));
    p.num_rows = dice.Between(0, 9);
    p.num_heads = static_cast<int>(dice.Between(1, 3));
    p.head_dim = static_cast<int>(dice.Pick({1, 15, 16, 80, 128}));
    const int64_t rows = p.num_rows * p.num_heads, states = p.num_states, dim = p.head_dim;
    Buffer o(p.dtype, dice.Pick({0, 0, 1, 8}), states * rows * dim);
    std::vector<float> lse(states * rows), lse_out(rows, std::nanf(""));
    for (int64_t i = 0; i < states * rows; ++i) {
      // A state without keys may hold anything: it keeps its NaN.
      lse[i] = dice.Between(0, 3) == 0 ? -kInf : 4.f * dice.Normal();
      for (int64_t d = 0; d < dim && lse[i] > -kInf; ++d) o.Set(i * dim + d, dice.Normal());
    }
    Buffer out(p.dtype, dice.Pick({0, 0, 1, 8}), rows * dim);
    p.o = o.data(), p.lse = lse.data(), p.out = out.data(), p.lse_out = lse_out.data();
    ASSERT_STREQ(CudaMergeStates(p, nullptr), nullptr);
    for (int64_t row = 0; row < rows; ++row) {
      double total = 0;
      std::vector<double> sum(dim);
      for (int64_t s = 0; s < states; ++s) {
        const double weight = std::exp(double{lse[s * rows + row]});
        total += weight;
        for (int64_t d = 0; d < dim && weight > 0; ++d) {
          sum[d] += weight * o.Get((s * rows + row) * dim + d);
        }
      }
      if (total == 0) {
        ASSERT_EQ(lse_out[row], -kInf);
      } else {
        ASSERT_NEAR(lse_out[row], std::log(total), 2e-6);
      }
      for (int64_t d = 0; d < dim; ++d) {
        const double expected = total == 0 ? 0. : sum[d] / total;
        ASSERT_NEAR(out.Get(row * dim + d), expected,
                    2e-6 + Rounding(p.dtype) * std::fabs(expected));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaCache, ::testing::ValuesIn(kDTypes),
                         [](const auto& info) { return Name(info.param); });

}  // namespace
}  // namespace cachedattn
