// Extend and prefill on tensor cores by mma.sync (sm_80 and up): the FlashAttention-2 schedule over
// K that is rotated in shared memory, once a tile, for all of the block's rows.
//
// A block of 4 warps takes 128 rows of q (64 of head_dim 256), which stay in shared memory, rotated
// and scaled. A warp owns 32 of them (16), so that two products share each fragment of K and V:
// with 16 rows a warp, fragments alone would use all of shared memory's 128 bytes a cycle. Two or
// three blocks share a multiprocessor: the products of one run under the rotation and the softmax
// of another.
//
// Tile t of the keys goes through (every barrier is of the whole block)
//   barrier                   K of t is rotated; the buffers of V and of the other K are free
//   start loads               V of t, K of t + 1
//   S = Q K^T, softmax        P in registers
//   barrier                   V of t has landed
//   O += P V
//   rotate K of t + 1         each thread the chunks that it loaded itself, so no barrier before
#pragma once

#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/attn_tile.h"
#include "csrc/kernels/cuda/launch.h"

namespace cachedattn::cuda {

constexpr int kExtendWarps = 4;
constexpr int kExtendThreads = 32 * kExtendWarps;
constexpr int kUnitPairs = 8;  // pairs that a thread rotates together: two chunks of 16 bytes

// Sizes by head_dim D. Rows of q, K and V are 2 D bytes, D / 8 chunks.
template <int D>
struct ExtendShape {
  static constexpr int kRows = ExtendRows(D);
  static constexpr int kRowTiles = kRows / kExtendWarps / 16;  // of 16 rows, in a warp
  // Keys in a tile. A thread holds O in D * kRowTiles / 2 registers (128 at D = 128 and 256) and S
  // in kKeys * kRowTiles / 2 (64 at 64 keys), of 255. D = 256 takes 32 keys for its shared memory.
  static constexpr int kKeys = D == 256 ? 32 : 64;
  // Rotation: D / 16 units of 8 pairs a key, as many keys at a time as threads allow: 80 of 128
  // threads at D = 80, 96 at 96, else all.
  static constexpr int kUnits = D / 16;
  static constexpr int kPassKeys = D == 64 ? 32 : D == 256 ? 8 : 16;
  static constexpr int kPasses = kKeys / kPassKeys;
  // Shared memory: q, two tiles of K, one of V, where the rows of two tiles lie. For two blocks
  // each may have (164 KB of sm_80) / 2 - 1 KB = 81 KB, which D = 128 uses to the last byte; for
  // three 53.6 KB.
  //   D        64    80    96   128   256
  //   q, KB    16    20    24    32    32
  //   tile, KB  8    10    12    16    16
  //   sum, KB  41    51    61    81    80.5
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kKeysAt = kRows * kRowBytes;
  static constexpr int kValuesAt = kKeysAt + 2 * kTileBytes;
  static constexpr int kOffsetsAt = kValuesAt + kTileBytes;
  static constexpr int kSharedBytes = kOffsetsAt + 2 * kKeys * 8;
  // Blocks on a multiprocessor: 65,536 registers / 384 threads = 170 a thread for D = 64, else 255.
  static constexpr int kBlocks = D == 64 ? 3 : 2;
  // Chunk c of row r lies at chunk c ^ Turn(r), so that the same chunk of 8 rows in turn covers all
  // banks: rows are D / 8 chunks, of which 8 fill the banks once. An XOR below kCycle = gcd(D / 8,
  // 8) stays inside the row.
  static constexpr int kCycle = D == 80 ? 2 : D == 96 ? 4 : 8;
  CA_DEVICE static int Turn(int row) { return row / (8 / kCycle) % kCycle; }
  CA_DEVICE static int ChunkAt(int row, int chunk) {  // bytes
    return row * kRowBytes + 16 * (chunk ^ Turn(row));
  }
  // Of chunk 2 i + half within its row, from lane = half ^ Turn(row). One XOR serves every i that
  // is the same modulo kCycle / 2.
  CA_DEVICE static int PairAt(int i, int lane) {
    return 16 * (2 * i / kCycle * kCycle + ((2 * i % kCycle) ^ lane));
  }
};

// ---- rotation ----

// 8 pairs of a row and the two chunks that hold them. In half-split order the first dims of the
// pairs fill chunk a and the second ones b; else a and b are adjacent. Together the units of a row
// cover all of its chunks, those that are not rotated too.
struct RotaryUnit {
  int pair, a, b;
  CA_DEVICE RotaryUnit(const RopeTables& rope, int unit) : pair(kUnitPairs * unit) {
    const bool split = !rope.interleaved && pair < rope.rotary_dim / 2;
    a = split ? unit : 2 * unit;
    b = split ? unit + rope.rotary_dim / (2 * kUnitPairs) : 2 * unit + 1;
  }
};

// Angles of a unit from a row of a table; pairs past the last stay as they are.
CA_DEVICE void LoadAngles(const float* table, int row, int pairs, int first_pair,
                          F2 (&angle)[kUnitPairs]) {
  const F2* at = reinterpret_cast<const F2*>(table) + int64_t{row} * pairs;
  CA_UNROLL
  for (int i = 0; i < kUnitPairs; ++i) {
    const int pair = first_pair + i;
    angle[i] = pair < pairs ? at[pair] : F2{1.f, 0.f};
  }
}
// angle = angle + other
CA_DEVICE void AddAngles(const F2 (&other)[kUnitPairs], F2 (&angle)[kUnitPairs]) {
  CA_UNROLL
  for (int i = 0; i < kUnitPairs; ++i) angle[i] = Rotate(angle[i], other[i]);
}
// Of `position`, as PairAngle.
CA_DEVICE void PositionAngles(const RopeTables& rope, int pair, int position,
                              F2 (&angle)[kUnitPairs]) {
  F2 hi[kUnitPairs];
  const int pairs = rope.rotary_dim / 2;
  LoadAngles(rope.hi, position / RopeTables::kLoRows, pairs, pair, hi);
  LoadAngles(rope.lo, position % RopeTables::kLoRows, pairs, pair, angle);
  AddAngles(hi, angle);
}

// Two pairs in half-split order: a holds their first dims, b their second.
template <typename T>
CA_DEVICE void RotateSplit(uint32_t* a, uint32_t* b, F2 lower, F2 upper) {
  const F2 first = UnpackPair<T>(*a), second = UnpackPair<T>(*b);
  const F2 x = Rotate({first.x, second.x}, lower), y = Rotate({first.y, second.y}, upper);
  *a = PackPair<T>(x.x, y.x);
  *b = PackPair<T>(x.y, y.y);
}
template <typename T>
CA_DEVICE void RotateAdjacent(uint32_t* word, F2 angle) {
  const F2 x = Rotate(UnpackPair<T>(*word), angle);
  *word = PackPair<T>(x.x, x.y);
}
template <typename T>
CA_DEVICE void RotateUnit(bool interleaved, const F2 (&angle)[kUnitPairs], U4* a, U4* b) {
  if (interleaved) {
    RotateAdjacent<T>(&a->x, angle[0]), RotateAdjacent<T>(&a->y, angle[1]);
    RotateAdjacent<T>(&a->z, angle[2]), RotateAdjacent<T>(&a->w, angle[3]);
    RotateAdjacent<T>(&b->x, angle[4]), RotateAdjacent<T>(&b->y, angle[5]);
    RotateAdjacent<T>(&b->z, angle[6]), RotateAdjacent<T>(&b->w, angle[7]);
  } else {
    RotateSplit<T>(&a->x, &b->x, angle[0], angle[1]);
    RotateSplit<T>(&a->y, &b->y, angle[2], angle[3]);
    RotateSplit<T>(&a->z, &b->z, angle[4], angle[5]);
    RotateSplit<T>(&a->w, &b->w, angle[6], angle[7]);
  }
}

// Rows of q to shared memory: rotated at their positions and scaled in float32, rounded once. Rows
// past the block's are zero.
template <typename T, int D>
CA_DEVICE void LoadQueries(const AttnParams& p, const AttnTile& t, char* queries) {
  using Shape = ExtendShape<D>;
  const float scale = kLog2E * p.sm_scale;
  for (int i = ThreadIndex(); i < Shape::kRows * Shape::kUnits; i += kExtendThreads) {
    const int row = i / Shape::kUnits;
    const RotaryUnit unit(p.rope, i % Shape::kUnits);
    U4 a = {0, 0, 0, 0}, b = {0, 0, 0, 0};
    if (row < t.num_rows) {
      const T* q = static_cast<const T*>(p.q) + QueryOffset(p, t, row);
      a = *reinterpret_cast<const U4*>(q + 8 * unit.a);
      b = *reinterpret_cast<const U4*>(q + 8 * unit.b);
      const int position = t.Position(row);  // negative: attends to nothing
      F2 angle[kUnitPairs];
      PositionAngles(p.rope, unit.pair, position > 0 ? position : 0, angle);
      for (int j = 0; j < kUnitPairs; ++j) angle[j] = {angle[j].x * scale, angle[j].y * scale};
      RotateUnit<T>(p.rope.interleaved, angle, &a, &b);
    }
    StoreShared(queries + Shape::ChunkAt(row, unit.a), a);
    StoreShared(queries + Shape::ChunkAt(row, unit.b), b);
  }
}

// ---- tiles of keys ----

// What a thread loads of every tile of K and V, and rotates of K: a unit of each kPassKeys-th key,
// from `key` on.
template <typename T, int D>
struct TileShare {
  using Shape = ExtendShape<D>;
  RotaryUnit unit;
  int key;
  int at_a, at_b;  // the two chunks of `key` in a tile, bytes
  bool loads, rotates;

