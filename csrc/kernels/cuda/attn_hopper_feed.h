// The Hopper attention kernel (attn_hopper.cu) up to its consumers: the block's four warpgroups,
// its shared memory, the producer and the rotator.
//
// Two consumers take 64 query rows each and multiply with wgmma; one rotator turns each K tile by
// the angles of its positions, in shared memory; one thread of the producer orders K and V tiles
// from TMA. A tile's stage passes from one to the next by mbarriers:
//
//   producer -> (K full) -> rotator -> (K ready) -> consumers -> (K empty) -> producer
//   producer -> (V full) --------------------------> consumers -> (V empty) -> producer
//
// so a tile is rotated once for all rows of the block while the one before it is multiplied.
#pragma once

#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/device_sm90.h"

namespace cachedattn::cuda {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kConsumers = 2;       // warpgroups 0 and 1; then the rotator; then the producer
constexpr int kRotator = 2;
constexpr int kThreads = 4 * kGroupThreads;
constexpr int kGroupRows = kHopperRows / kConsumers;  // 64, the rows of one wgmma
// A wgmma for q K^T, 64 x 64 x 16, takes 32 cycles, in which shared memory gives 4 KB. K takes 2 KB
// of them. q would take the rest and leave none to TMA and the rotator: it stays in registers.
//
// 512 threads begin with 65536 / 512 = 128 registers each; 2 x 208 + 72 + 24 = 4 x 128. A consumer
// of head_dim 128 holds 64 sums of the output, 32 logits, 32 words of q and 16 of the weights.
constexpr int kConsumerRegisters = 208, kRotatorRegisters = 72, kProducerRegisters = 24;

// A tile in shared memory is D / 64 columns of 64 dims, each [rows][128 bytes], swizzled.
constexpr int kColumnBytes = kKeyTile * 128;               // of K and V
CA_DEVICE int ChunkOffset(int rows, int row, int chunk) {  // 16-byte chunk of a tile's row
  return chunk / 8 * rows * 128 + SwizzledOffset(row, chunk % 8);
}

enum Barrier { kKFull, kKReady, kKEmpty, kVFull, kVEmpty, kNumBarriers };

// The block's shared memory: K and V tiles of each stage, q, barriers, a flag.
template <int D>
struct Shared {
  // A tile of 64 keys is 16 KB for K and as much for V (D = 128), and its products take 1,024
  // cycles at full rate. Four stages: one is multiplied, one rotated, two (64 KB) are on their way,
  // more than the 23 KB that 3 TB/s over 132 multiprocessors deliver in 1 us. D = 64 has half the
  // bytes in a stage.
  static constexpr int kStages = 512 / D;
  static constexpr int kTileBytes = kKeyTile * D * 2;
  static constexpr int kQueryBytes = kHopperRows * D * 2;
  static constexpr int kQueryAt = 2 * kStages * kTileBytes;
  static constexpr int kBarriersAt = kQueryAt + kQueryBytes;
  static constexpr int kFlagAt = kBarriersAt + kNumBarriers * kStages * 8;
  static constexpr int kBytes = kFlagAt + 8;  // 160 KB (D = 128) of 227: one block by registers
  static_assert(kBytes <= 227 << 10, "more than a multiprocessor has");

