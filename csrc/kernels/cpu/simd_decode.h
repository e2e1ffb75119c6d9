// Decode: attention of at most 8 rows. Included after the other simd_*.h parts.
//
// Keys are rotated by their angles relative to a base of every AngleKeys positions, rows of q by
// theirs relative to the same base, so one small table of angles serves every position. A rotated
// key stays in registers until it is multiplied with all rows of the GQA group: K and V are read
// from memory once, and nothing is transposed or stored.
//
// The elements of K, q, the angles and o are taken in lane order (Simd::LoadTwo) wherever a product
// or a sum does not care: each 32 (AVX2: 16) of them as even ones, odd ones. o is put right at the
// end.
#pragma once

constexpr int kMaxDecodeRows = kMaxSoftmaxRows;
// q goes from one base to the next by a rotation of its own, which rounds; after so many keys it is
// rotated anew.
constexpr int kAdvanceKeys = 512;

// How a task's keys are rotated.
enum class Rotation {
  kNone,        // not at all
  kHalves,      // vectors of pairs (x[i], x[i + r / 2]) straight from K
  kNeighbours,  // vectors of pairs (x[2 i], x[2 i + 1]) straight from K
  kRows,        // by RotateRow into scratch: the widths that are no whole number of vectors
};
// Keys with one base. Angles of 16 keys with 64 pairs are 8 KiB of the first-level cache (32 to
// 48 KiB); a whole tile's would be 32 KiB and leave no room for K and V, but they save RotateRow's
// q from being rotated anew each time.
constexpr int AngleKeys(Rotation rotation) { return rotation == Rotation::kRows ? kKeyTile : 16; }

inline Rotation RotationOf(const RopeTables& rope) {
  constexpr int kStep = 2 * Simd::kLanes;
  if (rope.rotary_dim == 0) return Rotation::kNone;
  if (rope.interleaved) {
    return rope.rotary_dim % kStep == 0 ? Rotation::kNeighbours : Rotation::kRows;
  }
  return NumPairs(rope) % Simd::kLanes == 0 ? Rotation::kHalves : Rotation::kRows;
}

inline int64_t DecodeScratchFloats(int64_t rows, int64_t dim) {
  const int64_t width = dim + Simd::kLanes;  // at least that of the angles
  return (2 * (kKeyTile + Simd::kDotKeys) + 2) * width + (rows + 1 + Simd::kDotKeys) * dim +
         rows * (kKeyTile + Simd::kLanes + Simd::kLanes * Simd::kLanes) + 8 * 16;
}

// Scratch of the decode algorithm.
struct DecodeScratch {
  int dim, width;
  float* angles;         // [AngleKeys / kDotKeys, width / kLanes, kDotKeys, (cos, sin), kLanes]
  float *cosine, *sine;  // of one position
  float *row, *q;        // one row of q; [D / kLanes, rows, kLanes], in the order of DotKeys
  float *l, *s;          // [rows, kLanes], [rows, kKeyTile]
  float* sums;           // [rows, kLanes keys, kLanes]
  float* keys;           // [kDotKeys, dim]

  DecodeScratch(const RopeTables& rope, int rows, int head_dim, float* memory)
      : dim(head_dim), width(AngleWidth(rope)) {
    Arena arena(memory);
    angles = arena.Floats((kKeyTile + Simd::kDotKeys) * 2 * width);
    cosine = arena.Floats(width);
    sine = arena.Floats(width);
    row = arena.Floats(dim);
    q = arena.Floats(rows * dim);
    l = arena.Floats(rows * Simd::kLanes);
    s = arena.Floats(rows * kKeyTile);
    sums = arena.Floats(rows * Simd::kLanes * Simd::kLanes);
    keys = arena.Floats(Simd::kDotKeys * dim);
  }
};

// Two vectors of natural order at x, in the lane order of T.
template <typename T>
inline void LoadLanes(const float* x, Simd::F* a, Simd::F* b) {
  *a = Simd::Load(x), *b = Simd::Load(x + Simd::kLanes);
  if constexpr (Simd::kEvensOdds<T>) Simd::Unzip(*a, *b, a, b);
}

