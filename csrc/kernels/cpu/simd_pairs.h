// Operands as pairs of bfloat16, two elements a word, multiplied by VDPBF16PS. Included after
// simd_gemm.h where the compiler has AVX512_BF16.
//
// Measured on one thread: twice the float32 FMA rate on AMD Zen 4 (220 against 110 GFLOP/s), half
// of it on Intel Sapphire Rapids (85 against 175), so only the former uses it by default (isa.cc).
// Rounding K, P and Q to bfloat16 costs what it costs everybody who keeps rotated K in bfloat16.
#pragma once

struct PairOperands {
  static constexpr int kPerWord = 2;
  static Simd::F Fma(Simd::F a, Simd::F b, Simd::F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Reads and writes up to the next multiple of 32 floats and of 16 words.
  static void PackRow(float* x, int n) {
    for (int i = 0; i < n; i += 32) {
      const __m512bh words = _mm512_cvtne2ps_pbh(Simd::Load(x + i + 16), Simd::Load(x + i));
      _mm512_storeu_si512(x + i / 2, reinterpret_cast<__m512i>(words));
    }
  }
  // Word (i / 2, j) holds column j of rows i and i + 1.
  static void PackColumns(float* x, int n) {
    for (int i = 0; i < n; i += 2) {
      for (int j = 0; j < kKeyTile; j += 16) {
        const __m512i even = Round(Simd::Load(x + i * kKeyTile + j));
        const __m512i odd = Round(Simd::Load(x + (i + 1) * kKeyTile + j));
        _mm512_storeu_si512(x + i / 2 * kKeyTile + j,
                            _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
  // Word (j / 2, i) holds rows j and j + 1 of column i; the row after an odd last one is 0.
  static void PackValues(const Bf16* const* rows, int64_t offset, int n, int dim, float* v) {
    for (int j = 0; j < n; j += 2) {
      for (int i = 0; i < dim; i += 16) {
        const __m512i even = Widen(rows[j] + offset + i);
        const __m512i odd = j + 1 < n ? Widen(rows[j + 1] + offset + i) : _mm512_setzero_si512();
        _mm512_storeu_si512(v + j / 2 * dim + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }

 private:
  static __m512i Round(Simd::F x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  static __m512i Widen(const Bf16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
};

template <>
struct OperandsOf<Bf16> {
  using Type = PairOperands;
};
