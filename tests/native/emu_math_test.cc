// The emulated tensor core and conversion functions against the PTX manual's fragment layouts,
// which are written out here element by element, and against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/emu/launch.h"
#include "tests/native/testing/elements.h"

namespace cachedattn::cuda {
namespace {

uint32_t Word(const uint16_t* elements) { return elements[0] | uint32_t{elements[1]} << 16; }

// ---- mma ----

template <typename T>
CA_KERNEL(32, 1)
MmaKernel(const T* a, const T* b, float* c) {
  const int group = LaneIndex() >> 2, member = LaneIndex() % 4;
  // PTX, m16n8k16: element i of A's fragment lies in row group (+ 8 for i = 2, 3, 6, 7), column
  // 2 member + (i & 1) (+ 8 for i >= 4); of B's in row 2 member + (i & 1) (+ 8 for i >= 2), column
  // group; of C's in row group (+ 8 for i >= 2), column 2 member + (i & 1).
  uint16_t a_elements[8], b_elements[4];
  float sums[4];
  for (int i = 0; i < 8; ++i) {
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    a_elements[i] = a[row * 16 + member * 2 + (i & 1) + (i >= 4 ? 8 : 0)].bits;
  }
  for (int i = 0; i < 4; ++i) {
    b_elements[i] = b[(member * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group].bits;
    sums[i] = c[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
  }
  const uint32_t a_words[4] = {Word(a_elements), Word(a_elements + 2), Word(a_elements + 4),
                               Word(a_elements + 6)};
  const uint32_t b_words[2] = {Word(b_elements), Word(b_elements + 2)};
  Mma16816<T>(sums, a_words, b_words);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = sums[i];
}

template <typename T>
void CheckMma() {
  const auto a = RandomElements<T>(16 * 16, 1), b = RandomElements<T>(16 * 8, 2);
  std::vector<float> c(16 * 8);
  for (int i = 0; i < 128; ++i) c[i] = 0.25f * i;
  const std::vector<float> before = c;
  ASSERT_EQ(Launch(MmaKernel<T>, {1, 1, 1}, 32, 0, nullptr, a.data(), b.data(), c.data()), nullptr);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = before[i * 8 + j];
      for (int k = 0; k < 16; ++k) {
        sum += double{emu::ToFloat<T>(a[i * 16 + k].bits)} * emu::ToFloat<T>(b[k * 8 + j].bits);
      }
      EXPECT_NEAR(c[i * 8 + j], sum, 2e-5) << i << " " << j;
    }
  }
}
TEST(EmuMathTest, MmaOfBf16) { CheckMma<Bf16>(); }
TEST(EmuMathTest, MmaOfFp16) { CheckMma<Fp16>(); }

// ---- ldmatrix, movmatrix ----

// out[matrix][lane] words: LoadMatrix4, the same transposed, and TransposeMatrix of the former.
CA_KERNEL(32, 1) MatrixKernel(uint32_t (*out)[32]) {
  char* shared = SharedMemory();
  // Element (row, column) of matrix m is 100 m + 8 row + column. Rows of all matrices lie apart.
  const int lane = LaneIndex(), pitch = 48;
  for (int column = 0; column < 8; ++column) {
    const uint16_t element = static_cast<uint16_t>(lane / 8 * 100 + lane % 8 * 8 + column);
    StoreShared(shared + lane * pitch + 2 * column, element);
  }
  SyncWarp();
  uint32_t r[4], transposed[4];
  LoadMatrix4(shared + lane * pitch, r);
  LoadMatrix4Transposed(shared + lane * pitch, transposed);
  for (int m = 0; m < 4; ++m) {
    out[m][lane] = r[m];
    out[4 + m][lane] = transposed[m];
    out[8 + m][lane] = TransposeMatrix(r[m]);
  }
}

TEST(EmuMathTest, Matrices) {
  uint32_t out[12][32];
  ASSERT_EQ(Launch(MatrixKernel, {1, 1, 1}, 32, 32 * 48, nullptr, &out[0]), nullptr);
  for (int m = 0; m < 4; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t first = 100 * m;
      // Lane l holds elements 2 (l % 4), + 1 of row l / 4, or of column l / 4 when transposed.
      const uint32_t row = lane / 4, column = lane % 4 * 2;
      EXPECT_EQ(out[m][lane], (first + 8 * row + column) | (first + 8 * row + column + 1) << 16);
      const uint32_t transposed = (first + 8 * column + row) | (first + 8 * column + 8 + row) << 16;
      EXPECT_EQ(out[4 + m][lane], transposed);
      EXPECT_EQ(out[8 + m][lane], transposed);
    }
  }
}

// ---- shuffles ----

CA_KERNEL(32, 1) ShuffleKernel(float* by_xor, uint32_t* by_lane) {
  const int lane = LaneIndex();
  by_xor[lane] = ShuffleXor(static_cast<float>(lane), 5);
  by_lane[lane] = ShuffleFrom(100 + lane, (lane * 7 + 3) % 32);
}
TEST(EmuMathTest, Shuffles) {
  float by_xor[32];
  uint32_t by_lane[32];
  ASSERT_EQ(Launch(ShuffleKernel, {1, 1, 1}, 32, 0, nullptr, &by_xor[0], &by_lane[0]), nullptr);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(by_xor[lane], lane ^ 5);
    EXPECT_EQ(by_lane[lane], 100u + (lane * 7 + 3) % 32);
  }
}