// Angles of the in-tile positions, in the order in which they are needed.
template <Rotation kRotation, typename T>
inline void FillAngles(const RopeTables& rope, const DecodeScratch& scratch) {
  constexpr int kLanes = Simd::kLanes, kKeys = Simd::kDotKeys;
  const int width = scratch.width;
  for (int j = 0; j <= AngleKeys(kRotation) && kRotation != Rotation::kNone; ++j) {
    if constexpr (kRotation == Rotation::kRows) {
      float* angles = scratch.angles + j * 2 * width;
      PositionAngles(rope, j, angles, angles + width);
      continue;
    }
    PositionAngles(rope, j, scratch.cosine, scratch.sine);
    float* angles = scratch.angles + (j / kKeys * width * kKeys + j % kKeys * kLanes) * 2;
    for (int i = 0; i < width; i += kLanes, angles += kKeys * 2 * kLanes) {
      Simd::F c[2] = {Simd::Load(scratch.cosine + i)}, s[2] = {Simd::Load(scratch.sine + i)};
      const int even = i / (2 * kLanes) * 2 * kLanes;
      const bool zipped = kRotation == Rotation::kHalves && even + 2 * kLanes <= width;
      if (zipped) {
        LoadLanes<T>(scratch.cosine + even, &c[0], &c[1]);
        LoadLanes<T>(scratch.sine + even, &s[0], &s[1]);
      }
      const int half = zipped ? i / kLanes % 2 : 0;
      Simd::Store(c[half], angles);
      Simd::Store(s[half], angles + kLanes);
    }
  }
}

// A row of q [dim] to q_out, a vector every `stride` floats, in the order in which DotKeys takes K.
template <Rotation kRotation, typename T>
inline void OrderQuery(const float* row, int dim, int width, int stride, float* q_out) {
  constexpr int kLanes = Simd::kLanes, kStep = 2 * kLanes;
  const auto put = [&](Simd::F x) {
    Simd::Store(x, q_out);
    q_out += stride;
  };
  int i = 0;
  Simd::F a[2], b[2];
  for (; kRotation == Rotation::kHalves && i + kStep <= width; i += kStep) {
    LoadLanes<T>(row + i, &a[0], &a[1]);
    LoadLanes<T>(row + width + i, &b[0], &b[1]);
    put(a[0]), put(b[0]), put(a[1]), put(b[1]);
  }
  if (kRotation == Rotation::kHalves && i < width) {
    put(Simd::Load(row + i)), put(Simd::Load(row + width + i));
  }
  if (kRotation == Rotation::kHalves) i = 2 * width;
  for (; kRotation == Rotation::kNeighbours && i < 2 * width; i += kStep) {
    Simd::Unzip(Simd::Load(row + i), Simd::Load(row + i + kLanes), &a[0], &b[0]);
    put(a[0]), put(b[0]);
  }
  for (; i + kStep <= dim; i += kStep) {
    LoadLanes<T>(row + i, &a[0], &a[1]);
    put(a[0]), put(a[1]);
  }
  for (; i < dim; i += kLanes) put(Simd::Load(row + i));
}

// Rows of q, scaled and rotated relative to `base`.
template <Rotation kRotation, typename T>
inline void RotateQueries(const TaskView<T>& t, int64_t base, const DecodeScratch& scratch) {
  for (int r = 0; r < t.rows; ++r) {
    const int64_t relative = t.Position(r) - base;
    if (relative < 0) continue;  // sees none of these keys
    if (r % t.group == 0 && kRotation != Rotation::kNone) {
      PositionAngles(t.p.rope, relative, scratch.cosine, scratch.sine);
    }
    const int stride = t.rows * Simd::kLanes;
    float* q = scratch.q + r * Simd::kLanes;
    RotateRow(t.p.rope, t.Query(r), t.dim, scratch.cosine, scratch.sine, t.q_scale, scratch.row);
    if constexpr (kRotation == Rotation::kRows) {  // K comes as floats
      OrderQuery<Rotation::kNone, float>(scratch.row, t.dim, scratch.width, stride, q);
    } else {
      OrderQuery<kRotation, T>(scratch.row, t.dim, scratch.width, stride, q);
    }
  }
}

// Turns rows of q relative to a base into rows relative to the base AngleKeys on.
template <Rotation kRotation>
inline void AdvanceQueries(int rows, const DecodeScratch& scratch) {
  constexpr int kLanes = Simd::kLanes;
  const float* angles = scratch.angles + AngleKeys(kRotation) * 2 * scratch.width;
  float* q = scratch.q;
  for (int i = 0; i < scratch.width; i += kLanes, angles += Simd::kDotKeys * 2 * kLanes) {
    const Simd::F c = Simd::Load(angles), s = Simd::Sub(Simd::Zero(), Simd::Load(angles + kLanes));
    for (int r = 0; r < rows; ++r) {
      Simd::F a = Simd::Load(q + r * kLanes), b = Simd::Load(q + (rows + r) * kLanes);
      Rotate(c, s, &a, &b);
      Simd::Store(a, q + r * kLanes);
      Simd::Store(b, q + (rows + r) * kLanes);
    }
    q += 2 * rows * kLanes;
  }
}

