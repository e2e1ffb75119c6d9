// Extend and prefill on tensor cores by mma.sync (sm_80 and up): the FlashAttention-2 schedule over
// K that is rotated in shared memory, once a tile, for all of the block's rows.
//
// A block of 4 warps takes 128 rows of q (64 of head_dim 256), which stay in shared memory, rotated
// and scaled. A warp owns 32 of them (16), so that two products share each fragment of K and V:
// with 16 rows a warp, fragments alone would use all of shared memory's 128 bytes a cycle. Two
// blocks share a multiprocessor: the products of one run under the rotation and the softmax of the
// other.
//
// Tile t of the keys goes through (every barrier is of the whole block)
//   barrier                   K of t is rotated; the buffers of V and of the other K are free
//   start loads               V of t, K of t + 1
//   S = Q K^T, softmax        P in registers
//   barrier                   V of t has landed
//   O += P V
//   rotate K of t + 1         each thread the chunks that it loaded itself, so no barrier before
#pragma once

#include "csrc/kernels/cuda/attn_extend_tiles.h"
#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/attn_tile.h"
#include "csrc/kernels/cuda/launch.h"

namespace cachedattn::cuda {

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

// What a lane gives LoadMatrix4: rows of a tile at `row` and further, in row r of which chunk 2 i
// or 2 i + 1, by `half`. `row_bytes` is kRowBytes, read from the launch: of sums whose bits it
// knows the compiler makes an OR for every load, of others offsets inside the loads.
template <int D>
struct FragmentRows {
  using Shape = ExtendShape<D>;
  const char* chunks[Shape::kCycle / 2];  // 2 i + half for i below kCycle / 2

