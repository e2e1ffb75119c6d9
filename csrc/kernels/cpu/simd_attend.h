// Attention of one task with vectors. Included after a Simd and the other simd_*.h parts.
//
// Keys are taken in tiles of 64, aligned to absolute positions. Two algorithms:
//   decode (at most 8 rows): a few keys at a time are rotated by their in-tile angles and
//     multiplied with rows that were advanced by the tile's base, so K and V are read from memory
//     once for all query heads of the group, and nothing is transposed.
//   extend (more rows): the tile's K is rotated by absolute angles once, transposed into scratch,
//     and V widened into scratch; then 6 rows at a time do Q K^T, softmax, P V in registers.
#pragma once

constexpr int kMaxDecodeRows = kMaxSoftmaxRows;
constexpr int kRowTile = 6;    // rows of a register tile in extend, simd_*.h
constexpr int kValueRows = 4;  // and of P V in decode
constexpr int kDotKeys = 4;    // keys at a time in decode: what Sum4 reduces together

// What both algorithms need to know of a task.
template <typename T>
struct TaskView {
  const AttnParams& p;
  const AttnTask& task;
  int group, dim, rows;
  int64_t first_position;  // of the task's first token
  const T* kv;
  float q_scale, cap;  // see SoftCap

  TaskView(const AttnParams& params, const AttnTask& attn_task)
      : p(params),
        task(attn_task),
        group(p.num_q_heads / p.kv.num_kv_heads),
        dim(p.kv.head_dim),
        rows(task.num_tokens * group),
        first_position(int64_t{p.kv_lens[task.seq]} - (p.cu_q[task.seq + 1] - p.cu_q[task.seq]) +
                       task.row_begin),
        kv(static_cast<const T*>(p.kv.data)) {
    constexpr float kLog2E = 1.44269504088896340736f;
    cap = p.softcap * kLog2E;
    q_scale = p.softcap > 0.f ? 2.f * kLog2E * p.sm_scale / p.softcap : kLog2E * p.sm_scale;
  }

  const T* Query(int row) const {
    const int64_t token = p.cu_q[task.seq] + task.row_begin + row / group;
    return static_cast<const T*>(p.q) + token * p.q_token_stride +
           int64_t{task.kv_head * group + row % group} * dim;
  }
  int64_t Position(int row) const { return first_position + row / group; }

  // Keys of the tile at `base` that row `row` attends to: [begin, end) within the tile.
  void Limits(int row, int64_t base, int* begin, int* end) const {
    const int64_t position = Position(row);
    const int64_t last = position + 1 < task.kv_end ? position + 1 : task.kv_end;
    const int64_t first = p.window > 0 ? position - p.window + 1 : 0;
    *end = last - base > kKeyTile ? kKeyTile : static_cast<int>(last - base);
    *begin = first - base > 0
                 ? (first - base > kKeyTile ? kKeyTile : static_cast<int>(first - base))
                 : 0;
  }

  // First tile that some row attends to.
  int64_t FirstBase() const {
    const int64_t first = p.window > 0 ? first_position - p.window + 1 : 0;
    const int64_t aligned = first > 0 ? first / kKeyTile * kKeyTile : 0;
    return aligned > task.kv_begin ? aligned : task.kv_begin;
  }

  // Pointers to the K rows of the tile at `base`; V lies kv_stride on. Returns how many.
  int KeyRows(int64_t base, const T** rows_out) const {
    const int64_t end = base + kKeyTile < task.kv_end ? base + kKeyTile : task.kv_end;
    const int32_t* table = p.block_table + task.seq * p.max_blocks;
    for (int64_t j = base; j < end;) {
      const int64_t block = j / p.kv.block_size, block_end = (block + 1) * p.kv.block_size;
      const T* row = kv + table[block] * p.kv.slot_stride + task.kv_head * p.kv.head_stride +
                     (j % p.kv.block_size) * p.kv.token_stride;
      for (; j < end && j < block_end; ++j, row += p.kv.token_stride) rows_out[j - base] = row;
    }
    return static_cast<int>(end - base);
  }
};

// Cuts the scratch into arrays; each starts on a cache line.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}
  float* Floats(int64_t n) {
    float* result = next_;
    next_ += (n + 15) / 16 * 16;
    return result;
  }

 private:
  float* next_;
};