  CA_DEVICE explicit TileShare(const RopeTables& rope)
      : unit(rope, ThreadIndex() % Shape::kUnits), key(ThreadIndex() / Shape::kUnits) {
    at_a = Shape::ChunkAt(key, unit.a);
    at_b = Shape::ChunkAt(key, unit.b);
    loads = key < Shape::kPassKeys;
    rotates = loads && unit.pair < rope.rotary_dim / 2;
  }

  // Starts copying a tile of K or V from `data`, row j of it at element offsets[j]. Rows from
  // `num_keys` on become zero: what lies in unused slots may be NaN.
  CA_DEVICE void Load(const T* data, const int64_t* offsets, int num_keys, char* tile) const {
    CA_UNROLL
    for (int pass = 0; loads && pass < Shape::kPasses; ++pass) {
      const int j = key + pass * Shape::kPassKeys;
      const T* row = data + LoadShared<int64_t>(offsets + j);
      char* to = tile + pass * Shape::kPassKeys * Shape::kRowBytes;
      CpAsync16(to + at_a, row + 8 * unit.a, j < num_keys);
      CpAsync16(to + at_b, row + 8 * unit.b, j < num_keys);
    }
  }

  // Rotates K in place; the tile's first key is at position `base`. The angles of the thread's
  // first key come from the tables, each further key's by a step of kPassKeys positions.
  CA_DEVICE void RotateKeys(const RopeTables& rope, int base, char* tile) const {
    if (!rotates) return;
    F2 angle[kUnitPairs], step[kUnitPairs];
    PositionAngles(rope, unit.pair, base + key, angle);
    LoadAngles(rope.lo, Shape::kPassKeys, rope.rotary_dim / 2, unit.pair, step);
    CA_UNROLL
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      char* at = tile + pass * Shape::kPassKeys * Shape::kRowBytes;
      U4 a = LoadShared<U4>(at + at_a), b = LoadShared<U4>(at + at_b);
      RotateUnit<T>(rope.interleaved, angle, &a, &b);
      StoreShared(at + at_a, a);
      StoreShared(at + at_b, b);
      if (pass + 1 < Shape::kPasses) AddAngles(step, angle);
    }
  }
};