  // Of the n-th tile of the block.
  static CA_DEVICE int Stage(uint32_t n) { return n % kStages; }
  static CA_DEVICE char* K(int n) { return SharedMemory() + Stage(n) * kTileBytes; }
  static CA_DEVICE char* V(int n) { return K(n) + kStages * kTileBytes; }
  static CA_DEVICE uint64_t* At(Barrier barrier, int n) {
    char* barriers = SharedMemory() + kBarriersAt;
    return reinterpret_cast<uint64_t*>(barriers) + barrier * kStages + Stage(n);
  }
  static CA_DEVICE void Wait(Barrier barrier, int n) {
    MbarrierWait(At(barrier, n), static_cast<uint32_t>(n) / kStages % 2);
  }
  // Until the tile that had the stage of tile n before it is done with.
  static CA_DEVICE void WaitEmpty(Barrier barrier, int n) {
    if (n >= kStages) Wait(barrier, n - kStages);
  }
  // One arrival a warp, for what all its lanes did.
  static CA_DEVICE void ArriveWarp(Barrier barrier, int n) {
    SyncWarp();
    if (LaneIndex() == 0) MbarrierArrive(At(barrier, n));
  }
  static CA_DEVICE char* Query() { return SharedMemory() + kQueryAt; }
  static CA_DEVICE int* Flag() { return reinterpret_cast<int*>(SharedMemory() + kFlagAt); }
};

CA_DEVICE int NumTiles(const AttnTile& t) {
  return t.kv_end > t.kv_begin ? (t.kv_end - t.kv_begin + kKeyTile - 1) / kKeyTile : 0;
}

// Consumers that have rows; an idle one takes no tiles.
CA_DEVICE int ActiveConsumers(int num_rows) { return num_rows > kGroupRows ? 2 : 1; }

template <int D>
CA_DEVICE void InitBarriers(int num_rows) {
  const int consumer_warps = 4 * ActiveConsumers(num_rows);
  for (int n = 0; n < Shared<D>::kStages; ++n) {
    MbarrierInit(Shared<D>::At(kKFull, n), 1);
    MbarrierInit(Shared<D>::At(kVFull, n), 1);
    MbarrierInit(Shared<D>::At(kKReady, n), 4);
    MbarrierInit(Shared<D>::At(kKEmpty, n), consumer_warps);
    MbarrierInit(Shared<D>::At(kVEmpty, n), consumer_warps);
  }
  FenceBarrierInit();
}

// ---- producer ----

// A tile comes in boxes of `tokens` keys, each in one block: a block or a tile, what is less.
constexpr int kMaxBoxes = kKeyTile / 16;

// Slots of the boxes of the tile at `base`; -1 past the keys: TMA then delivers zeros.
CA_DEVICE void FindSlots(const AttnParams& p, const AttnTile& t, int tokens, int base,
                         int (&slots)[kMaxBoxes]) {
  const int32_t* table = p.block_table + t.seq * p.max_blocks;
  CA_UNROLL
  for (int box = 0; box < kMaxBoxes; ++box) {
    const int key = base + box * tokens;
    slots[box] = box * tokens < kKeyTile && key < t.kv_end ? table[key / p.kv.block_size] : -1;
  }
}

// Orders K (kv = 0) or V (1) of a tile. Its bytes complete on `barrier`.
template <int D>
CA_DEVICE void LoadTile(const AttnParams& p, const AttnTile& t, const TensorMap* map, int tokens,
                        char* tile, uint64_t* barrier, int kv, int base,
                        const int (&slots)[kMaxBoxes]) {
  MbarrierArriveExpect(barrier, Shared<D>::kTileBytes);
  CA_UNROLL
  for (int box = 0; box < kMaxBoxes; ++box) {
    if (box * tokens >= kKeyTile) break;
    const int token = (base + box * tokens) % p.kv.block_size;
    CA_UNROLL
    for (int column = 0; column < D / 64; ++column) {
      TmaLoad5(tile + column * kColumnBytes + box * tokens * 128, map, barrier, 64 * column, token,
               t.kv_head, kv, slots[box]);
    }
  }
}

template <int D>
CA_DEVICE void Produce(const AttnParams& p, const AttnTile& t, const TensorMap* map, int tokens) {
  using Block = Shared<D>;
  const int tiles = NumTiles(t);
  PrefetchTensorMap(map);
  int slots[kMaxBoxes];
  FindSlots(p, t, tokens, t.kv_begin, slots);
  for (int n = 0; n < tiles; ++n) {
    const int base = t.kv_begin + n * kKeyTile;
    Block::WaitEmpty(kKEmpty, n);
    LoadTile<D>(p, t, map, tokens, Block::K(n), Block::At(kKFull, n), 0, base, slots);
    Block::WaitEmpty(kVEmpty, n);
    LoadTile<D>(p, t, map, tokens, Block::V(n), Block::At(kVFull, n), 1, base, slots);
    FindSlots(p, t, tokens, base + kKeyTile, slots);  // in time for the next tile
  }
}

// ---- rotation ----

// (cos, sin) of a pair at a position; none past the rotated dims.
CA_DEVICE F2 AngleOrNone(const RopeTables& rope, int pair, int position) {
  return 2 * pair < rope.rotary_dim ? PairAngle(rope, pair, position) : F2{1.f, 0.f};
}

// A row is cut into units of `width` dims. Units x and y of group i hold its `width` pairs, of
// which the first is pair `width` * i: half-split pairs lie rotary_dim / 2 dims apart, interleaved
// ones, and dims that are not rotated, side by side.
CA_DEVICE Index3 UnitsOfGroup(const RopeTables& rope, int i, int width) {
  const int apart = rope.rotary_dim / 2 / width;
  if (!rope.interleaved && i < apart) return {i, i + apart, 0};
  return {2 * i, 2 * i + 1, 0};
}

// Rotates the two pairs in words x and y of a group: (x0, y0) and (x1, y1), or, interleaved,
// (x0, x1) and (y0, y1).
template <typename T, bool kInterleaved>
CA_DEVICE void RotateWords(uint32_t* x, uint32_t* y, F2 angle0, F2 angle1) {
  const F2 a = UnpackPair<T>(*x), b = UnpackPair<T>(*y);
  if (kInterleaved) {
    const F2 c = Rotate(a, angle0), d = Rotate(b, angle1);
    *x = PackPair<T>(c.x, c.y), *y = PackPair<T>(d.x, d.y);
  } else {
    const F2 c = Rotate({a.x, b.x}, angle0), d = Rotate({a.y, b.y}, angle1);
    *x = PackPair<T>(c.x, d.x), *y = PackPair<T>(c.y, d.y);
  }
}

// The rotator's share of a tile: one group of 8 pairs (two 16-byte chunks of a row) of every
// kKeyStep-th key.
template <int D>
struct RotatorShare {
  static constexpr int kGroups = D / 16;  // of a row
  static constexpr int kKeyStep = kGroupThreads / kGroups;
  int group, first_key;

