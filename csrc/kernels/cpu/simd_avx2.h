// 8-lane vectors (AVX2, FMA, F16C). Included by one translation unit, inside its anonymous
// namespace: nothing here may leak into portable code.
#pragma once

struct Simd {
  using F = __m256;
  static constexpr int kLanes = 8;
  // 6 rows x 2 vectors: 12 sums + 2 loads + a broadcast of 16 registers.
  static constexpr int kColumns = 2;
  static constexpr int kDotRows = 2;  // 2 rows x 4 keys of sums in decode

  static F Zero() { return _mm256_setzero_ps(); }
  static F Set(float x) { return _mm256_set1_ps(x); }
  static F Load(const float* p) { return _mm256_loadu_ps(p); }
  static F Load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F Load(const Fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void Store(F x, float* p) { _mm256_storeu_ps(p, x); }
  static void Store(F x, Bf16* p) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  static void Store(F x, Fp16* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
  static F Fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  static F Round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F ClampExponent(F x) { return Max(x, Set(-125.f)); }
  // x * 2^exponent, for x in [0.5, 2] and whole exponents from -125 to 126.
  static F Scale(F x, F exponent) {
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shift));
  }
  static float ReduceMax(F x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
  static float ReduceAdd(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }

  // Lanes [begin, end) of x, `other` elsewhere.
  static F Keep(F x, int begin, int end, F other) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(before, below)));
  }

  // out[i] = fn(a[i], b[i]) for 8 floats.
  template <typename Fn>
  static void ForEach8(const float* a, const float* b, float* out, const Fn& fn) {
    Store(fn(Load(a), Load(b)), out);
  }

  // Interleaved pairs: (a0, b0, a1, b1, ..).
  static F SwapPairs(F x) { return _mm256_permute_ps(x, 0xb1); }
  static F Evens(F x) { return _mm256_moveldup_ps(x); }
  static F Odds(F x) { return _mm256_movehdup_ps(x); }
  static F NegateEvens(F x) {
    return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_set1_epi64x(int64_t{0x80000000})));
  }
  // 16 floats at p: the even ones to a, the odd ones to b.
  static void Split(const float* p, F* a, F* b) {
    const F x = Load(p), y = Load(p + 8);
    const F even = _mm256_shuffle_ps(x, y, 0x88), odd = _mm256_shuffle_ps(x, y, 0xdd);
    *a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    *b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
  }

  // The sums of a, b, c and d to p[0..3].
  static void Sum4(F a, F b, F c, F d, float* p) {
    const F abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }

  // out[c * out_stride + r] = in[r * in_stride + c] for 8 x 8.
  static void Transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    F x[8], y[8];
    for (int i = 0; i < 8; i += 2) {
      const F a = Load(in + i * in_stride), b = Load(in + (i + 1) * in_stride);
      x[i] = _mm256_unpacklo_ps(a, b);
      x[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4) {
      y[i] = _mm256_shuffle_ps(x[i], x[i + 2], 0x44);
      y[i + 1] = _mm256_shuffle_ps(x[i], x[i + 2], 0xee);
      y[i + 2] = _mm256_shuffle_ps(x[i + 1], x[i + 3], 0x44);
      y[i + 3] = _mm256_shuffle_ps(x[i + 1], x[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      Store(_mm256_permute2f128_ps(y[i], y[i + 4], 0x20), out + i * out_stride);
      Store(_mm256_permute2f128_ps(y[i], y[i + 4], 0x31), out + (i + 4) * out_stride);
    }
  }
};