// ---- a warp's rows ----

// Which rows see a key, without a division: row r stands at first_position + (row_begin + r) / G,
// so key j is seen by the `span` rows from (j - first_position) G - row_begin on, its first row.
struct Visibility {
  int group, span;
  int first_row;  // of the key at hand

  CA_DEVICE Visibility(const AttnTile& t, int window, int key)
      : group(t.group), first_row((key - t.first_position) * t.group - t.row_begin) {
    const int longest = t.Position(t.num_rows - 1);  // a longer window hides nothing
    span = window > 0 && window <= longest ? window * group : INT32_MAX;
  }
  CA_DEVICE void Advance(int keys) { first_row += keys * group; }
  // Some, or all, of the rows [begin, end) see some, or all, of the next `keys` keys.
  CA_DEVICE bool Some(int begin, int end, int keys) const {
    return end > first_row && begin - first_row - (keys - 1) * group < span;
  }
  CA_DEVICE bool All(int begin, int end, int keys) const {
    return begin >= first_row + (keys - 1) * group && end - 1 - first_row < span;
  }
};

// The softmax state and the products of a warp's rows. A lane holds rows lane / 4 and lane / 4 + 8
// of each row tile, "its" rows 2 m and 2 m + 1 of row tile m, as the fragments of Mma16816 lie.
template <typename T, int D>
struct WarpRows {
  using Shape = ExtendShape<D>;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeySteps = Shape::kKeys / 16;
  float o[kRowTiles][D / 8][4];  // [rows][D], not yet divided by l
  float m[2 * kRowTiles];        // reference of the exponents, -inf before the first key
  float l[2 * kRowTiles];        // this lane's part of the sum
  uint32_t weights[kRowTiles][kKeySteps][4];  // P, [rows][keys]

