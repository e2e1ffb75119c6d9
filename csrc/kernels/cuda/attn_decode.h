// Decode: a few rows against many keys, bound by how fast K and V arrive.
//
// A block has 8 rows; each of its 4 warps owns 16 keys of every tile of 64 and works alone until
// the end: it copies its own keys, waits for them, and keeps its own state (o, m, l). Products are
// transposed, so that the 8 rows fill the narrow side of the tensor cores' 16 x 8 tiles:
//   S^T [16 keys, 8 rows] = K [16, D] q^T [D, 8]        o^T [D, 8] += V^T [D, 16] P^T [16, 8]
// K is rotated in registers as it comes from shared memory, by the angles of keys 0 to 15, the same
// in every tile: q carries the rest, being rotated to its distance from the warp's first key, and
// advanced by -64 from tile to tile.
#pragma once

#include "csrc/kernels/cuda/attn_kernels.h"

namespace cachedattn::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kWarpKeys = kKeyTile / kDecodeWarps;

// Shared memory: each warp's ring of K and V; the angles; q's step from tile to tile.
template <int kDim>
struct DecodeShared {
  // Depth steps of a product. Step s takes dims 8 s .. 8 s + 7 and those D / 2 further, so that
  // both dims of a pair, whether D / 2 apart or adjacent, meet in one thread.
  static constexpr int kSteps = kDim / 16;
  // 16 bytes of padding make a row an odd number of 16-byte chunks: ldmatrix meets all banks.
  static constexpr int kRowBytes = 2 * kDim + 16;
  static constexpr int kPartBytes = kWarpKeys * kRowBytes;  // K or V of a warp's keys
  static constexpr int kStageBytes = 2 * kPartBytes;
  // The lanes of a warp copy a rectangle of 16-byte chunks at a time: as wide as the row allows.
  static constexpr int kCopyChunks = (kDim / 8) & -(kDim / 8), kCopyRows = 32 / kCopyChunks;
  static constexpr int kAngleBytes = kSteps * 2 * 32 * sizeof(F4);  // [step][key / 8][lane]
  static constexpr int kAdvanceBytes = kSteps * 4 * sizeof(F4);     // [step][lane % 4]
  // Two blocks on a multiprocessor of sm_80, 164 KB with 1 KB for each block; one at head_dim 256.
  // Stages beyond 4 would only add to the start of a short split.
  static constexpr int kBudget = (kDim > 128 ? 163 : 81) << 10;
  static constexpr int kFit =
      (kBudget - kAngleBytes - kAdvanceBytes) / (kDecodeWarps * kStageBytes);
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  static_assert(kStages >= 2);
  static constexpr int kAngles = kDecodeWarps * kStages * kStageBytes;  // offsets
  static constexpr int kAdvance = kAngles + kAngleBytes;
  static constexpr int kBytes = kAdvance + kAdvanceBytes;
  // At the end the rings hold the warps' states: o [warp][row][kStateRow], then (m, l) [warp][row].
  // 4 floats of padding: the lanes of a warp, 8 dims of 4 rows, meet all banks.
  static constexpr int kStateRow = kDim + 4;
  static constexpr int kRowStates = kDecodeWarps * kDecodeRows * kStateRow * sizeof(float);
  static_assert(kRowStates + kDecodeWarps * kDecodeRows * sizeof(F2) <= kAngles);
};

// ---- angles ----

// Pair `i` (0, 1) of a thread in step `step`; t = lane % 4.
template <int kDim>
CA_DEVICE int DecodePair(bool interleaved, int step, int t, int i) {
  return interleaved ? 4 * step + t + i * (kDim / 4) : 8 * step + 2 * t + i;
}

CA_DEVICE F2 DecodeAngle(const RopeTables& rope, int pair, int position) {
  return rope.rotary_dim == 0 ? F2{1.f, 0.f} : PairAngle(rope, pair, position);
}