inline int64_t ScratchFloats(const AttnParams& p, int64_t rows) {
  const int64_t dim = p.kv.head_dim, padded = rows + kRowTile;
  // Angles of a tile, of a row; rotated rows, their state; K and V tiles; 8 rows of logits; the
  // rows of a part-filled register tile. Decode needs less, wider kernels at most this.
  return 2 * kKeyTile * dim + 2 * dim + padded * (dim + Simd::kLanes + 1) + 3 * kKeyTile * dim +
         kMaxDecodeRows * (kKeyTile + dim) + kRowTile * dim + 16 * 16;
}

// Angles of the tile's keys, kKeyTile rows of `width` floats.
struct TileAngles {
  float* cosine;
  float* sine;
  int width;

  TileAngles(const RopeTables& rope, int dim, Arena* arena)
      : cosine(arena->Floats(kKeyTile * dim)),
        sine(arena->Floats(kKeyTile * dim)),
        width(AngleWidth(rope)) {}
  void Fill(const RopeTables& rope, int64_t base) {
    for (int j = 0; j < kKeyTile && rope.rotary_dim > 0; ++j) {
      PositionAngles(rope, base + j, cosine + j * width, sine + j * width);
    }
  }
};

// ---- decode ----

// fn(Rows<R>, r) over rows [r, r + R) until all are done, R at most kMost.
template <int R>
struct Rows {
  static constexpr int kCount = R;
};
template <int kMost, typename Fn>
inline void ByRows(int r, int rows, const Fn& fn) {
  for (; r + kMost <= rows; r += kMost) fn(Rows<kMost>{}, r);
  if constexpr (kMost > 1) ByRows<kMost - 1>(r, rows, fn);
}

// s[r][0..4) = R rows of q times 4 rotated keys.
template <int R>
inline void DotKeys(const float* q, const float* keys, int dim, float* s) {
  Simd::F sum[R][kDotKeys];
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < kDotKeys; ++k) sum[r][k] = Simd::Zero();
  }
  for (int i = 0; i < dim; i += Simd::kLanes) {
    Simd::F x[kDotKeys];
    for (int k = 0; k < kDotKeys; ++k) x[k] = Simd::Load(keys + k * dim + i);
    for (int r = 0; r < R; ++r) {
      const Simd::F y = Simd::Load(q + r * dim + i);
      for (int k = 0; k < kDotKeys; ++k) sum[r][k] = Simd::Fma(x[k], y, sum[r][k]);
    }
  }
  for (int r = 0; r < R; ++r) {
    Simd::Sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * kKeyTile);
  }
}

// Fetches rows [j, j + count) of the next tile while this one is computed: the hardware prefetcher
// stops at 4 KiB pages, and a tile of one head is 4 to 32 KiB.
template <typename T>
inline void PrefetchRows(const TaskView<T>& t, const T* const* rows, int j, int count, int n) {
  const int end = j + count < n ? j + count : n;
  for (; j < end; ++j) {
    for (int i = 0; i < t.dim; i += 64 / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(rows[j] + i);
      __builtin_prefetch(rows[j] + t.p.kv.kv_stride + i);
    }
  }
}

// Logits of all rows against the n keys of a tile. `keys` holds a few rotated keys.
template <typename T>
inline void DecodeLogits(const TaskView<T>& t, const T* const* rows, const T* const* next, int n,
                         int next_n, const TileAngles& angles, const float* q, float* keys,
                         float* s) {
  for (int j = 0; j < n; j += kDotKeys) {
    const T* some[kDotKeys];
    for (int k = 0; k < kDotKeys; ++k) some[k] = rows[j + k < n ? j + k : n - 1];
    RotateRows<kDotKeys>(t.p.rope, some, t.dim, angles.cosine + j * angles.width,
                         angles.sine + j * angles.width, 1.f, keys);
    PrefetchRows(t, next, j, kDotKeys, next_n);
    ByRows<Simd::kDotRows>(0, t.rows, [&](auto count, int r) {
      DotKeys<count.kCount>(q + r * t.dim, keys, t.dim, s + r * kKeyTile + j);
    });
  }
}

