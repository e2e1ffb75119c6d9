// Extend: attention of many rows. Included after the other simd_*.h parts.
//
// A tile's K is transposed as it lies in the cache, then rotated with keys as lanes, so that any
// rotary width does; V is widened into scratch. Then 6 rows at a time do Q K^T, softmax, P V in
// registers. A tile is prepared once for up to 256 rows, while the next one is fetched.
#pragma once

constexpr int kRowTile = 6;  // rows of a register tile, simd_*.h

inline int64_t ExtendScratchFloats(int64_t rows, int64_t dim) {
  const int64_t padded = rows + kRowTile;
  // In-tile angles and K's words, K and V; rows of q, m and l; one register tile of s and o; angles
  // of one position.
  return 4 * kKeyTile * dim + padded * (dim + Simd::kLanes + 1) + kRowTile * (kKeyTile + dim) +
         2 * (dim + Simd::kLanes) + 11 * 16;
}

// Scratch of the extend algorithm.
struct ExtendScratch {
  float* angles;         // [r / 2, 2, kKeyTile]: cos and sin of each pair at the tile's positions
  float *cosine, *sine;  // of one position
  float *q, *l, *m;      // rows padded to the register tile
  float *words, *k, *v;  // [D, kKeyTile] elements of K; [D, kKeyTile] rotated; [kKeyTile, D]
  float *s, *tail;       // [kRowTile, kKeyTile]; o of a part-filled register tile

  template <typename T>
  ExtendScratch(const TaskView<T>& t, float* memory) {
    Arena arena(memory);
    const int64_t padded = t.rows + kRowTile;
    angles = arena.Floats(t.p.rope.rotary_dim * kKeyTile);
    cosine = arena.Floats(AngleWidth(t.p.rope));
    sine = arena.Floats(AngleWidth(t.p.rope));
    q = arena.Floats(padded * t.dim);
    l = arena.Floats(padded * Simd::kLanes);
    m = arena.Floats(padded);
    words = arena.Floats(kKeyTile * t.dim);
    k = arena.Floats(kKeyTile * t.dim);
    v = arena.Floats(kKeyTile * t.dim);
    s = arena.Floats(kRowTile * kKeyTile);
    tail = arena.Floats(kRowTile * t.dim);
  }
};

// Rotates, scales and widens the query rows; zeroes the padding and the running sums.
template <typename Op, typename T>
inline void PrepareQueries(const TaskView<T>& t, const ExtendScratch& scratch) {
  for (int r = 0; r < t.rows; ++r) {
    const int64_t position = t.Position(r) > 0 ? t.Position(r) : 0;
    if (r % t.group == 0 && t.p.rope.rotary_dim > 0) {
      PositionAngles(t.p.rope, position, scratch.cosine, scratch.sine);
    }
    float* q = scratch.q + int64_t{r} * t.dim;
    RotateRow(t.p.rope, t.Query(r), t.dim, scratch.cosine, scratch.sine, t.q_scale, q);
    Op::PackRow(q, t.dim);
  }
  const int64_t padded = t.rows + kRowTile;
  __builtin_memset(scratch.q + int64_t{t.rows} * t.dim, 0, kRowTile * t.dim * sizeof(float));
  __builtin_memset(scratch.l, 0, padded * Simd::kLanes * sizeof(float));
  __builtin_memset(scratch.tail, 0, kRowTile * t.dim * sizeof(float));
  for (int64_t r = 0; r < padded; ++r) scratch.m[r] = -__builtin_inff();
}

// out[i, j] = word i of row j, for kKeyTile rows of `words` words.
template <typename T>
inline void TransposeRows(const T* const* rows, int words, float* out) {
  for (int j = 0; j < kKeyTile; j += Simd::kLanes) {
    const float* some[Simd::kLanes];
    for (int k = 0; k < Simd::kLanes; ++k) some[k] = reinterpret_cast<const float*>(rows[j + k]);
    for (int i = 0; i < words; i = NextVector(i, words)) {
      Simd::Transpose(some, i, out + i * kKeyTile + j, kKeyTile);
    }
  }
}

// Angles of positions 0 to kKeyTile - 1: the first rows of the table, transposed.
inline void FillTileAngles(const RopeTables& rope, float* angles) {
  const int row = rope.rotary_dim;
  if (row >= Simd::kLanes) {
    const float* rows[kKeyTile];
    for (int j = 0; j < kKeyTile; ++j) rows[j] = rope.lo + j * row;
    TransposeRows(rows, row, angles);
    return;
  }
  for (int i = 0; i < row; ++i) {
    for (int j = 0; j < kKeyTile; ++j) angles[i * kKeyTile + j] = rope.lo[j * row + i];
  }
}

// One vector of keys of dims d and d + 1, from a tile of words.
template <typename T>
inline void LoadDims(const float* words, int d, Simd::F* x, Simd::F* y) {
  if constexpr (sizeof(T) == 4) {
    *x = Simd::Load(words + d * kKeyTile), *y = Simd::Load(words + (d + 1) * kKeyTile);
  } else {
    Simd::LoadHalves<T>(words + d / 2 * kKeyTile, x, y);
  }
}
template <typename T>
inline Simd::F LoadDim(const float* words, int d) {
  Simd::F x, y;
  LoadDims<T>(words, d / 2 * 2, &x, &y);
  return d % 2 == 0 ? x : y;
}

