// 8-lane vectors (AVX2, FMA, F16C). Included by one translation unit, inside its anonymous
// namespace: nothing here may leak into portable code.
#pragma once

struct Simd {
  using F = __m256;
  static constexpr int kLanes = 8;
  // 6 rows x 2 vectors: 12 sums + 2 loads + a broadcast of 16 registers.
  static constexpr int kColumns = 2;
  static constexpr int kDotKeys = 1;    // keys at a time in decode: 8 sums of 16 registers
  static constexpr int kValueRows = 4;  // rows of decode that P V takes at once

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

  // x in a register from here on: else the compiler reads memory again for every use.
  static F Hold(F x) {
    asm("" : "+x"(x));
    return x;
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

  // 16 elements as two vectors, in lane order: even elements and odd ones where that saves a
  // conversion (kEvensOdds), else the first 8 and the last.
  template <typename T>
  static constexpr bool kEvensOdds = false;
  template <typename T>
  static void LoadTwo(const T* p, F* x, F* y) {
    *x = Load(p), *y = Load(p + 8);
  }
  static void LoadTwo(const Bf16* p, F* x, F* y) {
    Halves<Bf16>(_mm256_castps_si256(Hold(_mm256_castsi256_ps(LoadWords(p)))), x, y);
  }
  // The even and the odd elements of 8 words of T.
  template <typename T>
  static void LoadHalves(const float* words, F* evens, F* odds) {
    Halves<T>(LoadWords(words), evens, odds);
  }

  // (x0 .. x7, y0 .. y7) = (a0, b0, a1, b1, ..).
  static void Unzip(F x, F y, F* a, F* b) {
    const F even = _mm256_shuffle_ps(x, y, 0x88), odd = _mm256_shuffle_ps(x, y, 0xdd);
    *a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    *b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
  }
  static void Zip(F a, F b, F* x, F* y) {
    const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    *x = _mm256_permute2f128_ps(low, high, 0x20);
    *y = _mm256_permute2f128_ps(low, high, 0x31);
  }

  // out[i] = the sum of the 8 floats at in + 8 i, for 8 of them.
  static void SumLanes(const float* in, float* out) {
    F x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm256_hadd_ps(Load(in + 16 * i), Load(in + 16 * i + 8));
    const F a = _mm256_hadd_ps(x[0], x[1]), b = _mm256_hadd_ps(x[2], x[3]);
    Store(Add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)), out);
  }

  // out[c * out_stride + r] = rows[r][c] for 8 x 8 words.
  static void Transpose(const float* const* rows, int at, float* out, int64_t out_stride) {
    F x[8], y[8];
    for (int i = 0; i < 8; i += 2) {
      const F a = Load(rows[i] + at), b = Load(rows[i + 1] + at);
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

 private:
  static __m256i LoadWords(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  template <typename T>
  static void Halves(__m256i words, F* evens, F* odds) {
    if constexpr (__is_same(T, Bf16)) {
      *evens = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
      *odds = _mm256_castsi256_ps(
          _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    } else {
      *evens = _mm256_cvtph_ps(Narrow(_mm256_and_si256(words, _mm256_set1_epi32(0xffff))));
      *odds = _mm256_cvtph_ps(Narrow(_mm256_srli_epi32(words, 16)));
    }
  }
  // 8 words below 2^16 to 8 halves.
  static __m128i Narrow(__m256i words) {
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};
template <>
constexpr bool Simd::kEvensOdds<Bf16> = true;
