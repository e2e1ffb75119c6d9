// Online softmax of one row against one key tile. Included after a Simd.
#pragma once

// 2^x for x <= 126, to 2 units in the last place; at most 2^-125 for x < -125. Not for -inf.
inline Simd::F Exp2(Simd::F x) {
  x = Simd::ClampExponent(x);
  const Simd::F whole = Simd::Round(x), f = Simd::Sub(x, whole);
  // Minimax polynomial of degree 5 on [-0.5, 0.5]; relative error 7.5e-8.
  Simd::F y = Simd::Fma(Simd::Set(1.327647069e-3f), f, Simd::Set(9.675541324e-3f));
  y = Simd::Fma(y, f, Simd::Set(5.550713278e-2f));
  y = Simd::Fma(y, f, Simd::Set(2.402211972e-1f));
  y = Simd::Fma(y, f, Simd::Set(6.931469671e-1f));
  y = Simd::Fma(y, f, Simd::Set(1.000000072e+0f));
  return Simd::Scale(y, whole);
}

// cap * log2(e) * tanh(x), where y = 2 log2(e) x.
inline Simd::F SoftCap(Simd::F y, Simd::F cap) {
  const Simd::F e = Exp2(Simd::Min(y, Simd::Set(125.f)));
  const Simd::F one = Simd::Set(1.f);
  return Simd::Mul(cap, Simd::Sub(one, Simd::Div(Simd::Set(2.f), Simd::Add(one, e))));
}

constexpr int kMaxSoftmaxRows = 8;
constexpr int kTileVectors = kKeyTile / Simd::kLanes;

// Caps and masks the logits s [kKeyTile]; returns the largest.
inline float MaskRow(float* s, int begin, int end, float cap) {
  const Simd::F lowest = Simd::Set(-__builtin_inff());
  const bool whole = begin == 0 && end == kKeyTile;
  Simd::F peak = lowest;
  for (int i = 0; i < kTileVectors; ++i) {
    Simd::F x = Simd::Load(s + i * Simd::kLanes);
    if (cap > 0.f) x = SoftCap(x, Simd::Set(cap));
    if (!whole) x = Simd::Keep(x, begin - i * Simd::kLanes, end - i * Simd::kLanes, lowest);
    if (cap > 0.f || !whole) Simd::Store(x, s + i * Simd::kLanes);
    peak = Simd::Max(peak, x);
  }
  return Simd::ReduceMax(peak);
}

// Turns masked logits into weights 2^(s - m), 0 outside keys [begin, end); l = l * keep + weights.
inline void WeighRow(float* s, int begin, int end, float m, float keep, float* l) {
  const bool whole = begin == 0 && end == kKeyTile;
  Simd::F sum = Simd::Mul(Simd::Load(l), Simd::Set(keep));
  for (int i = 0; i < kTileVectors; ++i) {
    Simd::F p = Exp2(Simd::Sub(Simd::Load(s + i * Simd::kLanes), Simd::Set(m)));
    if (!whole) {
      p = Simd::Keep(p, begin - i * Simd::kLanes, end - i * Simd::kLanes, Simd::Zero());
    }
    sum = Simd::Add(sum, p);
    Simd::Store(p, s + i * Simd::kLanes);
  }
  Simd::Store(sum, l);
}

// One key tile of up to 8 rows. s [rows, kKeyTile]: logits in, weights out. Row r sees keys
// [begin[r], end[r]). m [rows] is the running maximum, l [rows, kLanes] the running sums, lane by
// lane. keep [8] receives the factor by which earlier sums shrink. `cap` > 0: softcap * log2(e).
// All maxima first, then all factors in one vector: no row waits for another's reduction.
inline void SoftmaxRows(float* s, int rows, const int* begin, const int* end, float cap, float* m,
                        float* l, float* keep) {
  float before[kMaxSoftmaxRows] = {}, after[kMaxSoftmaxRows] = {};
  for (int r = 0; r < rows; ++r) {
    const float peak = MaskRow(s + r * kKeyTile, begin[r], end[r], cap);
    before[r] = m[r];
    after[r] = peak > m[r] ? peak : m[r];
    m[r] = after[r];
  }
  Simd::ForEach8(before, after, keep, [](Simd::F x, Simd::F y) {
    // Both -inf: the difference is NaN, and Max takes its second argument.
    return Exp2(Simd::Max(Simd::Sub(x, y), Simd::Set(-125.f)));
  });
  for (int r = 0; r < rows; ++r) {
    WeighRow(s + r * kKeyTile, begin[r], end[r], m[r], keep[r], l + r * Simd::kLanes);
  }
}