// ---- conversions ----

// The value of 16 bits with `mantissa_bits`, from their definition.
double Value(uint16_t bits, int mantissa_bits) {
  const int exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double fraction = std::ldexp(bits & ((1 << mantissa_bits) - 1), -mantissa_bits);
  const double sign = bits >> 15 ? -1. : 1.;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0. ? sign * INFINITY : std::numeric_limits<double>::quiet_NaN();
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias)
                               : std::ldexp(1. + fraction, exponent - bias));
}

template <typename T, int kMantissaBits>
void CheckConversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = Value(static_cast<uint16_t>(bits), kMantissaBits);
    const float converted = emu::ToFloat<T>(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(converted)) << bits;
      ASSERT_EQ(emu::ToBits<T>(converted), 0x7fff);
      continue;
    }
    ASSERT_EQ(converted, value) << bits;
    ASSERT_EQ(emu::ToBits<T>(converted), bits);
    // Between it and the next one away from zero: the tie goes to the even one. Past the largest
    // number, the "next" is where it would be if exponents went on, and means infinity.
    if (std::isinf(value)) continue;
    double next = Value(static_cast<uint16_t>(bits + 1), kMantissaBits);
    if (std::isinf(next)) next = 2. * value - Value(static_cast<uint16_t>(bits - 1), kMantissaBits);
    const float middle = static_cast<float>(value + (next - value) / 2.);
    const float away = value < 0. || bits == 0x8000 ? -INFINITY : INFINITY;
    ASSERT_EQ(emu::ToBits<T>(middle), bits % 2 == 0 ? bits : bits + 1) << bits;
    ASSERT_EQ(emu::ToBits<T>(std::nextafter(middle, 0.f)), bits) << bits;
    ASSERT_EQ(emu::ToBits<T>(std::nextafter(middle, away)), bits + 1) << bits;
  }
}
TEST(EmuMathTest, Bf16Conversions) { CheckConversions<Bf16, 7>(); }
TEST(EmuMathTest, Fp16Conversions) { CheckConversions<Fp16, 10>(); }

TEST(EmuMathTest, Exp2) {
  EXPECT_EQ(Exp2(-INFINITY), 0.f);
  EXPECT_EQ(Exp2(-127.f), 0.f);  // subnormal results are flushed
  EXPECT_EQ(Exp2(10.f), 1024.f);
  EXPECT_TRUE(std::isnan(Exp2(NAN)));
}

}  // namespace
}  // namespace cachedattn::cuda
