// Online softmax of one row against one key tile. Included after a Simd.
#pragma once

// 2^x for x <= 126, to 2 units in the last place; 2^-125 or less for x < -125.
inline Simd::F Exp2(Simd::F x) {
  x = Simd::Max(x, Simd::Set(-125.f));
  const Simd::F whole = Simd::Round(x), f = Simd::Sub(x, whole);
  // Minimax polynomial of degree 5 on [-0.5, 0.5]; relative error 7.5e-8.
  Simd::F y = Simd::Fma(Simd::Set(1.327647069e-3f), f, Simd::Set(9.675541324e-3f));
  y = Simd::Fma(y, f, Simd::Set(5.550713278e-2f));
  y = Simd::Fma(y, f, Simd::Set(2.402211972e-1f));
  y = Simd::Fma(y, f, Simd::Set(6.931469671e-1f));
  y = Simd::Fma(y, f, Simd::Set(1.000000072e+0f));
  return Simd::Scale(y, whole);
}

// Running state of one row: base-2 maximum, and the sum of weights lane by lane.
struct RowState {
  float* m;
  float* l;  // [kLanes]
};

// cap * log2(e) * tanh(x), where y = 2 log2(e) x.
inline Simd::F SoftCap(Simd::F y, Simd::F cap) {
  const Simd::F e = Exp2(Simd::Min(y, Simd::Set(125.f)));
  const Simd::F one = Simd::Set(1.f);
  return Simd::Mul(cap, Simd::Sub(one, Simd::Div(Simd::Set(2.f), Simd::Add(one, e))));
}

// Turns the logits s [kKeyTile] into weights 2^(s - m), 0 outside keys [begin, end). Returns the
// factor by which earlier sums shrink. `cap` > 0: softcap * log2(e).
inline float SoftmaxRow(float* s, int begin, int end, float cap, const RowState& state) {
  constexpr int kVectors = kKeyTile / Simd::kLanes;
  if (begin >= end) {
    for (int i = 0; i < kVectors; ++i) Simd::Store(Simd::Zero(), s + i * Simd::kLanes);
    return 1.f;
  }
  const Simd::F lowest = Simd::Set(-__builtin_inff());
  const bool whole = begin == 0 && end == kKeyTile;
  Simd::F x[kVectors], peak = lowest;
  for (int i = 0; i < kVectors; ++i) {
    x[i] = Simd::Load(s + i * Simd::kLanes);
    if (cap > 0.f) x[i] = SoftCap(x[i], Simd::Set(cap));
    if (!whole) x[i] = Simd::Keep(x[i], begin - i * Simd::kLanes, end - i * Simd::kLanes, lowest);
    peak = Simd::Max(peak, x[i]);
  }
  const float tile_peak = Simd::ReduceMax(peak);
  const float m = *state.m > tile_peak ? *state.m : tile_peak;
  const float keep = m == *state.m ? 1.f : __builtin_exp2f(*state.m - m);
  *state.m = m;
  Simd::F l = Simd::Mul(Simd::Load(state.l), Simd::Set(keep));
  for (int i = 0; i < kVectors; ++i) {
    Simd::F p = Exp2(Simd::Sub(x[i], Simd::Set(m)));
    if (!whole) {
      p = Simd::Keep(p, begin - i * Simd::kLanes, end - i * Simd::kLanes, Simd::Zero());
    }
    l = Simd::Add(l, p);
    Simd::Store(p, s + i * Simd::kLanes);
  }
  Simd::Store(l, state.l);
  return keep;
}