// All threads of the block: the angles of keys 0 to 15, in the order that the lanes read them, and
// those of 64 tokens back.
template <int kDim>
CA_DEVICE void FillAngles(const RopeTables& rope, char* shared) {
  using Shared = DecodeShared<kDim>;
  for (int i = ThreadIndex(); i < Shared::kSteps * 64; i += 32 * kDecodeWarps) {
    const int step = i / 64, lane = i % 32, key = lane / 4 + i / 32 % 2 * 8;
    const F2 a = DecodeAngle(rope, DecodePair<kDim>(rope.interleaved, step, lane % 4, 0), key);
    const F2 b = DecodeAngle(rope, DecodePair<kDim>(rope.interleaved, step, lane % 4, 1), key);
    StoreShared<F4>(shared + Shared::kAngles + i * sizeof(F4), {a.x, a.y, b.x, b.y});
  }
  for (int i = ThreadIndex(); i < Shared::kSteps * 4; i += 32 * kDecodeWarps) {
    const F2 a = DecodeAngle(rope, DecodePair<kDim>(rope.interleaved, i / 4, i % 4, 0), kKeyTile);
    const F2 b = DecodeAngle(rope, DecodePair<kDim>(rope.interleaved, i / 4, i % 4, 1), kKeyTile);
    StoreShared<F4>(shared + Shared::kAdvance + i * sizeof(F4), {a.x, -a.y, b.x, -b.y});
  }
}

// Two pairs (first dim, second dim) of one row, in one thread.
struct TwoPairs {
  F2 a, b;
};

// From the words of dims 8 s + 2 t, .. + 1 and of those D / 2 further.
template <typename T, bool kInterleaved>
CA_DEVICE TwoPairs UnpackPairs(uint32_t low, uint32_t high) {
  const F2 x = UnpackPair<T>(low), y = UnpackPair<T>(high);
  if (kInterleaved) return {x, y};
  return {{x.x, y.x}, {x.y, y.y}};
}
CA_DEVICE TwoPairs Rotate(TwoPairs x, F4 angles) {
  return {Rotate(x.a, {angles.x, angles.y}), Rotate(x.b, {angles.z, angles.w})};
}
// Operand words: the first dims of both pairs, the second dims. Where pairs are adjacent this is
// not the order in the row, but the same for q and K, and a product's depth has no order.
template <typename T>
CA_DEVICE void PackPairs(TwoPairs x, uint32_t* low, uint32_t* high) {
  *low = PackPair<T>(x.a.x, x.b.x);
  *high = PackPair<T>(x.a.y, x.b.y);
}

// ---- one warp ----

// With g = lane / 4 and t = lane % 4, a thread holds of q row g, of S^T keys g and g + 8 and of o^T
// dims 16 c + g and + 8, for rows 2 t and 2 t + 1.
template <typename T, int kDim>
struct DecodeWarp {
  using Shared = DecodeShared<kDim>;
  static constexpr int kSteps = Shared::kSteps;

  const AttnLaunch& launch;
  const AttnTile& tile;
  char* shared;
  char* ring;       // this warp's [stage][K, V][key][kRowBytes]
  int first_key;    // of the warp in the first tile
  int block_shift;  // log2 of the block size
  TwoPairs q[kSteps];
  float o[kSteps][4] = {};
  float m[2] = {-Infinity(), -Infinity()}, l[2] = {};  // of rows 2 t, 2 t + 1; l of own keys only
  Index3 limits[2];

