// Rotation of rows with vectors. Included after a Simd, inside a translation unit's anonymous
// namespace.
//
// Angles lie as two rows of floats per position, cos and sin of every pair, ready to multiply with
// vectors of the pairs' first and second dims. A width that is no multiple of the lanes ends with a
// vector that overlaps the one before it, so nothing is masked; a width below one vector is filled
// up with the identity, which keeps whatever dims the vector holds besides. Rows have at least two
// vectors of elements (Serves), so no vector of either kind reaches past one.
#pragma once

inline int NumPairs(const RopeTables& rope) { return rope.rotary_dim / 2; }

// Floats in a row of cos or of sin.
inline int AngleWidth(const RopeTables& rope) {
  const int pairs = NumPairs(rope);
  return pairs > 0 && pairs < Simd::kLanes ? Simd::kLanes : pairs;
}

// Begin of the vector after the one at i: width - kLanes for the last, overlapping one.
inline int NextVector(int i, int width) {
  const int next = i + Simd::kLanes;
  return next < width && next > width - Simd::kLanes ? width - Simd::kLanes : next;
}

// Angles of one position: hi rotation times lo rotation, each a row [r / 2][2] of the tables.
inline void PositionAngles(const RopeTables& rope, int64_t position, float* cosine, float* sine) {
  const int64_t row = rope.rotary_dim;  // floats
  const float* hi = rope.hi + position / RopeTables::kLoRows * row;
  const float* lo = rope.lo + position % RopeTables::kLoRows * row;
  const int pairs = NumPairs(rope), width = AngleWidth(rope);
  for (int i = 0; i < width && pairs < width; ++i) {
    cosine[i] = i < pairs ? hi[2 * i] * lo[2 * i] - hi[2 * i + 1] * lo[2 * i + 1] : 1.f;
    sine[i] = i < pairs ? hi[2 * i + 1] * lo[2 * i] + hi[2 * i] * lo[2 * i + 1] : 0.f;
  }
  for (int i = 0; i < width && pairs == width; i = NextVector(i, width)) {
    Simd::F hc, hs, lc, ls;
    Simd::Unzip(Simd::Load(hi + 2 * i), Simd::Load(hi + 2 * i + Simd::kLanes), &hc, &hs);
    Simd::Unzip(Simd::Load(lo + 2 * i), Simd::Load(lo + 2 * i + Simd::kLanes), &lc, &ls);
    Simd::Store(Simd::Fnma(hs, ls, Simd::Mul(hc, lc)), cosine + i);
    Simd::Store(Simd::Fma(hs, lc, Simd::Mul(hc, ls)), sine + i);
  }
}

// Pairs (a, b) rotated.
inline void Rotate(Simd::F c, Simd::F s, Simd::F* a, Simd::F* b) {
  const Simd::F first = *a;
  *a = Simd::Fnma(*b, s, Simd::Mul(first, c));
  *b = Simd::Fma(first, s, Simd::Mul(*b, c));
}

// out[0, dim) = row x rotated and times `scale`; x and out do not overlap.
template <typename T>
inline void RotateRow(const RopeTables& rope, const T* x, int dim, const float* cosine,
                      const float* sine, float scale, float* out) {
  const int width = AngleWidth(rope), pairs = NumPairs(rope);
  const Simd::F factor = Simd::Set(scale);
  for (int i = rope.rotary_dim / Simd::kLanes * Simd::kLanes; i < dim; i += Simd::kLanes) {
    Simd::Store(Simd::Mul(Simd::Load(x + i), factor), out + i);
  }
  for (int i = 0; i < width; i = NextVector(i, width)) {
    const Simd::F c = Simd::Mul(Simd::Load(cosine + i), factor);
    const Simd::F s = Simd::Mul(Simd::Load(sine + i), factor);
    const int first = rope.interleaved ? 2 * i : i;
    const int second = rope.interleaved ? 2 * i + Simd::kLanes : i + pairs;
    Simd::F a = Simd::Load(x + first), b = Simd::Load(x + second);
    if (rope.interleaved) Simd::Unzip(a, b, &a, &b);
    Rotate(c, s, &a, &b);
    if (rope.interleaved) Simd::Zip(a, b, &a, &b);
    Simd::Store(a, out + first);
    Simd::Store(b, out + second);
  }
}

// Tokens [begin, end) of rope_apply_, in place; dims past the rotary ones are not written.
template <typename T>
inline void RotateTokens(const RopeApplyParams& p, int64_t begin, int64_t end) {
  alignas(64) float cosine[256], sine[256], row[256] = {};  // head_dim <= 256
  alignas(64) T rounded[256];
  const int rotary = p.rope.rotary_dim, width = AngleWidth(p.rope);
  const int whole = rotary / Simd::kLanes * Simd::kLanes;  // nothing to copy past the pairs
  for (int64_t n = begin; n < end && rotary > 0; ++n) {
    PositionAngles(p.rope, p.positions[n], cosine, sine);
    for (int i = 0; p.inverse && i < width; ++i) sine[i] = -sine[i];
    for (int h = 0; h < p.num_heads; ++h) {
      T* x = static_cast<T*>(p.x) + n * p.token_stride + h * p.head_stride;
      RotateRow(p.rope, x, whole, cosine, sine, 1.f, row);
      for (int i = 0; i < rotary; i += Simd::kLanes) Simd::Store(Simd::Load(row + i), rounded + i);
      __builtin_memcpy(x, rounded, rotary * sizeof(T));
    }
  }
}