// sums[r, k, lane]: R rows of q times K keys x, rotated by their angles; the lanes of a product are
// yet to be added up.
template <Rotation kRotation, int R, int K, typename T>
inline void DotKeys(const T* const* x, int dim, int width, const float* angles, const float* q,
                    float* sums) {
  constexpr int kLanes = Simd::kLanes, kStep = 2 * kLanes;
  Simd::F sum[R][K];
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) sum[r][k] = Simd::Zero();
  }
  const auto add = [&](const Simd::F(&y)[K]) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      const Simd::F row = Simd::Hold(Simd::Load(q + r * kLanes));
      for (int k = 0; k < K; ++k) sum[r][k] = Simd::Fma(row, y[k], sum[r][k]);
    }
    q += R * kLanes;
  };
  const auto rotate = [&](Simd::F(&a)[K], Simd::F(&b)[K]) __attribute__((always_inline)) {
    for (int k = 0; k < K; ++k, angles += 2 * kLanes) {
      Rotate(Simd::Hold(Simd::Load(angles)), Simd::Hold(Simd::Load(angles + kLanes)), &a[k], &b[k]);
    }
    add(a);
    add(b);
  };
  Simd::F a[2][K], b[2][K];
  int i = 0;
  if constexpr (kRotation == Rotation::kHalves) {
    for (; i + kStep <= width; i += kStep) {
      for (int k = 0; k < K; ++k) {
        Simd::LoadTwo(x[k] + i, &a[0][k], &a[1][k]);
        Simd::LoadTwo(x[k] + width + i, &b[0][k], &b[1][k]);
      }
      rotate(a[0], b[0]);
      rotate(a[1], b[1]);
    }
    if (i < width) {
      for (int k = 0; k < K; ++k)
        a[0][k] = Simd::Load(x[k] + i), b[0][k] = Simd::Load(x[k] + width + i);
      rotate(a[0], b[0]);
    }
    i = 2 * width;
  } else if constexpr (kRotation == Rotation::kNeighbours) {
    for (; i < 2 * width; i += kStep) {
      for (int k = 0; k < K; ++k) {
        Simd::LoadTwo(x[k] + i, &a[0][k], &b[0][k]);
        if constexpr (!Simd::kEvensOdds<T>) Simd::Unzip(a[0][k], b[0][k], &a[0][k], &b[0][k]);
      }
      rotate(a[0], b[0]);
    }
  }
  for (; i + kStep <= dim; i += kStep) {
    for (int k = 0; k < K; ++k) Simd::LoadTwo(x[k] + i, &a[0][k], &b[0][k]);
    add(a[0]);
    add(b[0]);
  }
  for (; i < dim; i += kLanes) {
    for (int k = 0; k < K; ++k) a[0][k] = Simd::Load(x[k] + i);
    add(a[0]);
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) Simd::Store(sum[r][k], sums + (r * kLanes + k) * kLanes);
  }
}

// Logits of R rows against keys [begin, begin + AngleKeys) of a tile; fetches their V.
template <Rotation kRotation, int R, typename T>
inline void DecodeLogits(const TaskView<T>& t, const T* const* rows, int begin,
                         const DecodeScratch& scratch) {
  constexpr int kLanes = Simd::kLanes, kKeys = Simd::kDotKeys;
  const int width = scratch.width;
  for (int j = 0; j < AngleKeys(kRotation); j += kLanes) {
    for (int k = j; k < j + kLanes; k += kKeys) {
      const T* const* x = rows + begin + k;
      const float* angles = scratch.angles + k * 2 * width;
      float* sums = scratch.sums + (k - j) * kLanes;
      for (int i = 0; i < kKeys; ++i) Prefetch(x[i] + t.p.kv.kv_stride, t.dim);
      if constexpr (kRotation == Rotation::kRows) {
        const float* keys[kKeys];
        for (int i = 0; i < kKeys; ++i, angles += 2 * width) {
          RotateRow(t.p.rope, x[i], t.dim, angles, angles + width, 1.f, scratch.keys + i * t.dim);
          keys[i] = scratch.keys + i * t.dim;
        }
        DotKeys<Rotation::kNone, R, kKeys>(keys, t.dim, width, angles, scratch.q, sums);
      } else {
        DotKeys<kRotation, R, kKeys>(x, t.dim, width, angles, scratch.q, sums);
      }
    }
    for (int r = 0; r < R; ++r) {
      Simd::SumLanes(scratch.sums + r * kLanes * kLanes, scratch.s + r * kKeyTile + begin + j);
    }
  }
}

// fn(Count<N>) with N = n, 1 to kMost.
template <int N>
struct Count {
  static constexpr int kValue = N;
};
template <int kMost, typename Fn>
inline void WithCount(int n, const Fn& fn) {
  if (n == kMost) return fn(Count<kMost>{});
  if constexpr (kMost > 1) WithCount<kMost - 1>(n, fn);
}