// K of the tile at `base` from its words: rotated by the base's angles times the in-tile ones.
template <typename T>
inline void RotateTile(const RopeTables& rope, int dim, const ExtendScratch& scratch) {
  const int pairs = NumPairs(rope);
  for (int pair = 0; pair < pairs; ++pair) {
    const int first = rope.interleaved ? 2 * pair : pair;
    const int second = rope.interleaved ? first + 1 : first + pairs;
    const Simd::F base_c = Simd::Set(scratch.cosine[pair]), base_s = Simd::Set(scratch.sine[pair]);
    const float* angles = scratch.angles + 2 * pair * kKeyTile;
    for (int j = 0; j < kKeyTile; j += Simd::kLanes) {
      Simd::F c = Simd::Load(angles + j), s = Simd::Load(angles + kKeyTile + j);
      Rotate(base_c, base_s, &c, &s);
      Simd::F a = LoadDim<T>(scratch.words + j, first);
      Simd::F b = LoadDim<T>(scratch.words + j, second);
      Rotate(c, s, &a, &b);
      Simd::Store(a, scratch.k + first * kKeyTile + j);
      Simd::Store(b, scratch.k + second * kKeyTile + j);
    }
  }
  for (int d = 2 * pairs; d < dim; d += 2) {
    for (int j = 0; j < kKeyTile; j += Simd::kLanes) {
      Simd::F a, b;
      LoadDims<T>(scratch.words + j, d, &a, &b);
      Simd::Store(a, scratch.k + d * kKeyTile + j);
      Simd::Store(b, scratch.k + (d + 1) * kKeyTile + j);
    }
  }
}

// K of the tile, rotated and transposed, and V, widened. Returns how many keys there are.
template <typename Op, typename T>
inline int PrepareTile(const TaskView<T>& t, int64_t base, const T* const* rows, int n,
                       const ExtendScratch& scratch) {
  if (t.p.rope.rotary_dim > 0) PositionAngles(t.p.rope, base, scratch.cosine, scratch.sine);
  TransposeRows(rows, t.dim * static_cast<int>(sizeof(T)) / 4, scratch.words);
  RotateTile<T>(t.p.rope, t.dim, scratch);
  Op::PackColumns(scratch.k, t.dim);
  Op::PackValues(rows, t.p.kv.kv_stride, n, t.dim, scratch.v);
  return n;
}

// Rows [row, row + kRowTile) against the n keys of the prepared tile at `base`.
template <typename Op, typename T>
inline void AttendTile(const TaskView<T>& t, int64_t base, int n, int row,
                       const ExtendScratch& scratch, float* o) {
  float keep[kMaxSoftmaxRows];
  int begin[kMaxSoftmaxRows], end[kMaxSoftmaxRows];
  Gemm<Op, kRowTile>(t.dim / Op::kPerWord, scratch.q + int64_t{row} * t.dim, t.dim,
                     DenseRows{scratch.k, kKeyTile}, kKeyTile, scratch.s, kKeyTile, nullptr);
  for (int r = 0; r < kRowTile; ++r) t.Limits(row + r, base, begin + r, end + r);
  SoftmaxRows(scratch.s, kRowTile, begin, end, t.cap, scratch.m + row,
              scratch.l + int64_t{row} * Simd::kLanes, keep);
  for (int r = 0; r < kRowTile; ++r) Op::PackRow(scratch.s + r * kKeyTile, kKeyTile);
  Gemm<Op, kRowTile>((n + Op::kPerWord - 1) / Op::kPerWord, scratch.s, kKeyTile,
                     DenseRows{scratch.v, t.dim}, t.dim, o, t.dim, keep);
}

template <typename T>
inline void Extend(const TaskView<T>& t, const AttnState& state, float* memory) {
  using Op = typename OperandsOf<T>::Type;
  const ExtendScratch scratch(t, memory);
  __builtin_memset(state.o, 0, int64_t{t.rows} * t.dim * sizeof(float));
  FillTileAngles(t.p.rope, scratch.angles);
  PrepareQueries<Op>(t, scratch);
  const T* rows[kKeyTile];
  const int64_t first = t.FirstBase();
  int n = t.KeyRows(first, rows);
  for (int64_t base = first; base < t.task.kv_end; base += kKeyTile) {
    PrepareTile<Op>(t, base, rows, n, scratch);
    const int now_n = n;
    n = t.KeyRows(base + kKeyTile, rows);
    // Rows before the tile see none of it.
    const int64_t hidden = (base - t.first_position) * t.group;
    const int begin = hidden > 0 ? static_cast<int>(hidden / kRowTile * kRowTile) : 0;
    int fetched = 0;
    for (int row = begin; row < t.rows; row += kRowTile) {
      // Evenly over the row tiles.
      const int fetch = n * (row + kRowTile - begin) / (t.rows - begin);
      for (; fetched < fetch && fetched < n; ++fetched) {
        Prefetch(rows[fetched], t.dim);
        Prefetch(rows[fetched] + t.p.kv.kv_stride, t.dim);
      }
      float* o = row + kRowTile <= t.rows ? state.o + int64_t{row} * t.dim : scratch.tail;
      AttendTile<Op>(t, base, now_n, row, scratch, o);
    }
  }
  const int whole = t.rows / kRowTile * kRowTile;
  __builtin_memcpy(state.o + int64_t{whole} * t.dim, scratch.tail,
                   int64_t{t.rows - whole} * t.dim * sizeof(float));
  for (int r = 0; r < t.rows; ++r) {
    state.m[r] = scratch.m[r];
    state.l[r] = Simd::ReduceAdd(Simd::Load(scratch.l + int64_t{r} * Simd::kLanes));
  }
}
