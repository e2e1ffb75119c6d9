// 16-lane vectors (AVX-512 F, BW, DQ, VL). Included by one translation unit per instruction set,
// inside its anonymous namespace: nothing here may leak into portable code.
#pragma once

struct Simd {
  using F = __m512;
  static constexpr int kLanes = 16;
  // A register tile of 6 rows x 4 vectors: 24 sums + 4 loads + a broadcast of 32 registers; 24
  // independent FMAs hide 4 cycles x 2 ports.
  static constexpr int kColumns = 4;
  // In decode two keys share each load of a query vector: 2 x 8 sums and 8 rotated vectors.
  static constexpr int kDotKeys = 2;
  static constexpr int kValueRows = 8;  // rows of decode that P V takes at once

  static F Zero() { return _mm512_setzero_ps(); }
  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static F Load(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F Load(const Fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void Store(F x, float* p) { _mm512_storeu_ps(p, x); }
  static void Store(F x, Bf16* p) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void Store(F x, Fp16* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  // x in a register from here on: else the compiler reads memory again for every use.
  static F Hold(F x) {
    asm("" : "+v"(x));
    return x;
  }

  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
  static F Fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  static F Round(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Scale takes any exponent.
  static F ClampExponent(F x) { return x; }
  static F Scale(F x, F exponent) { return _mm512_scalef_ps(x, exponent); }  // x * 2^exponent
  static float ReduceMax(F x) { return _mm512_reduce_max_ps(x); }
  static float ReduceAdd(F x) { return _mm512_reduce_add_ps(x); }

  // Lanes [begin, end) of x, `other` elsewhere.
  static F Keep(F x, int begin, int end, F other) {
    const uint32_t below_end = end >= 16 ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1;
    const uint32_t below_begin = begin >= 16 ? 0xffffu : begin <= 0 ? 0u : (1u << begin) - 1;
    return _mm512_mask_mov_ps(other, static_cast<__mmask16>(below_end & ~below_begin), x);
  }

  // out[i] = fn(a[i], b[i]) for 8 floats.
  template <typename Fn>
  static void ForEach8(const float* a, const float* b, float* out, const Fn& fn) {
    const F x = _mm512_maskz_loadu_ps(0xff, a), y = _mm512_maskz_loadu_ps(0xff, b);
    _mm512_mask_storeu_ps(out, 0xff, fn(x, y));
  }

  // 32 elements as two vectors, in lane order: even elements and odd ones where that saves a
  // conversion (kEvensOdds), else the first 16 and the last.
  template <typename T>
  static constexpr bool kEvensOdds = false;
  template <typename T>
  static void LoadTwo(const T* p, F* x, F* y) {
    *x = Load(p), *y = Load(p + 16);
  }
  static void LoadTwo(const Bf16* p, F* x, F* y) {
    Halves<Bf16>(_mm512_castps_si512(Hold(_mm512_loadu_ps(p))), x, y);
  }
  // The even and the odd elements of 16 words of T.
  template <typename T>
  static void LoadHalves(const float* words, F* evens, F* odds) {
    Halves<T>(_mm512_loadu_si512(words), evens, odds);
  }

  // (x0 .. x15, y0 .. y15) = (a0, b0, a1, b1, ..).
  static void Unzip(F x, F y, F* a, F* b) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    *a = _mm512_permutex2var_ps(x, even, y);
    *b = _mm512_permutex2var_ps(x, _mm512_add_epi32(even, _mm512_set1_epi32(1)), y);
  }
  static void Zip(F a, F b, F* x, F* y) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    *x = _mm512_permutex2var_ps(a, low, b);
    *y = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
  }

  // out[i] = the sum of the 16 floats at in + 16 i, for 16 of them.
  static void SumLanes(const float* in, float* out) {
    F x[16];
    for (int i = 0; i < 16; i += 2) {  // 8 vectors; a lane holds 2 sums of 2
      const F a = Load(in + 16 * i), b = Load(in + 16 * i + 16);
      x[i / 2] = Add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 8; i += 2) {  // 4 vectors; a 128-bit lane holds 4 sums of 4
      x[i / 2] =
          Add(_mm512_shuffle_ps(x[i], x[i + 1], 0x44), _mm512_shuffle_ps(x[i], x[i + 1], 0xee));
    }
    const F a = AddLanes(x[0], x[1]), b = AddLanes(x[2], x[3]);
    Store(AddLanes(a, b), out);
  }

  // out[c * out_stride + r] = rows[r][c] for 16 x 16 words.
  static void Transpose(const float* const* rows, int at, float* out, int64_t out_stride) {
    F x[16], y[16];
    for (int i = 0; i < 16; i += 2) {
      const F a = Load(rows[i] + at), b = Load(rows[i + 1] + at);
      x[i] = _mm512_unpacklo_ps(a, b);
      x[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 16; i += 4) {
      y[i] = _mm512_shuffle_ps(x[i], x[i + 2], 0x44);
      y[i + 1] = _mm512_shuffle_ps(x[i], x[i + 2], 0xee);
      y[i + 2] = _mm512_shuffle_ps(x[i + 1], x[i + 3], 0x44);
      y[i + 3] = _mm512_shuffle_ps(x[i + 1], x[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const F a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
      const F b = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
      const F c = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
      const F d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
      Store(_mm512_shuffle_f32x4(a, c, 0x88), out + i * out_stride);
      Store(_mm512_shuffle_f32x4(b, d, 0x88), out + (i + 4) * out_stride);
      Store(_mm512_shuffle_f32x4(a, c, 0xdd), out + (i + 8) * out_stride);
      Store(_mm512_shuffle_f32x4(b, d, 0xdd), out + (i + 12) * out_stride);
    }
  }

 private:
  template <typename T>
  static void Halves(__m512i words, F* evens, F* odds) {
    if constexpr (__is_same(T, Bf16)) {
      *evens = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
      *odds = _mm512_castsi512_ps(
          _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    } else {
      *evens = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
      *odds = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
    }
  }
  // 128-bit lanes 0 + 1 and 2 + 3 of a, then of b.
  static F AddLanes(F a, F b) {
    return Add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};
template <>
constexpr bool Simd::kEvensOdds<Bf16> = true;
