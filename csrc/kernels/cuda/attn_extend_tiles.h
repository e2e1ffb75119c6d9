// The extend kernel's sizes, and how q, K and V come to lie in its shared memory: q gathered and
// rotated once, tiles of K and V copied as they are, K then rotated in place.
#pragma once

#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/attn_tile.h"

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
  // each may have (164 KB of sm_80) / 2 - 1 KB = 81 KB, which D = 128 uses to the last byte, or
  // (228 KB of sm_90) / 2 - 1 KB = 113 KB.
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
  // Blocks on a multiprocessor: 65,536 registers / 256 threads = 255 a thread.
  static constexpr int kBlocks = 2;
  // Chunk c of row r lies at chunk c ^ Turn(r), so that the same chunk of 8 rows in turn covers all
  // banks: rows are D / 8 chunks, of which 8 fill the banks once. An XOR below kCycle = gcd(D / 8,
  // 8) stays inside the row.
  static constexpr int kCycle = D == 80 ? 2 : D == 96 ? 4 : 8;
  CA_DEVICE static uint32_t Turn(uint32_t row) { return row / (8 / kCycle) % kCycle; }
  CA_DEVICE static uint32_t ChunkAt(uint32_t row, uint32_t chunk) {  // bytes
    return row * kRowBytes + 16 * (chunk ^ Turn(row));
  }
};

// ---- rotation ----

// 8 pairs of a row and the two chunks that hold them. In half-split order the first dims of the
// pairs fill chunk a and the second ones b; else a and b are adjacent. Together the units of a row
// cover all of its chunks, those that are not rotated too.
struct RotaryUnit {
  uint32_t pair, a, b;
  CA_DEVICE RotaryUnit(const RopeTables& rope, uint32_t unit) : pair(kUnitPairs * unit) {
    const uint32_t pairs = static_cast<uint32_t>(Here(rope.rotary_dim)) / 2;
    const bool split = !rope.interleaved && pair < pairs;
    a = split ? unit : 2 * unit;
    b = split ? unit + pairs / kUnitPairs : 2 * unit + 1;
  }
};