  CA_DEVICE DecodeWarp(const AttnLaunch& attn_launch, const AttnTile& attn_tile)
      : launch(attn_launch), tile(attn_tile), shared(SharedMemory()) {
    const int warp = ThreadIndex() / 32;
    ring = shared + warp * Shared::kStages * Shared::kStageBytes;
    first_key = tile.kv_begin + warp * kWarpKeys;
    block_shift = 4;
    while (1 << block_shift < launch.p.kv.block_size) ++block_shift;
    CA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = LaneIndex() % 4 * 2 + i;
      limits[i] = row < tile.num_rows ? KeyLimits(launch, tile, row) : Index3{0, 0, 0};
    }
  }

  // First of the warp's keys in tile `index`.
  CA_DEVICE int FirstKey(int index) const { return first_key + index * kKeyTile; }

  // Slot of these keys: 16 tokens from a multiple of 16 lie in one block.
  CA_DEVICE int Slot(int index) const {
    if (FirstKey(index) >= tile.kv_end) return 0;
    return launch.p.block_table[tile.seq * launch.p.max_blocks + (FirstKey(index) >> block_shift)];
  }
  // And their K.
  CA_DEVICE const T* Keys(int index, int slot) const {
    const KvView& kv = launch.p.kv;
    return static_cast<const T*>(kv.data) + slot * kv.slot_stride + tile.kv_head * kv.head_stride +
           (FirstKey(index) & (kv.block_size - 1)) * kv.token_stride;
  }

  // Starts the copy of K (part 0) or V (1) of tile `index`, and closes a group of copies even where
  // there is no such tile. Keys past the end arrive as zeros. A lane keeps to its column of chunks,
  // so that all its addresses lie at fixed distances.
  CA_DEVICE void Copy(int part, int index, const T* rows) {
    if (tile.kv_begin + index * kKeyTile < tile.kv_end) {
      const int64_t stride = launch.p.kv.token_stride;
      const int lane_row = LaneIndex() / Shared::kCopyChunks;
      const int column = LaneIndex() % Shared::kCopyChunks * 16;
      const char* from = reinterpret_cast<const char*>(rows + lane_row * stride) + column;
      char* to = ring + index % Shared::kStages * Shared::kStageBytes + part * Shared::kPartBytes +
                 lane_row * Shared::kRowBytes + column;
      const int count = tile.kv_end - FirstKey(index) - lane_row;
      CA_UNROLL
      for (int row = 0; row < kWarpKeys; row += Shared::kCopyRows) {
        CA_UNROLL
        for (int i = 0; i < 2 * kDim; i += 16 * Shared::kCopyChunks) {
          CpAsync16(to + row * Shared::kRowBytes + i, from + i, row < count);
        }
        from += Shared::kCopyRows * stride * sizeof(T);
      }
    }
    CpAsyncCommit();
  }

  // Loads row g of q, rotated to its distance from the warp's first key. A row that lies before
  // that key attends to none of the warp's, so any angle will do.
  CA_DEVICE void LoadQuery() {
    const AttnParams& p = launch.p;
    const int row = LaneIndex() / 4, t = LaneIndex() % 4;
    if (row >= tile.num_rows) {
      CA_UNROLL
      for (int s = 0; s < kSteps; ++s) q[s] = {};
      return;
    }
    const T* x = static_cast<const T*>(p.q) + QueryOffset(p, tile, row) + 2 * t;
    const int distance = tile.Position(row) - first_key;
    const float scale = QueryScale(p);
    CA_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int position = distance > 0 ? distance : 0;
      const F2 a = DecodeAngle(p.rope, DecodePair<kDim>(p.rope.interleaved, s, t, 0), position);
      const F2 b = DecodeAngle(p.rope, DecodePair<kDim>(p.rope.interleaved, s, t, 1), position);
      const uint32_t low = *reinterpret_cast<const uint32_t*>(x + 8 * s);
      const uint32_t high = *reinterpret_cast<const uint32_t*>(x + 8 * s + kDim / 2);
      q[s] = Rotate(
          p.rope.interleaved ? UnpackPairs<T, true>(low, high) : UnpackPairs<T, false>(low, high),
          {scale * a.x, scale * a.y, scale * b.x, scale * b.y});
    }
  }

  // S^T of the stage's K, rotated on the way; q is left advanced to the next tile.
  template <bool kInterleaved>
  CA_DEVICE void Logits(const char* k, float (&s)[4]) {
    const int lane = LaneIndex();
    const char* row = k + lane % 16 * Shared::kRowBytes + lane / 16 * kDim;
    const char* angles = shared + Shared::kAngles + lane * sizeof(F4);
    const char* advance = shared + Shared::kAdvance + lane % 4 * sizeof(F4);
    float sums[2][4] = {};  // two chains of products, half as long each
    CA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4], b[2];
      LoadMatrix4(row + step * 16, a);
      CA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const F4 angle = LoadShared<F4>(angles + (2 * step + i) * 32 * sizeof(F4));
        PackPairs<T>(Rotate(UnpackPairs<T, kInterleaved>(a[i], a[i + 2]), angle), &a[i], &a[i + 2]);
      }
      PackPairs<T>(q[step], &b[0], &b[1]);
      Mma16816<T>(sums[step % 2], a, b);
      q[step] = Rotate(q[step], LoadShared<F4>(advance + step * 4 * sizeof(F4)));
    }
    CA_UNROLL
    for (int i = 0; i < 4; ++i) s[i] = sums[0][i] + sums[1][i];
  }

  // Logits to weights, and what the sums so far are to be multiplied with.
  CA_DEVICE void Softmax(int index, float (&s)[4], float (&keep)[2]) {
    const int key = first_key + index * kKeyTile + LaneIndex() / 4;
    const float softcap = launch.p.softcap;
    CA_UNROLL
    for (int r = 0; r < 2; ++r) {
      CA_UNROLL
      for (int i = r; i < 4; i += 2) {
        if (softcap > 0.f) s[i] = SoftCap(s[i], softcap);
        const int k = key + i / 2 * 8;
        if (k < limits[r].x || k >= limits[r].y) s[i] = -Infinity();
      }
      float peak = Max(s[r], s[r + 2]);
      CA_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) peak = Max(peak, ShuffleXor(peak, lanes));
      peak = Max(peak, m[r]);
      const float shift = peak == -Infinity() ? 0.f : peak;  // no key so far: all weights are 0
      keep[r] = Exp2(m[r] - shift);
      m[r] = peak;
      s[r] = Exp2(s[r] - shift);
      s[r + 2] = Exp2(s[r + 2] - shift);
      l[r] = l[r] * keep[r] + (s[r] + s[r + 2]);
    }
  }

  // o^T = o^T keep + V^T P^T.
  CA_DEVICE void AddValues(const char* v, const float (&weights)[4], const float (&keep)[2]) {
    const int lane = LaneIndex();
    const char* row = v + (lane % 8 + lane / 16 * 8) * Shared::kRowBytes + lane / 8 % 2 * 16;
    const uint32_t b[2] = {TransposeMatrix(PackPair<T>(weights[0], weights[1])),
                           TransposeMatrix(PackPair<T>(weights[2], weights[3]))};
    CA_UNROLL
    for (int c = 0; c < kSteps; ++c) {
      uint32_t a[4];
      LoadMatrix4Transposed(row + c * 32, a);
      CA_UNROLL
      for (int i = 0; i < 4; ++i) o[c][i] *= keep[i % 2];
      Mma16816<T>(o[c], a, b);
    }
  }

  // All tiles. Copies of K and V are groups of their own: a part is refilled as soon as it is used.
  CA_DEVICE void Run() {
    constexpr int kStages = Shared::kStages, kPending = 2 * kStages - 1;
    const bool interleaved = launch.p.rope.interleaved;
    int slots[kStages];
    CA_UNROLL
    for (int i = 0; i < kStages; ++i) slots[i] = Slot(i);
    CA_UNROLL
    for (int i = 0; i < kStages; ++i) {
      const T* keys = Keys(i, slots[i]);
      Copy(0, i, keys);
      Copy(1, i, keys + launch.p.kv.kv_stride);
    }
    int slot = Slot(kStages);  // read a tile ahead of its use
    FillAngles<kDim>(launch.p.rope, shared);
    LoadQuery();
    SyncThreads();
    for (int i = 0; tile.kv_begin + i * kKeyTile < tile.kv_end; ++i) {
      const char* stage = ring + i % kStages * Shared::kStageBytes;
      float s[4], keep[2];
      CpAsyncWait<kPending>();
      SyncWarp();
      if (interleaved) {
        Logits<true>(stage, s);
      } else {
        Logits<false>(stage, s);
      }
      SyncWarp();
      const T* next = Keys(i + kStages, slot);
      slot = Slot(i + kStages + 1);
      Copy(0, i + kStages, next);
      Softmax(i, s, keep);
      CpAsyncWait<kPending>();
      SyncWarp();
      AddValues(stage + Shared::kPartBytes, s, keep);
      SyncWarp();
      Copy(1, i + kStages, next + launch.p.kv.kv_stride);
    }
  }

  // Leaves the warp's state in shared memory. All warps are done with their rings.
  CA_DEVICE void StoreState() {
    const int warp = ThreadIndex() / 32, g = LaneIndex() / 4;
    CA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = warp * kDecodeRows + LaneIndex() % 4 * 2 + r;
      CA_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) l[r] += ShuffleXor(l[r], lanes);
      if (g == 0) StoreShared<F2>(shared + Shared::kRowStates + row * sizeof(F2), {m[r], l[r]});
      char* sums = shared + (row * Shared::kStateRow + g) * sizeof(float);
      CA_UNROLL
      for (int c = 0; c < kSteps; ++c) {
        StoreShared<float>(sums + 16 * c * sizeof(float), o[c][r]);
        StoreShared<float>(sums + (16 * c + 8) * sizeof(float), o[c][r + 2]);
      }
    }
  }
};