  // Neighbouring lanes take the groups of a row. Where a row has only 4, eight lanes take two rows
  // 4 apart, whose chunks the swizzle puts into different banks.
  CA_DEVICE explicit RotatorShare(int thread) {
    group = thread % kGroups;
    const int row = thread / kGroups;
    first_key = kGroups == 8 ? row : row / 8 * 8 + row % 2 * 4 + row / 2 % 4;
  }
};

// Rotates the thread's keys of a tile. The angles of its first key there come in and are advanced
// from key to key, so they end at its first key of the next tile.
template <typename T, int D, bool kInterleaved>
CA_DEVICE void RotateTile(char* x, char* y, F2 (&angles)[8], const F2 (&step)[8]) {
  constexpr int kKeyStep = RotatorShare<D>::kKeyStep;  // a multiple of 8: the swizzle is the same
  CA_UNROLL
  for (int key = 0; key < kKeyTile; key += kKeyStep) {
    const U4 a = LoadShared<U4>(x + key * 128), b = LoadShared<U4>(y + key * 128);
    uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    CA_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t* first = kInterleaved ? &words[2 * i] : &words[i];
      uint32_t* second = kInterleaved ? &words[2 * i + 1] : &words[i + 4];
      RotateWords<T, kInterleaved>(first, second, angles[2 * i], angles[2 * i + 1]);
    }
    StoreShared<U4>(x + key * 128, {words[0], words[1], words[2], words[3]});
    StoreShared<U4>(y + key * 128, {words[4], words[5], words[6], words[7]});
    CA_UNROLL
    for (int i = 0; i < 8; ++i) angles[i] = Rotate(angles[i], step[i]);
  }
}

// Zeroes rows of V from `first` on: unused places of a slot may hold NaN, and 0 x NaN is NaN.
template <int D>
CA_DEVICE void ZeroRows(char* v, int first) {
  for (int i = ThreadIndex() % kGroupThreads; i < (kKeyTile - first) * 8; i += kGroupThreads) {
    CA_UNROLL
    for (int column = 0; column < D / 64; ++column) {
      StoreShared<U4>(v + column * kColumnBytes + first * 128 + i * 16, {0, 0, 0, 0});
    }
  }
}

// K ready means: K of the tile is rotated, and V ends in zeros where the keys end. (Rows of K past
// the end give logits that are masked.)
template <typename T, int D, bool kInterleaved>
CA_DEVICE void RotateTiles(const AttnParams& p, const AttnTile& t) {
  using Block = Shared<D>;
  // The angle of a key is the product of two rounded rotations a step; from the tables again every
  // 512 keys, its error stays below 32 x 2^-23.
  constexpr int kRenewTiles = 8;
  const int tiles = NumTiles(t);
  const RotatorShare<D> share(ThreadIndex() % kGroupThreads);
  const bool rotates = 16 * share.group < p.rope.rotary_dim;
  const Index3 chunks = UnitsOfGroup(p.rope, share.group, 8);
  const int x = ChunkOffset(kKeyTile, share.first_key, chunks.x);
  const int y = ChunkOffset(kKeyTile, share.first_key, chunks.y);
  F2 angles[8] = {}, step[8] = {};
  if (rotates) {
    CA_UNROLL
    for (int i = 0; i < 8; ++i) {
      step[i] = AngleOrNone(p.rope, 8 * share.group + i, RotatorShare<D>::kKeyStep);
    }
  }
  for (int n = 0; n < tiles; ++n) {
    const int base = t.kv_begin + n * kKeyTile;
    if (rotates && n % kRenewTiles == 0) {
      CA_UNROLL
      for (int i = 0; i < 8; ++i) {
        angles[i] = AngleOrNone(p.rope, 8 * share.group + i, base + share.first_key);
      }
    }
    Block::Wait(kKFull, n);
    if (rotates) {
      RotateTile<T, D, kInterleaved>(Block::K(n) + x, Block::K(n) + y, angles, step);
    }
    if (base + kKeyTile > t.kv_end) {
      Block::Wait(kVFull, n);
      ZeroRows<D>(Block::V(n), t.kv_end - base);
    }
    FenceProxyAsync();
    Block::ArriveWarp(kKReady, n);
  }
}

}  // namespace cachedattn::cuda