// V rows anywhere, still in the cache's element type; fetches the rows of K that come next.
template <typename T>
struct ValueRows {
  const T* const* rows;
  int64_t offset;
  const T* const* next;
  template <int N>
  void Load(int k, int column, Simd::F* x) const {
    const T* row = rows[k] + offset + column;
    Prefetch(next[k] + column, N * Simd::kLanes);
    if constexpr (N == 1) {
      x[0] = Simd::Load(row);
    } else {
      for (int n = 0; n < N; n += 2) Simd::LoadTwo(row + n * Simd::kLanes, &x[n], &x[n + 1]);
    }
  }
};

// o = o * keep + weights s times the n rows of V, for all rows.
template <typename T>
inline void AddValues(const TaskView<T>& t, const ValueRows<T>& values, int n, const float* s,
                      const float* keep, float* o) {
  for (int r = 0; r < t.rows; r += Simd::kValueRows) {
    const int left = t.rows - r;
    WithCount<Simd::kValueRows>(left < Simd::kValueRows ? left : Simd::kValueRows, [&](auto count) {
      constexpr int kRows = count.kValue, kHalf = Simd::kColumns / 2;
      // As many sums as registers allow for.
      constexpr int kColumns = kRows <= 2 ? 4 * kHalf : kRows <= 6 ? 2 * kHalf : kHalf;
      Gemm<FloatOperands, kRows, kColumns>(n, s + r * kKeyTile, kKeyTile, values, t.dim,
                                           o + r * t.dim, t.dim, keep + r);
    });
  }
}

// x [n] from lane order to natural order, where it was ever changed: whole steps.
inline void FromLaneOrder(float* x, int n) {
  constexpr int kStep = 2 * Simd::kLanes;
  for (int i = 0; i + kStep <= n; i += kStep) {
    Simd::F a, b;
    Simd::Zip(Simd::Load(x + i), Simd::Load(x + i + Simd::kLanes), &a, &b);
    Simd::Store(a, x + i);
    Simd::Store(b, x + i + Simd::kLanes);
  }
}

template <Rotation kRotation, typename T>
inline void DecodeKeys(const TaskView<T>& t, const AttnState& state, const DecodeScratch& scratch) {
  const T* rows[2][kKeyTile];
  float keep[kMaxSoftmaxRows];
  int begin[kMaxSoftmaxRows], end[kMaxSoftmaxRows];
  FillAngles<kRotation, T>(t.p.rope, scratch);
  const int64_t first = t.FirstBase();
  int n = t.KeyRows(first, rows[0]), now = 0;
  for (int64_t base = first; base < t.task.kv_end; base += kKeyTile, now ^= 1) {
    const int next_n = t.KeyRows(base + kKeyTile, rows[now ^ 1]);
    for (int j = 0; j < n; j += AngleKeys(kRotation)) {
      if (kRotation == Rotation::kRows || (base + j - first) % kAdvanceKeys == 0) {
        RotateQueries<kRotation>(t, base + j, scratch);
      } else if (kRotation != Rotation::kNone) {
        AdvanceQueries<kRotation>(t.rows, scratch);
      }
      WithCount<kMaxDecodeRows>(t.rows, [&](auto count) {
        DecodeLogits<kRotation, count.kValue>(t, rows[now], j, scratch);
      });
    }
    for (int r = 0; r < t.rows; ++r) t.Limits(r, base, begin + r, end + r);
    SoftmaxRows(scratch.s, t.rows, begin, end, t.cap, state.m, scratch.l, keep);
    const ValueRows<T> values{rows[now], t.p.kv.kv_stride, rows[next_n > 0 ? now ^ 1 : now]};
    AddValues(t, values, n, scratch.s, keep, state.o);
    n = next_n;
  }
}

template <typename T>
inline void Decode(const TaskView<T>& t, const AttnState& state, float* memory) {
  const DecodeScratch scratch(t.p.rope, t.rows, t.dim, memory);
  __builtin_memset(state.o, 0, int64_t{t.rows} * t.dim * sizeof(float));
  __builtin_memset(scratch.l, 0, t.rows * Simd::kLanes * sizeof(float));
  for (int r = 0; r < t.rows; ++r) state.m[r] = -__builtin_inff();
  switch (RotationOf(t.p.rope)) {
    case Rotation::kNone:
      DecodeKeys<Rotation::kNone>(t, state, scratch);
      break;
    case Rotation::kHalves:
      DecodeKeys<Rotation::kHalves>(t, state, scratch);
      break;
    case Rotation::kNeighbours:
      DecodeKeys<Rotation::kNeighbours>(t, state, scratch);
      break;
    case Rotation::kRows:
      DecodeKeys<Rotation::kRows>(t, state, scratch);
      break;
  }
  for (int r = 0; r < t.rows; ++r) {
    if constexpr (Simd::kEvensOdds<T>) FromLaneOrder(state.o + r * t.dim, t.dim);
    state.l[r] = Simd::ReduceAdd(Simd::Load(scratch.l + r * Simd::kLanes));
  }
}