  CA_DEVICE FragmentRows(const char* tile, uint32_t row, uint32_t half, uint32_t row_bytes) {
    CA_UNROLL
    for (int i = 0; i < Shape::kCycle / 2; ++i) {
      chunks[i] = tile + row * row_bytes + 16 * (2 * i ^ half ^ Shape::Turn(row));
    }
  }
  CA_DEVICE const char* At(int r, int i) const {
    constexpr int kPairs = Shape::kCycle / 2;
    return chunks[i % kPairs] + r * Shape::kRowBytes + 16 * (2 * (i / kPairs * kPairs));
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
  CA_DEVICE static void Logits(const char* queries, const char* keys, int row_bytes,
                               float (&s)[kRowTiles][2 * kKeySteps][4]) {
    const uint32_t lane = LaneIndex();
    const FragmentRows<D> q(queries, lane % 16, lane / 16, row_bytes);
    const FragmentRows<D> k(keys, lane % 8 + lane / 16 * 8, lane / 8 % 2, row_bytes);
    CA_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[kRowTiles][4];
      CA_UNROLL
      for (int i = 0; i < kRowTiles; ++i) LoadMatrix4(q.At(16 * i, step), a[i]);
      CA_UNROLL
      for (int n = 0; n < kKeySteps; ++n) {
        uint32_t b[4];
        LoadMatrix4(k.At(16 * n, step), b);
        CA_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          Mma16816<T>(s[i][2 * n], a[i], {b[0], b[1]});
          Mma16816<T>(s[i][2 * n + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  // o += P V
  CA_DEVICE void AddValues(const char* values, int row_bytes) {
    const FragmentRows<D> v(values, LaneIndex() % 16, LaneIndex() / 16, row_bytes);
    CA_UNROLL
    for (int step = 0; step < kKeySteps; ++step) {
      CA_UNROLL
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4Transposed(v.At(16 * step, n), b);
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
CA_DEVICE void CapLogits(float cap, float (&s)[kRowTiles][kKeys][4]) {
  const float softcap = Here(cap);
  CA_UNROLL
  for (int i = 0; i < kRowTiles; ++i) {
    CA_UNROLL
    for (int n = 0; n < kKeys; ++n) {
      CA_UNROLL
      for (int e = 0; e < 4; ++e) s[i][n][e] = SoftCap(s[i][n][e], softcap);
    }
  }
}

// Makes the logits of keys that a row does not see -inf.
template <int kRowTiles, int kKeys>
CA_DEVICE void MaskLogits(const Visibility& seen, int first_row, float (&s)[kRowTiles][kKeys][4]) {
  const int lane = LaneIndex();
  const int group = Here(seen.group);
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
CA_DEVICE void WriteOutput(const AttnParams& p, const AttnTile& t, int first_row,
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

// Hands over the warp's rows: to out, or to the merge of the splits. `memory` is the block's shared
// memory, q's place first.
template <typename T, int D>
CA_DEVICE void FinishRows(const AttnLaunch& launch, WarpRows<T, D>* rows, char* memory) {
  using Shape = ExtendShape<D>;
  CA_UNROLL
  for (int r = 0; r < 2 * Shape::kRowTiles; ++r) {
    rows->l[r] += ShuffleXor(rows->l[r], 1);
    rows->l[r] += ShuffleXor(rows->l[r], 2);
  }
  const AttnTile t = MakeTile(launch, Shape::kRows);  // anew: it was not kept in registers
  const int first_row = ThreadIndex() / 32 * 16 * Shape::kRowTiles;
  if (t.num_splits == 1) return WriteOutput(launch.p, t, first_row, *rows, memory);
  SaveState(launch, t, first_row, *rows);
  if (IsLastSplit(launch, t, reinterpret_cast<int*>(memory))) {
    MergeSplits<T>(launch, t, kExtendWarps);
  }
}

// ---- the kernel ----

template <typename T, int D>
CA_KERNEL(kExtendThreads, ExtendShape<D>::kBlocks)
AttnExtend(CA_GRID_CONSTANT AttnLaunch launch) {
  using Shape = ExtendShape<D>;
  constexpr int kKeys = Shape::kKeys, kWarpRows = 16 * Shape::kRowTiles;
  const AttnParams& p = launch.p;
  const AttnTile t = MakeTile(launch, Shape::kRows);
  if (t.num_rows == 0) return;
  char* const queries = SharedMemory();
  char* const keys = queries + Shape::kKeysAt;      // two tiles
  char* const values = queries + Shape::kValuesAt;  // one
  RowOffsets<kKeys> offsets(p, t, reinterpret_cast<int64_t*>(queries + Shape::kOffsetsAt));
  const char* const k_data = static_cast<const char*>(p.kv.data);
  const char* const v_data = Here(k_data + p.kv.kv_stride * sizeof(T));
  const int row_bytes = p.kv.head_dim * sizeof(T);
  Visibility seen(t, p.window, t.kv_begin);
  WarpRows<T, D> rows;
  F2 angle[kUnitPairs];

  offsets.Store(t.kv_begin, 0, offsets.Slot(t.kv_begin));
  offsets.Store(t.kv_begin + kKeys, 1, offsets.Slot(t.kv_begin + kKeys));
  SyncThreads();
  const TileShare<T, D> share(p.rope, ThreadIndex());
  share.Load(k_data, offsets.Of(0), t.kv_end - t.kv_begin, keys);
  CpAsyncCommit();
  GatherQueries<T, D>(p, t, queries);
  CpAsyncWait<0>();
  if (t.kv_begin < t.kv_end) {
    share.LowAngles(p.rope, t.kv_begin, angle);
    share.RotateKeys(p.rope, t.kv_begin, angle, keys);
  }

  int odd = 0;  // of the tile
  for (int base = t.kv_begin; base < t.kv_end; base += kKeys, odd ^= 1) {
    SyncThreads();
    const uint32_t thread = Here(ThreadIndex());
    const TileShare<T, D> share(p.rope, thread);
    share.Load(v_data, offsets.Of(odd), t.kv_end - base, values);
    CpAsyncCommit();
    char* const next_keys = keys + (odd ^ 1) * Shape::kTileBytes;
    const int next = base + kKeys;
    if (next < t.kv_end) share.Load(k_data, offsets.Of(odd ^ 1), t.kv_end - next, next_keys);
    CpAsyncCommit();
    const int first_row = thread / 32 * kWarpRows;
    const int end_row = first_row + kWarpRows < t.num_rows ? first_row + kWarpRows : t.num_rows;
    const bool sees = first_row < end_row && seen.Some(first_row, end_row, kKeys);
    if (sees) {
      float s[Shape::kRowTiles][kKeys / 8][4] = {};
      rows.Logits(queries + first_row * Shape::kRowBytes, keys + odd * Shape::kTileBytes, row_bytes,
                  s);
      if (p.softcap > 0.f) CapLogits(p.softcap, s);
      if (!seen.All(first_row, end_row, kKeys)) MaskLogits(seen, first_row, s);
      rows.Softmax(s);
    }
    CpAsyncWait<1>();
    SyncThreads();
    // Slot and angles are on their way during the products. Nobody needs this tile's offsets now.
    const int slot = offsets.Slot(next + kKeys);
    const TileShare<T, D> again(p.rope, Here(ThreadIndex()));  // the same, not kept in registers
    if (next < t.kv_end) again.LowAngles(p.rope, next, angle);
    if (sees) rows.AddValues(values, row_bytes);
    offsets.Store(next + kKeys, odd, slot);
    CpAsyncWait<0>();
    if (next < t.kv_end) again.RotateKeys(p.rope, next, angle, next_keys);
    seen.Advance(kKeys);
  }

  SyncThreads();  // the places of q and of the offsets are free for others
  FinishRows<T, D>(launch, &rows, queries);
}

// For elements T, by head_dim.
template <typename T>
const char* LaunchExtendOf(const AttnLaunch& launch, int num_items, void* stream) {
  return WithTensorCoreDim(launch.p.kv.head_dim, [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    const Index3 grid = {num_items, launch.p.kv.num_kv_heads * launch.row_blocks, 1};
    return Launch(AttnExtend<T, D>, grid, kExtendThreads, ExtendShape<D>::kSharedBytes, stream,
                  launch);
  });
}

}  // namespace cachedattn::cuda
