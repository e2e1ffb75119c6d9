// Rotation with vectors. Included after a Simd, inside a translation unit's anonymous namespace.
//
// Angles lie as two rows of floats per position, ready to multiply with:
//   half-split:  cos[0, r / 2), sin[0, r / 2), one per pair; vectors of pairs (x[i], x[i + r / 2])
//   interleaved: cos[0, r), sin[0, r), one per dim, sin negated in even dims: x c + swap(x) s
// A width that is no multiple of the lanes ends with a vector that overlaps the one before it, so
// nothing is masked; a width below one vector is left to narrower kernels (CanRotate).
#pragma once

// Floats in a row of cos or of sin.
inline int AngleWidth(const RopeTables& rope) {
  return rope.interleaved ? rope.rotary_dim : rope.rotary_dim / 2;
}

inline bool CanRotate(const RopeTables& rope) {
  return rope.rotary_dim == 0 || AngleWidth(rope) >= Simd::kLanes;
}

// Begin of the vector after the one at i: width - kLanes for the last, overlapping one.
inline int NextVector(int i, int width) {
  const int next = i + Simd::kLanes;
  return next < width && next > width - Simd::kLanes ? width - Simd::kLanes : next;
}

// Angles of the product of two rotations, rows [r / 2][2] of the tables. `a` may be nullptr.
inline void MultiplyAngles(const RopeTables& rope, const float* a, const float* b, float* cosine,
                           float* sine) {
  const int width = AngleWidth(rope);
  for (int i = 0; i < width; i = NextVector(i, width)) {
    Simd::F ac, as, bc, bs;
    if (rope.interleaved) {
      const Simd::F y = Simd::Load(b + i), x = a == nullptr ? y : Simd::Load(a + i);
      ac = Simd::Evens(x), as = Simd::Odds(x), bc = Simd::Evens(y), bs = Simd::Odds(y);
    } else {
      Simd::Split(b + 2 * i, &bc, &bs);
      Simd::Split(a == nullptr ? b + 2 * i : a + 2 * i, &ac, &as);
    }
    if (a != nullptr) {
      const Simd::F c = Simd::Fnma(as, bs, Simd::Mul(ac, bc));
      bs = Simd::Fma(as, bc, Simd::Mul(ac, bs));
      bc = c;
    }
    Simd::Store(bc, cosine + i);
    Simd::Store(rope.interleaved ? Simd::NegateEvens(bs) : bs, sine + i);
  }
}

// Angles of one position: hi rotation times lo rotation.
inline void PositionAngles(const RopeTables& rope, int64_t position, float* cosine, float* sine) {
  if (rope.rotary_dim == 0) return;
  const int64_t row = rope.rotary_dim;  // floats in a row [r / 2][2]
  const int64_t hi = position / RopeTables::kLoRows, lo = position % RopeTables::kLoRows;
  MultiplyAngles(rope, hi == 0 ? nullptr : rope.hi + hi * row, rope.lo + lo * row, cosine, sine);
}

// One vector of pairs, or of interleaved dims, at i: x rotated and times `scale` to out.
template <bool kInterleaved, typename T>
inline void RotateVector(const T* x, int i, int width, Simd::F c, Simd::F s, float scale,
                         float* out) {
  Simd::F a = Simd::Load(x + i);
  if (scale != 1.f) a = Simd::Mul(a, Simd::Set(scale));
  if constexpr (kInterleaved) {
    Simd::Store(Simd::Fma(a, c, Simd::Mul(Simd::SwapPairs(a), s)), out + i);
  } else {
    Simd::F b = Simd::Load(x + width + i);
    if (scale != 1.f) b = Simd::Mul(b, Simd::Set(scale));
    Simd::Store(Simd::Fnma(b, s, Simd::Mul(a, c)), out + i);
    Simd::Store(Simd::Fma(a, s, Simd::Mul(b, c)), out + width + i);
  }
}

template <int K, bool kInterleaved, typename T>
inline void RotatePairs(int width, const T* const* x, int dim, const float* cosine,
                        const float* sine, float scale, float* out) {
  for (int i = 0; i < width; i = NextVector(i, width)) {
    for (int k = 0; k < K; ++k) {
      RotateVector<kInterleaved>(x[k], i, width, Simd::Load(cosine + k * width + i),
                                 Simd::Load(sine + k * width + i), scale, out + k * dim);
    }
  }
}

// out[k][0, dim) = row x[k] rotated by row k of the angles and times `scale`, for K rows; x and out
// do not overlap.
template <int K, typename T>
inline void RotateRows(const RopeTables& rope, const T* const* x, int dim, const float* cosine,
                       const float* sine, float scale, float* out) {
  const int width = AngleWidth(rope);
  for (int i = rope.rotary_dim / Simd::kLanes * Simd::kLanes; i < dim; i += Simd::kLanes) {
    for (int k = 0; k < K; ++k) {
      Simd::Store(Simd::Mul(Simd::Load(x[k] + i), Simd::Set(scale)), out + k * dim + i);
    }
  }
  if (rope.interleaved) {
    RotatePairs<K, true>(width, x, dim, cosine, sine, scale, out);
  } else {
    RotatePairs<K, false>(width, x, dim, cosine, sine, scale, out);
  }
}

// Tokens [begin, end) of rope_apply_, in place.
template <typename T>
inline void RotateTokens(const RopeApplyParams& p, int64_t begin, int64_t end) {
  alignas(64) float cosine[256], sine[256], row[256];  // head_dim <= 256
  const int rotary = p.rope.rotary_dim, width = AngleWidth(p.rope);
  for (int64_t n = begin; n < end; ++n) {
    PositionAngles(p.rope, p.positions[n], cosine, sine);
    for (int i = 0; p.inverse && i < width; i = NextVector(i, width)) {
      // A negation would undo itself where the last two vectors overlap.
      const Simd::F s = Simd::Load(sine + i);
      Simd::Store(Simd::Sub(Simd::Zero(), s), row + i);
    }
    if (p.inverse) __builtin_memcpy(sine, row, width * sizeof(float));
    for (int h = 0; h < p.num_heads; ++h) {
      T* x = static_cast<T*>(p.x) + n * p.token_stride + h * p.head_stride;
      RotateRows<1>(p.rope, &x, rotary / Simd::kLanes * Simd::kLanes, cosine, sine, 1.f, row);
      for (int i = 0; i < rotary; i = NextVector(i, rotary)) {
        Simd::Store(Simd::Load(row + i), x + i);
      }
    }
  }
}