// Angles of a unit from a row of a table; pairs past the last stay as they are.
CA_DEVICE void LoadAngles(const RopeTables& rope, const float* table, int row, uint32_t first_pair,
                          F2 (&angle)[kUnitPairs]) {
  const uint32_t pairs = static_cast<uint32_t>(rope.rotary_dim) / 2;
  const F2* at = reinterpret_cast<const F2*>(table) + int64_t{row} * pairs + first_pair;
  if (pairs % kUnitPairs == 0) {  // every unit that is rotated is so as a whole
    const F4* two = reinterpret_cast<const F4*>(at);
    CA_UNROLL
    for (int i = 0; i < kUnitPairs; i += 2) {
      const F4 x = two[i / 2];
      angle[i] = {x.x, x.y}, angle[i + 1] = {x.z, x.w};
    }
    return;
  }
  CA_UNROLL
  for (int i = 0; i < kUnitPairs; ++i) {
    angle[i] = first_pair + i < pairs ? at[i] : F2{1.f, 0.f};
  }
}
// angle = angle + other
CA_DEVICE void AddAngles(const F2 (&other)[kUnitPairs], F2 (&angle)[kUnitPairs]) {
  CA_UNROLL
  for (int i = 0; i < kUnitPairs; ++i) angle[i] = Rotate(angle[i], other[i]);
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
CA_DEVICE void GatherQueries(const AttnParams& p, const AttnTile& t, char* queries) {
  using Shape = ExtendShape<D>;
  const float scale = QueryScale(p);
  for (int i = ThreadIndex(); i < Shape::kRows * Shape::kUnits; i += kExtendThreads) {
    const int row = i / Shape::kUnits;
    const RotaryUnit unit(p.rope, i % Shape::kUnits);
    U4 a = {0, 0, 0, 0}, b = {0, 0, 0, 0};
    if (row < t.num_rows) {
      const T* q = static_cast<const T*>(p.q) + QueryOffset(p, t, row);
      a = *reinterpret_cast<const U4*>(q + 8 * unit.a);
      b = *reinterpret_cast<const U4*>(q + 8 * unit.b);
      F2 angle[kUnitPairs], hi[kUnitPairs];
      CA_UNROLL
      for (int j = 0; j < kUnitPairs; ++j) angle[j] = {scale, 0.f};
      if (unit.pair < static_cast<uint32_t>(p.rope.rotary_dim) / 2) {
        const int before = t.Position(row), position = before > 0 ? before : 0;
        LoadAngles(p.rope, p.rope.lo, position % RopeTables::kLoRows, unit.pair, hi);
        AddAngles(hi, angle);
        LoadAngles(p.rope, p.rope.hi, position / RopeTables::kLoRows, unit.pair, hi);
        AddAngles(hi, angle);
      }
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
  uint32_t key;
  uint32_t at_a, at_b;  // the two chunks of `key` in a tile, bytes
  bool loads, rotates;

  CA_DEVICE TileShare(const RopeTables& rope, uint32_t thread)
      : unit(rope, thread % Shape::kUnits), key(thread / Shape::kUnits) {
    // 8 threads have their turn at shared memory together. At D = 64 they hold 4 chunks of two
    // keys each; of keys j and j ^ 5 no two lie in the same banks, whatever the pairing.
    if (D == 64) key ^= key % 2 * 4;
    at_a = Shape::ChunkAt(key, unit.a);
    at_b = Shape::ChunkAt(key, unit.b);
    loads = Shape::kPassKeys * Shape::kUnits == kExtendThreads || key < Shape::kPassKeys;
    rotates = loads && unit.pair < static_cast<uint32_t>(rope.rotary_dim) / 2;
  }

  // Starts copying a tile of K or V, row j of it from data + offsets[j] bytes. Rows from `num_keys`
  // on become zero: what lies in unused slots may be NaN.
  CA_DEVICE void Load(const char* data, const int64_t* offsets, int num_keys, char* tile) const {
    if (!loads) return;
    const char *a = data + 16 * unit.a, *b = data + 16 * unit.b;
    CA_UNROLL
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      const int64_t offset = LoadShared<int64_t>(offsets + key + pass * Shape::kPassKeys);
      const bool valid = static_cast<int>(key) < num_keys - pass * Shape::kPassKeys;
      char* to = tile + pass * Shape::kPassKeys * Shape::kRowBytes;
      CpAsync16(to + at_a, a + offset, valid);
      CpAsync16(to + at_b, b + offset, valid);
    }
  }

  // Angles of the thread's first key in the tile at position `base`, less those of the last
  // multiple of kLoRows.
  CA_DEVICE void LowAngles(const RopeTables& rope, int base, F2 (&angle)[kUnitPairs]) const {
    if (rotates) LoadAngles(rope, rope.lo, base % RopeTables::kLoRows + key, unit.pair, angle);
  }
  // Rotates K of the tile at `base` in place, from LowAngles on: the first key by angles of the
  // tables, each further key by a step of kPassKeys positions more.
  CA_DEVICE void RotateKeys(const RopeTables& rope, int base, F2 (&angle)[kUnitPairs],
                            char* tile) const {
    if (!rotates) return;
    F2 step[kUnitPairs];
    LoadAngles(rope, rope.hi, base / RopeTables::kLoRows, unit.pair, step);
    AddAngles(step, angle);
    LoadAngles(rope, rope.lo, Shape::kPassKeys, unit.pair, step);
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

// Where the rows of two tiles lie, in bytes from the start of K's data: a thread looks up one
// key.
template <int kKeys>
struct RowOffsets {
  const AttnParams& p;
  const uint32_t seq, kv_head;
  const int kv_end;
  int64_t* const offsets;  // [2][kKeys]

  CA_DEVICE RowOffsets(const AttnParams& params, const AttnTile& t, int64_t* place)
      : p(params),
        seq(static_cast<uint32_t>(t.seq)),
        kv_head(static_cast<uint32_t>(t.kv_head)),
        kv_end(t.kv_end),
        offsets(place) {}
  CA_DEVICE const int64_t* Of(int odd) const { return offsets + odd * kKeys; }
  // The slot that holds this thread's key of the tile at `base`.
  CA_DEVICE int Slot(int base) const {
    const int key = base + ThreadIndex();
    if (ThreadIndex() >= kKeys || key >= kv_end) return 0;
    return p.block_table[seq * p.max_blocks + key / p.kv.block_size];
  }
  CA_DEVICE void Store(int base, int odd, int slot) const {
    if (ThreadIndex() >= kKeys) return;
    const int in_block = (base + ThreadIndex()) % p.kv.block_size;
    const int64_t offset =
        slot * p.kv.slot_stride + kv_head * p.kv.head_stride + in_block * p.kv.token_stride;
    StoreShared<int64_t>(offsets + odd * kKeys + ThreadIndex(), 2 * offset);
  }
};

}  // namespace cachedattn::cuda