template <typename T>
inline void Decode(const TaskView<T>& t, const AttnState& state, float* scratch) {
  Arena arena(scratch);
  TileAngles angles(t.p.rope, t.dim, &arena);
  float* row_angles = arena.Floats(2 * t.dim);
  float* q = arena.Floats(int64_t{t.rows} * t.dim);
  float* l = arena.Floats(int64_t{t.rows} * Simd::kLanes);
  float* keys = arena.Floats(kDotKeys * t.dim);
  float* s = arena.Floats((kMaxDecodeRows + 1) * kKeyTile);
  const T* rows[2][kKeyTile];
  float keep[kMaxSoftmaxRows];
  int begin[kMaxSoftmaxRows], end[kMaxSoftmaxRows];
  angles.Fill(t.p.rope, 0);
  __builtin_memset(l, 0, t.rows * Simd::kLanes * sizeof(float));
  int n = 0, next_n = 0, now = 0;
  const int64_t first = t.FirstBase();
  if (first < t.task.kv_end) next_n = t.KeyRows(first, rows[0]);
  for (int64_t base = first; base < t.task.kv_end; base += kKeyTile, now ^= 1) {
    n = next_n;
    next_n = base + kKeyTile < t.task.kv_end ? t.KeyRows(base + kKeyTile, rows[now ^ 1]) : 0;
    for (int r = 0; r < t.rows; ++r) {
      const int64_t relative = t.Position(r) - base;
      if (r % t.group == 0 && relative >= 0) {
        PositionAngles(t.p.rope, relative, row_angles, row_angles + t.dim);
      }
      const T* row = t.Query(r);
      RotateRows<1>(t.p.rope, &row, t.dim, row_angles, row_angles + t.dim, t.q_scale,
                    q + r * t.dim);
    }
    DecodeLogits(t, rows[now], rows[now ^ 1], n, next_n, angles, q, keys, s);
    for (int r = 0; r < t.rows; ++r) t.Limits(r, base, begin + r, end + r);
    SoftmaxRows(s, t.rows, begin, end, t.cap, state.m, l, keep);
    const CacheRows<T> values{rows[now], t.p.kv.kv_stride};
    ByRows<kValueRows>(0, t.rows, [&](auto count, int r) {
      Gemm<FloatOperands, count.kCount>(n, s + r * kKeyTile, kKeyTile, values, t.dim,
                                        state.o + r * t.dim, t.dim, keep + r);
    });
  }
  for (int r = 0; r < t.rows; ++r) state.l[r] = Simd::ReduceAdd(Simd::Load(l + r * Simd::kLanes));
}

// ---- extend ----

// Scratch of the extend algorithm.
struct ExtendScratch {
  TileAngles angles;
  float *q, *l, *m;             // rows padded to the register tile
  float *k, *k_transposed, *v;  // [kKeyTile, D], [D, kKeyTile], [kKeyTile, D]
  float *s, *tail;              // [kRowTile, kKeyTile]; o of a part-filled register tile

  template <typename T>
  ExtendScratch(const TaskView<T>& t, Arena* arena) : angles(t.p.rope, t.dim, arena) {
    const int64_t padded = t.rows + kRowTile;
    q = arena->Floats(padded * t.dim);
    l = arena->Floats(padded * Simd::kLanes);
    m = arena->Floats(padded);
    k = arena->Floats(Simd::kLanes * t.dim);
    k_transposed = arena->Floats(kKeyTile * t.dim);
    v = arena->Floats(kKeyTile * t.dim);
    s = arena->Floats(kRowTile * kKeyTile);
    tail = arena->Floats(kRowTile * t.dim);
  }
};

// Rotates, scales and widens the query rows; zeroes the padding and the running sums.
template <typename Op, typename T>
inline void PrepareQueries(const TaskView<T>& t, const ExtendScratch& scratch, float* angles) {
  for (int r = 0; r < t.rows; ++r) {
    const int64_t position = t.Position(r) > 0 ? t.Position(r) : 0;
    if (r % t.group == 0) PositionAngles(t.p.rope, position, angles, angles + t.dim);
    const T* row = t.Query(r);
    RotateRows<1>(t.p.rope, &row, t.dim, angles, angles + t.dim, t.q_scale,
                  scratch.q + int64_t{r} * t.dim);
    Op::PackRow(scratch.q + int64_t{r} * t.dim, t.dim);
  }
  const int64_t padded = t.rows + kRowTile;
  __builtin_memset(scratch.q + int64_t{t.rows} * t.dim, 0, kRowTile * t.dim * sizeof(float));
  __builtin_memset(scratch.l, 0, padded * Simd::kLanes * sizeof(float));
  __builtin_memset(scratch.tail, 0, kRowTile * t.dim * sizeof(float));
  for (int64_t r = 0; r < padded; ++r) scratch.m[r] = -__builtin_inff();
}