  CA_DEVICE WarpRows() {
    CA_UNROLL
    for (int r = 0; r < 2 * kRowTiles; ++r) m[r] = -Infinity(), l[r] = 0.f;
    CA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      CA_UNROLL
      for (int n = 0; n < D / 8; ++n) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.f;
    }
  }

  // s = Q K^T. `queries` is the warp's first row.
  CA_DEVICE static void Logits(const char* queries, const char* keys,
                               float (&s)[kRowTiles][2 * kKeySteps][4]) {
    const int lane = LaneIndex();
    const int q_row = lane % 16, q_lane = lane / 16 ^ Shape::Turn(q_row);
    const int k_row = lane % 8 + lane / 16 * 8, k_lane = lane / 8 % 2 ^ Shape::Turn(k_row);
    CA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      CA_UNROLL
      for (int n = 0; n < 2 * kKeySteps; ++n)
        s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.f;
    }
    CA_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[kRowTiles][4];
      CA_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        LoadMatrix4(queries + (16 * i + q_row) * Shape::kRowBytes + Shape::PairAt(step, q_lane),
                    a[i]);
      }
      CA_UNROLL
      for (int n = 0; n < kKeySteps; ++n) {
        uint32_t b[4];
        LoadMatrix4(keys + (16 * n + k_row) * Shape::kRowBytes + Shape::PairAt(step, k_lane), b);
        CA_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          Mma16816<T>(s[i][2 * n], a[i], {b[0], b[1]});
          Mma16816<T>(s[i][2 * n + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  // o += P V
  CA_DEVICE void AddValues(const char* values) {
    const int lane = LaneIndex();
    const int v_row = lane % 16, v_lane = lane / 16 ^ Shape::Turn(v_row);
    CA_UNROLL
    for (int step = 0; step < kKeySteps; ++step) {
      CA_UNROLL
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4Transposed(
            values + (16 * step + v_row) * Shape::kRowBytes + Shape::PairAt(n, v_lane), b);
        CA_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          Mma16816<T>(o[i][2 * n], weights[i][step], {b[0], b[1]});
          Mma16816<T>(o[i][2 * n + 1], weights[i][step], {b[2], b[3]});
        }
      }
    }
  }

  // Turns logits into weights. m follows the largest logit only when that is kSlack above it:
  // weights up to 2^kSlack cost no accuracy, and o is almost never multiplied after the first
  // tiles.
  CA_DEVICE void Softmax(float (&s)[kRowTiles][2 * kKeySteps][4]) {
    constexpr float kSlack = 8.f;
    float keep[2 * kRowTiles], least = 1.f;
    CA_UNROLL
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int i = r / 2, e = r % 2 * 2;
      float peak = -Infinity();
      CA_UNROLL
      for (int n = 0; n < 2 * kKeySteps; ++n) peak = Max(peak, Max(s[i][n][e], s[i][n][e + 1]));
      peak = Max(peak, ShuffleXor(peak, 1));
      peak = Max(peak, ShuffleXor(peak, 2));
      const float next = peak > m[r] + kSlack ? peak : m[r];
      const float shift = next == -Infinity() ? 0.f : next;  // no key yet: all weights are 0
      keep[r] = next == m[r] ? 1.f : Exp2(m[r] - next);
      least = keep[r] < least ? keep[r] : least;
      m[r] = next;
      float sum = 0.f;
      CA_UNROLL
      for (int n = 0; n < 2 * kKeySteps; ++n) {
        s[i][n][e] = Exp2(s[i][n][e] - shift);
        s[i][n][e + 1] = Exp2(s[i][n][e + 1] - shift);
        sum += s[i][n][e] + s[i][n][e + 1];
      }
      l[r] = l[r] * keep[r] + sum;
    }
    CA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      CA_UNROLL
      for (int step = 0; step < kKeySteps; ++step) {
        CA_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float* pair = &s[i][2 * step + e / 2][e % 2 * 2];
          weights[i][step][e] = PackPair<T>(pair[0], pair[1]);
        }
      }
    }
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      const float other = ShuffleXor(least, lanes);
      least = other < least ? other : least;
    }
    if (least == 1.f) return;
    CA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      CA_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        CA_UNROLL
        for (int e = 0; e < 4; ++e) o[i][n][e] *= keep[2 * i + e / 2];
      }
    }
  }
};