// ---- the block ----

// Merges the four warps' states of row `row`, in warp order, and writes the output or the split's
// state. One warp; a lane takes two dims at a time.
template <typename T, int kDim>
CA_DEVICE void FinishRow(const AttnLaunch& launch, const AttnTile& tile, int row) {
  using Shared = DecodeShared<kDim>;
  const AttnParams& p = launch.p;
  const char* shared = SharedMemory();
  F2 state[kDecodeWarps];  // (m, l), then the weight in place of m
  float peak = -Infinity(), total = 0.f;
  CA_UNROLL
  for (int w = 0; w < kDecodeWarps; ++w) {
    state[w] = LoadShared<F2>(shared + Shared::kRowStates + (w * kDecodeRows + row) * sizeof(F2));
    peak = Max(peak, state[w].x);
  }
  CA_UNROLL
  for (int w = 0; w < kDecodeWarps; ++w) {
    state[w].x = peak == -Infinity() ? 0.f : Exp2(state[w].x - peak);
    total += state[w].y * state[w].x;
  }
  const bool whole = tile.num_splits == 1;
  const int head = tile.Head(row), item_row = tile.row_begin + row;
  float* split = whole ? nullptr : SplitState(launch, tile, tile.split);
  float lse, scale = 1.f;
  if (whole) {
    scale = FinishState(p, head, peak, total, &lse);
    if (LaneIndex() == 0) p.lse[tile.Token(row) * p.num_q_heads + head] = lse;
  } else if (LaneIndex() == 0) {
    split[int64_t{tile.item_rows} * kDim + item_row] = peak;
    split[int64_t{tile.item_rows} * (kDim + 1) + item_row] = total;
  }
  T* out = static_cast<T*>(p.out) + tile.Token(row) * p.out_token_stride + int64_t{head} * kDim;
  for (int d = 2 * LaneIndex(); d < kDim; d += 64) {
    F2 sum = {0.f, 0.f};
    CA_UNROLL
    for (int w = 0; w < kDecodeWarps; ++w) {
      const int place = (w * kDecodeRows + row) * Shared::kStateRow + d;
      const F2 x = LoadShared<F2>(shared + place * sizeof(float));
      sum = {sum.x + state[w].x * x.x, sum.y + state[w].x * x.y};
    }
    if (whole) {
      StorePair(out + d, sum.x * scale, sum.y * scale);
    } else {
      StorePair(split + int64_t{item_row} * kDim + d, sum.x, sum.y);
    }
  }
}

// Two blocks on a multiprocessor leave a thread 255 registers.
template <typename T, int kDim>
CA_KERNEL(32 * kDecodeWarps, kDim > 128 ? 1 : 2)
DecodeKernel(CA_GRID_CONSTANT AttnLaunch launch) {
  const AttnTile tile = MakeTile(launch, kDecodeRows);
  if (tile.num_rows == 0) return;
  DecodeWarp<T, kDim> warp(launch, tile);
  warp.Run();
  SyncThreads();
  warp.StoreState();
  SyncThreads();
  for (int row = ThreadIndex() / 32; row < tile.num_rows; row += kDecodeWarps) {
    FinishRow<T, kDim>(launch, tile, row);
  }
  if (tile.num_splits == 1) return;
  // The warps' states are no longer needed: their place serves as the flag.
  if (IsLastSplit(launch, tile, reinterpret_cast<int*>(SharedMemory()))) {
    MergeSplits<T>(launch, tile, kDecodeWarps);
  }
}

}  // namespace cachedattn::cuda