// K of the tile, rotated and transposed, and V, widened. Past n, K repeats the last key.
template <typename Op, typename T>
inline void PrepareTile(const TaskView<T>& t, int64_t base, const ExtendScratch& scratch, int* n) {
  const T* rows[kKeyTile];
  *n = t.KeyRows(base, rows);
  for (int j = *n; j < kKeyTile; ++j) rows[j] = rows[*n - 1];  // masked later
  TileAngles angles = scratch.angles;
  angles.Fill(t.p.rope, base);
  for (int j = 0; j < kKeyTile; j += Simd::kLanes) {
    for (int k = j; k < j + Simd::kLanes; k += kDotKeys) {
      RotateRows<kDotKeys>(t.p.rope, rows + k, t.dim, angles.cosine + k * angles.width,
                           angles.sine + k * angles.width, 1.f, scratch.k + (k - j) * t.dim);
    }
    for (int k = 0; k < Simd::kLanes; ++k) Op::PackRow(scratch.k + k * t.dim, t.dim);
    for (int i = 0; i < t.dim / Op::kPerWord; i += Simd::kLanes) {
      Simd::Transpose(scratch.k + i, t.dim, scratch.k_transposed + i * kKeyTile + j, kKeyTile);
    }
  }
  Op::PackValues(rows, t.p.kv.kv_stride, *n, t.dim, scratch.v);
}

template <typename T>
inline void Extend(const TaskView<T>& t, const AttnState& state, float* memory) {
  using Op = typename OperandsOf<T>::Type;
  Arena arena(memory);
  const ExtendScratch scratch(t, &arena);
  float keep[kMaxSoftmaxRows];
  int begin[kMaxSoftmaxRows], end[kMaxSoftmaxRows];
  PrepareQueries<Op>(t, scratch, arena.Floats(2 * t.dim));
  for (int64_t base = t.FirstBase(); base < t.task.kv_end; base += kKeyTile) {
    int n;
    PrepareTile<Op>(t, base, scratch, &n);
    // Rows before the tile see none of it.
    const int64_t hidden = (base - t.first_position) * t.group;
    int row = hidden > 0 ? static_cast<int>(hidden / kRowTile * kRowTile) : 0;
    for (; row < t.rows; row += kRowTile) {
      float* o = row + kRowTile <= t.rows ? state.o + int64_t{row} * t.dim : scratch.tail;
      Gemm<Op, kRowTile>(t.dim / Op::kPerWord, scratch.q + int64_t{row} * t.dim, t.dim,
                         DenseRows{scratch.k_transposed, kKeyTile}, kKeyTile, scratch.s, kKeyTile,
                         nullptr);
      for (int r = 0; r < kRowTile; ++r) t.Limits(row + r, base, begin + r, end + r);
      SoftmaxRows(scratch.s, kRowTile, begin, end, t.cap, scratch.m + row,
                  scratch.l + int64_t{row} * Simd::kLanes, keep);
      for (int r = 0; r < kRowTile; ++r) Op::PackRow(scratch.s + r * kKeyTile, kKeyTile);
      Gemm<Op, kRowTile>((n + Op::kPerWord - 1) / Op::kPerWord, scratch.s, kKeyTile,
                         DenseRows{scratch.v, t.dim}, t.dim, o, t.dim, keep);
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

template <typename T>
inline void AttendRows(const AttnParams& p, const AttnTask& task, const AttnState& state,
                       float* scratch) {
  const TaskView<T> t(p, task);
  __builtin_memset(state.o, 0, int64_t{t.rows} * t.dim * sizeof(float));
  if (t.rows > kMaxDecodeRows) return Extend(t, state, scratch);
  for (int r = 0; r < t.rows; ++r) state.m[r] = -__builtin_inff();
  Decode(t, state, scratch);
}