// Caps logits, as SoftCap.
template <int kRowTiles, int kKeys>
CA_DEVICE void CapLogits(float softcap, float (&s)[kRowTiles][kKeys][4]) {
  const float scale = 2.f / softcap;
  CA_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    CA_UNROLL
    for (int n = 0; n < kKeys; ++n) {
      CA_UNROLL
      for (int e = 0; e < 4; ++e) s[i][n][e] = SoftCap(s[i][n][e] * scale, softcap);
    }
  }
}

// Makes the logits of keys that a row does not see -inf.
template <int kRowTiles, int kKeys>
CA_DEVICE void MaskLogits(const Visibility& seen, int first_row, float (&s)[kRowTiles][kKeys][4]) {
  const int lane = LaneIndex();
  // By way of a shuffle the compiler cannot keep the group's multiples in registers all the time.
  const int group = static_cast<int>(ShuffleFrom(seen.group, 0));
  const int above = first_row + lane / 4 - seen.first_row - lane % 4 * 2 * group;
  CA_UNROLL
  for (int n = 0; n < kKeys; ++n) {
    CA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      CA_UNROLL
      for (int e = 0; e < 4; ++e) {
        // Rows from the key's first on; negative ones are large as unsigned.
        const int rows = above - (8 * n + e % 2) * group + 16 * i + e / 2 * 8;
        const bool sees = static_cast<uint32_t>(rows) < static_cast<uint32_t>(seen.span);
        s[i][n][e] = sees ? s[i][n][e] : -Infinity();
      }
    }
  }
}

// ---- results ----

// Saves the warp's rows as its part of the state of a split.
template <typename T, int D>
CA_DEVICE void SaveState(const AttnLaunch& launch, const AttnTile& t, int first_row,
                         const WarpRows<T, D>& rows) {
  float* state = SplitState(launch, t, t.split);
  CA_UNROLL
  for (int r = 0; r < 2 * ExtendShape<D>::kRowTiles; ++r) {
    const int row = first_row + 8 * r + LaneIndex() / 4, item_row = t.row_begin + row;
    if (row >= t.num_rows) continue;
    float* o = state + int64_t{item_row} * D + 2 * (LaneIndex() % 4);
    CA_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float* pair = &rows.o[r / 2][n][r % 2 * 2];
      *reinterpret_cast<F2*>(o + 8 * n) = {pair[0], pair[1]};
    }
    float* m = state + int64_t{t.item_rows} * D + item_row;
    if (LaneIndex() % 4 == 0) m[0] = rows.m[r], m[t.item_rows] = rows.l[r];
  }
}

// Writes out and lse of the warp's rows; out by way of the warp's rows of `queries`, so that each
// lane writes whole chunks.
template <typename T, int D>
CA_DEVICE void WriteRows(const AttnParams& p, const AttnTile& t, int first_row,
                         const WarpRows<T, D>& rows, char* queries) {
  using Shape = ExtendShape<D>;
  CA_UNROLL
  for (int r = 0; r < 2 * Shape::kRowTiles; ++r) {
    const int row = first_row + 8 * r + LaneIndex() / 4;
    const int head = t.Head(row);
    float lse;
    const float scale = FinishState(p, head, rows.m[r], rows.l[r], &lse);
    if (row < t.num_rows && LaneIndex() % 4 == 0) p.lse[t.Token(row) * p.num_q_heads + head] = lse;
    CA_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float* pair = &rows.o[r / 2][n][r % 2 * 2];
      StoreShared(queries + Shape::ChunkAt(row, n) + 4 * (LaneIndex() % 4),
                  PackPair<T>(pair[0] * scale, pair[1] * scale));
    }
  }
  SyncWarp();
  for (int i = LaneIndex(); i < 16 * Shape::kRowTiles * (D / 8); i += 32) {
    const int row = first_row + i / (D / 8), chunk = i % (D / 8);
    if (row >= t.num_rows) continue;
    T* out = static_cast<T*>(p.out) + t.Token(row) * p.out_token_stride + int64_t{t.Head(row)} * D +
             8 * chunk;
    *reinterpret_cast<U4*>(out) = LoadShared<U4>(queries + Shape::ChunkAt(row, chunk));
  }
}

// ---- the kernel ----

template <typename T, int D>
CA_KERNEL(kExtendThreads, ExtendShape<D>::kBlocks)
AttnExtend(CA_GRID_CONSTANT AttnLaunch launch) {
  using Shape = ExtendShape<D>;
  constexpr int kKeys = Shape::kKeys;
  const AttnParams& p = launch.p;
  const AttnTile t = MakeTile(launch, Shape::kRows);
  if (t.num_rows == 0) return;
  char* const queries = SharedMemory();
  char* const keys = queries + Shape::kKeysAt;                                       // [2] tiles
  char* const values = queries + Shape::kValuesAt;                                   // a tile
  int64_t* const offsets = reinterpret_cast<int64_t*>(queries + Shape::kOffsetsAt);  // [2][kKeys]
  const T* const k_data = static_cast<const T*>(p.kv.data);
  const TileShare<T, D> share(p.rope);
  constexpr int kWarpRows = 16 * Shape::kRowTiles;
  const int first_row = ThreadIndex() / 32 * kWarpRows;
  const int end_row = first_row + kWarpRows < t.num_rows ? first_row + kWarpRows : t.num_rows;
  Visibility seen(t, p.window, t.kv_begin);
  WarpRows<T, D> rows;

  if (ThreadIndex() < 2 * kKeys) {
    const int key = t.kv_begin + ThreadIndex();
    StoreShared<int64_t>(offsets + ThreadIndex(), key < t.kv_end ? KeyOffset(p, t, key) : 0);
  }
  SyncThreads();
  share.Load(k_data, offsets, t.kv_end - t.kv_begin, keys);
  CpAsyncCommit();
  LoadQueries<T, D>(p, t, queries);
  CpAsyncWait<0>();
  if (t.kv_begin < t.kv_end) share.RotateKeys(p.rope, t.kv_begin, keys);

  int odd = 0;  // of the tile
  for (int base = t.kv_begin; base < t.kv_end; base += kKeys, odd ^= 1) {
    SyncThreads();
    share.Load(k_data + p.kv.kv_stride, offsets + odd * kKeys, t.kv_end - base, values);
    CpAsyncCommit();
    char* const next_keys = keys + (odd ^ 1) * Shape::kTileBytes;
    const bool more = base + kKeys < t.kv_end;
    if (more) share.Load(k_data, offsets + (odd ^ 1) * kKeys, t.kv_end - base - kKeys, next_keys);
    CpAsyncCommit();
    const bool sees = first_row < end_row && seen.Some(first_row, end_row, kKeys);
    if (sees) {
      float s[Shape::kRowTiles][kKeys / 8][4];
      rows.Logits(queries + first_row * Shape::kRowBytes, keys + odd * Shape::kTileBytes, s);
      if (p.softcap > 0.f) CapLogits(p.softcap, s);
      if (!seen.All(first_row, end_row, kKeys)) MaskLogits(seen, first_row, s);
      rows.Softmax(s);
    }
    CpAsyncWait<1>();
    SyncThreads();
    // Where the rows of the tile after the next lie; the last to read its place was this V's load.
    const int key = base + 2 * kKeys + ThreadIndex();
    const bool looks = ThreadIndex() < kKeys;
    const int64_t offset = looks && key < t.kv_end ? KeyOffset(p, t, key) : 0;
    if (sees) rows.AddValues(values);
    if (looks) StoreShared<int64_t>(offsets + odd * kKeys + ThreadIndex(), offset);
    CpAsyncWait<0>();
    if (more) share.RotateKeys(p.rope, base + kKeys, next_keys);
    seen.Advance(kKeys);
  }

  CA_UNROLL
  for (int r = 0; r < 2 * Shape::kRowTiles; ++r) {
    rows.l[r] += ShuffleXor(rows.l[r], 1);
    rows.l[r] += ShuffleXor(rows.l[r], 2);
  }
  SyncThreads();                                         // the place of q takes the output
  const AttnTile done = MakeTile(launch, Shape::kRows);  // again: cheaper than registers
  if (done.num_splits == 1) return WriteRows(p, done, first_row, rows, queries);
  SaveState(launch, done, first_row, rows);
  if (IsLastSplit(launch, done, reinterpret_cast<int*>(offsets))) {
    MergeSplits<T>(launch, done, kExtendWarps);
  }
}

template <typename T, int D>
const char* LaunchExtendShape(const AttnLaunch& launch, int num_items, void* stream) {
  const Index3 grid = {num_items, launch.p.kv.num_kv_heads * launch.row_blocks, 1};
  return Launch(AttnExtend<T, D>, grid, kExtendThreads, ExtendShape<D>::kSharedBytes, stream,
                launch);
}

// For elements T, by head_dim.
template <typename T>
const char* LaunchExtendOf(const AttnLaunch& launch, int num_items, void* stream) {
  switch (launch.p.kv.head_dim) {
    case 64:
      return LaunchExtendShape<T, 64>(launch, num_items, stream);
    case 80:
      return LaunchExtendShape<T, 80>(launch, num_items, stream);
    case 96:
      return LaunchExtendShape<T, 96>(launch, num_items, stream);
    case 128:
      return LaunchExtendShape<T, 128>(launch, num_items, stream);
    case 256:
      return LaunchExtendShape<T, 256>(launch, num_items, stream);
    default:
      return "the extend kernel has no such head_dim";
  }
}

}  // namespace cachedattn::cuda
