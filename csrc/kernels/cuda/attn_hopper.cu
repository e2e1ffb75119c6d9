// Extend and prefill on sm_90a, for many rows of bf16 or fp16: bound by the tensor cores. Here are
// the warpgroups that multiply, and the launch; attn_hopper_feed.h has what brings them their
// tiles.
#include "csrc/kernels/cuda/attn_hopper.h"

#include "csrc/kernels/cuda/attn_hopper_feed.h"
#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/device_sm90.h"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/cuda/tensor_map.h"

namespace cachedattn::cuda {
namespace {

// Loads, rotates and scales the 16 rows of this warp, and leaves them in q as operands of wgmma.
template <typename T, int D>
CA_DEVICE void LoadQuery(const AttnParams& p, const AttnTile& t, uint32_t (&q)[D / 16][4]) {
  constexpr int kLanes = D / 4;            // of a row: each has two words of it, two pairs
  constexpr int kRows = 16 * kLanes / 32;  // that a lane works on, one after another
  char* tile = Shared<D>::Query() + ThreadIndex() / 32 * 16 * D * 2;
  const int group = LaneIndex() % kLanes, first_row = LaneIndex() / kLanes * kRows;
  const Index3 words = UnitsOfGroup(p.rope, group, 2);
  const int last = t.num_rows - 1;
  uint32_t x[kRows], y[kRows];
  int positions[kRows];
  CA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int wanted = ThreadIndex() / 32 * 16 + first_row + r, row = wanted < last ? wanted : last;
    const T* source = static_cast<const T*>(p.q) + QueryOffset(p, t, row);
    x[r] = wanted <= last ? reinterpret_cast<const uint32_t*>(source)[words.x] : 0;
    y[r] = wanted <= last ? reinterpret_cast<const uint32_t*>(source)[words.y] : 0;
    positions[r] = t.Position(row) > 0 ? t.Position(row) : 0;
  }
  // From row to row the position is the same or the next one.
  const float scale = QueryScale(p);
  F2 angles[2], step[2];
  CA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const F2 angle = AngleOrNone(p.rope, 2 * group + i, positions[0]);
    angles[i] = {angle.x * scale, angle.y * scale};
    step[i] = AngleOrNone(p.rope, 2 * group + i, 1);
  }
  CA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (r > 0 && positions[r] != positions[r - 1]) {
      angles[0] = Rotate(angles[0], step[0]), angles[1] = Rotate(angles[1], step[1]);
    }
    if (p.rope.interleaved) {
      RotateWords<T, true>(&x[r], &y[r], angles[0], angles[1]);
    } else {
      RotateWords<T, false>(&x[r], &y[r], angles[0], angles[1]);
    }
    const int row = first_row + r;
    StoreShared<uint32_t>(tile + ChunkOffset(16, row, words.x / 4) + words.x % 4 * 4, x[r]);
    StoreShared<uint32_t>(tile + ChunkOffset(16, row, words.y / 4) + words.y % 4 * 4, y[r]);
  }
  SyncWarp();
  CA_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    LoadMatrix4(tile + ChunkOffset(16, LaneIndex() % 16, 2 * k + LaneIndex() / 16), q[k]);
  }
}

// A descriptor counts addresses in units of 16 bytes, in its lowest bits, which a tile does not
// overflow: moves it on by `bytes`.
CA_DEVICE uint64_t Advance(uint64_t descriptor, int bytes) {
  const uint32_t lower = static_cast<uint32_t>(descriptor) + bytes / 16;
  return (descriptor >> 32 << 32) | lower;
}

// Begins s [64, 64] = q K^T. K is K-major: 8 keys are 1024 bytes. Depth advances by 16 dims, 32
// bytes of a row, four times in a column of 64.
template <typename T, int D>
CA_DEVICE void BeginLogits(float (&s)[32], uint32_t (&q)[D / 16][4], const char* k_tile) {
  constexpr int kUnused = 16;
  const uint64_t tile = WgmmaDescriptor(k_tile, kUnused, 8 * 128);
  WgmmaFence();
  CA_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    const uint64_t dims = Advance(tile, k / 4 * kColumnBytes + k % 4 * 32);
    WgmmaRegisters<T, 64, false>(s, q[k], dims, k > 0);
  }
  WgmmaCommit();
}

// Begins o [64, D] += weights V. V is MN-major: 8 keys are 1024 bytes, 64 dims a column. Depth
// advances by 16 keys.
template <typename T, int D>
CA_DEVICE void BeginOutput(float (&o)[D / 2], uint32_t (&weights)[4][4], const char* v_tile) {
  const uint64_t tile = WgmmaDescriptor(v_tile, kColumnBytes, 8 * 128);
  WgmmaFence();
  CA_UNROLL
  for (int k = 0; k < 4; ++k) {
    WgmmaRegisters<T, D, true>(o, weights[k], Advance(tile, k * 16 * 128), true);
  }
  WgmmaCommit();
}

// Two rows of the thread, lane / 4 and lane / 4 + 8 of its warp's 16: register i of four holds a
// value of row i / 2. Every lane of a quad has the same m; l is the lane's own share.
struct RowStates {
  float m[2], l[2];
  Index3 limits[2];      // keys that the row attends to
  int all_from, all_to;  // keys that all rows of the warpgroup attend to
};

CA_DEVICE RowStates MakeRowStates(const AttnLaunch& launch, const AttnTile& t) {
  const int last = t.num_rows - 1, group = ThreadIndex() / kGroupThreads * kGroupRows;
  RowStates rows;
  CA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = ThreadIndex() / 32 * 16 + LaneIndex() / 4 + 8 * i;
    rows.m[i] = -Infinity(), rows.l[i] = 0.f;
    rows.limits[i] = KeyLimits(launch, t, row < last ? row : last);
  }
  const int end = group + kGroupRows - 1;
  rows.all_from = KeyLimits(launch, t, end < last ? end : last).x;
  rows.all_to = KeyLimits(launch, t, group < last ? group : last).y;
  return rows;
}

// Weights may reach 2^8 before m rises to the row's peak: they are as exact, fit fp16 (below 2^16),
// and after the first tiles of a row the sums hardly ever have to be rescaled.
constexpr float kSlack = 8.f;

// Makes logits of the tile at `base` weights 2^(s - m). `keep` is what the sums so far are to be
// multiplied with, 1 where m stays.
CA_DEVICE void Weigh(const AttnParams& p, int base, float (&s)[32], RowStates* rows,
                     float (&keep)[2]) {
  if (p.softcap > 0.f) {
    CA_UNROLL
    for (int i = 0; i < 32; ++i) s[i] = SoftCap(s[i], p.softcap);
  }
  if (base < rows->all_from || base + kKeyTile > rows->all_to) {
    CA_UNROLL
    for (int i = 0; i < 32; ++i) {
      const int key = base + i / 4 * 8 + LaneIndex() % 4 * 2 + i % 2;
      const Index3 limits = rows->limits[i / 2 % 2];
      s[i] = key >= limits.x && key < limits.y ? s[i] : -Infinity();
    }
  }
  CA_UNROLL
  for (int row = 0; row < 2; ++row) {
    float peak = rows->m[row];
    CA_UNROLL
    for (int i = 0; i < 32; ++i) {
      if (i / 2 % 2 == row) peak = Max(peak, s[i]);
    }
    peak = Max(peak, ShuffleXor(peak, 1));
    peak = Max(peak, ShuffleXor(peak, 2));
    const bool rises = peak > rows->m[row] + kSlack;
    const float m = rises ? peak : rows->m[row];
    const float zero = m == -Infinity() ? 0.f : m;  // no key yet: all weights are 0
    keep[row] = rises ? Exp2(rows->m[row] - zero) : 1.f;
    rows->m[row] = m;
    float sum = 0.f;
    CA_UNROLL
    for (int i = 0; i < 32; ++i) {
      if (i / 2 % 2 != row) continue;
      s[i] = Exp2(s[i] - zero);
      sum += s[i];
    }
    rows->l[row] = rows->l[row] * keep[row] + sum;
  }
}

// Sums of wgmma as its operand: columns 16 k .. 16 k + 15.
template <typename T>
CA_DEVICE void PackWeights(const float (&s)[32], uint32_t (&weights)[4][4]) {
  CA_UNROLL
  for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = PackPair<T>(s[2 * i], s[2 * i + 1]);
}

CA_DEVICE void PinWeights(uint32_t (&weights)[4][4]) {
  CA_UNROLL
  for (int k = 0; k < 4; ++k) PinRegisters(weights[k]);
}

// Writes the rows' output and lse, or the state of the split.
template <typename T, int D>
CA_DEVICE void WriteRows(const AttnLaunch& launch, const AttnTile& t, const float (&o)[D / 2],
                         const RowStates& rows) {
  const AttnParams& p = launch.p;
  CA_UNROLL
  for (int i = 0; i < 2; ++i) {
    float l = rows.l[i];
    l += ShuffleXor(l, 1);
    l += ShuffleXor(l, 2);
    const int row = ThreadIndex() / 32 * 16 + LaneIndex() / 4 + 8 * i, dim = LaneIndex() % 4 * 2;
    if (row >= t.num_rows) continue;
    if (t.num_splits > 1) {
      float* state = SplitState(launch, t, t.split);
      const int item_row = t.row_begin + row;
      float* out = state + int64_t{item_row} * D + dim;
      CA_UNROLL
      for (int j = 0; j < D / 8; ++j)
        StorePair(out + 8 * j, o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
      float* m = state + int64_t{t.item_rows} * D + item_row;
      if (dim == 0) m[0] = rows.m[i], m[t.item_rows] = l;
    } else {
      const int64_t token = t.Token(row);
      const int head = t.Head(row);
      float lse;
      const float scale = FinishState(p, head, rows.m[i], l, &lse);
      T* out = static_cast<T*>(p.out) + token * p.out_token_stride + int64_t{head} * D + dim;
      CA_UNROLL
      for (int j = 0; j < D / 8; ++j) {
        StorePair(out + 8 * j, o[4 * j + 2 * i] * scale, o[4 * j + 2 * i + 1] * scale);
      }
      if (dim == 0) p.lse[token * p.num_q_heads + head] = lse;
    }
  }
}

// While the weights of a tile are computed, the tensor cores multiply those of the one before with
// V.
template <typename T, int D>
CA_DEVICE void AttendTiles(const AttnParams& p, const AttnTile& t, uint32_t (&q)[D / 16][4],
                           RowStates* rows, float (&o)[D / 2]) {
  using Block = Shared<D>;
  const int tiles = NumTiles(t);
  uint32_t weights[4][4];
  float s[32] = {}, keep[2];
  Block::Wait(kKReady, 0);
  PinRegisters(s);
  BeginLogits<T, D>(s, q, Block::K(0));
  WgmmaWait<0>();
  PinRegisters(s);
  Block::ArriveWarp(kKEmpty, 0);
  Weigh(p, t.kv_begin, s, rows, keep);
  Block::Wait(kVFull, 0);
  PackWeights<T>(s, weights);
  for (int n = 1; n < tiles; ++n) {
    Block::Wait(kKReady, n);
    PinRegisters(s);
    PinRegisters(o);
    PinWeights(weights);
    BeginLogits<T, D>(s, q, Block::K(n));
    BeginOutput<T, D>(o, weights, Block::V(n - 1));
    WgmmaWait<1>();  // the logits
    PinRegisters(s);
    Block::ArriveWarp(kKEmpty, n);
    Weigh(p, t.kv_begin + n * kKeyTile, s, rows, keep);
    PinRegisters(s);
    // Here, not where V is needed: its branch keeps the assembler from moving the next wait up,
    // before the weights, when the tensor cores would run out of work.
    Block::Wait(kVFull, n);
    WgmmaWait<0>();  // the output
    PinRegisters(o);
    PinWeights(weights);
    Block::ArriveWarp(kVEmpty, n - 1);
    if (keep[0] != 1.f || keep[1] != 1.f) {
      CA_UNROLL
      for (int i = 0; i < D / 2; ++i) o[i] *= keep[i / 2 % 2];
    }
    PackWeights<T>(s, weights);
  }
  PinRegisters(o);
  PinWeights(weights);
  BeginOutput<T, D>(o, weights, Block::V(tiles - 1));
  WgmmaWait<0>();
  PinRegisters(o);
}

template <typename T, int D>
CA_DEVICE void Consume(const AttnLaunch& launch, const AttnTile& t) {
  uint32_t q[D / 16][4];
  float o[D / 2] = {};
  RowStates rows = MakeRowStates(launch, t);
  if (ThreadIndex() / kGroupThreads < ActiveConsumers(t.num_rows) && NumTiles(t) > 0) {
    LoadQuery<T, D>(launch.p, t, q);
    AttendTiles<T, D>(launch.p, t, q, &rows, o);
  }
  WriteRows<T, D>(launch, t, o, rows);
  if (t.num_splits == 1) return;
  constexpr int kMergeBarrier = 1, kMergeThreads = kConsumers * kGroupThreads;
  const auto sync = [] { NamedBarrierSync(kMergeBarrier, kMergeThreads); };
  if (IsLastSplit(launch, t, Shared<D>::Flag(), sync)) {
    MergeSplits<T>(launch, t, kMergeThreads / 32);
  }
}

template <typename T, int D>
CA_KERNEL(kThreads, 1)
HopperKernel(AttnLaunch launch, CA_GRID_CONSTANT TensorMap map, int box_tokens) {
  const int num_rows = MakeTile(launch, kHopperRows).num_rows;
  if (num_rows == 0) return;
  if (ThreadIndex() == 0) InitBarriers<D>(num_rows);
  SyncThreads();
  // Each makes the tile anew: what lived across would have to fit the producer's registers.
  const int group = ThreadIndex() / kGroupThreads;
  if (group < kConsumers) {
    ClaimRegisters<kConsumerRegisters>();
    Consume<T, D>(launch, MakeTile(launch, kHopperRows));
  } else if (group == kRotator) {
    ReleaseRegisters<kRotatorRegisters>();
    const AttnTile t = MakeTile(launch, kHopperRows);
    if (launch.p.rope.interleaved) {
      RotateTiles<T, D, true>(launch.p, t);
    } else {
      RotateTiles<T, D, false>(launch.p, t);
    }
  } else {
    ReleaseRegisters<kProducerRegisters>();
    if (ThreadIndex() % kGroupThreads != 0) return;
    Produce<D>(launch.p, MakeTile(launch, kHopperRows), &map, box_tokens);
  }
}

int BoxTokens(const KvView& kv) { return kv.block_size < kKeyTile ? kv.block_size : kKeyTile; }

template <typename T, int D>
const char* LaunchShape(const AttnLaunch& launch, const TensorMap& map, int num_items,
                        void* stream) {
  const Index3 grid = {num_items, launch.p.kv.num_kv_heads * launch.row_blocks, 1};
  return Launch(HopperKernel<T, D>, grid, kThreads, Shared<D>::kBytes, stream, launch, map,
                BoxTokens(launch.p.kv));
}

// K and V of a layer as the copy engine sees them: dim, token in block, head, K or V, slot.
bool MapOfKv(const KvView& kv, TensorMap* map) {
  const int64_t sizes[5] = {kv.head_dim, kv.block_size, kv.num_kv_heads, 2, kv.num_slots};
  const int64_t strides[4] = {2 * kv.token_stride, 2 * kv.head_stride, 2 * kv.kv_stride,
                              2 * kv.slot_stride};
  const int box[5] = {64, BoxTokens(kv), 1, 1, 1};
  return MakeTensorMap(map, kv.data, kv.dtype, sizes, strides, box);
}

bool IsAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

bool HopperTakes(const AttnParams& p) {
  const auto stride_fits = [](int64_t elements) {  // what a tensor map can say
    return elements > 0 && elements % 8 == 0 && 2 * elements < int64_t{1} << 40;
  };
  const KvView& kv = p.kv;
  return kv.dtype != DType::kFloat32 && (kv.head_dim == 64 || kv.head_dim == 128) &&
         (p.rope.interleaved || p.rope.rotary_dim % 16 == 0) && IsAligned(kv.data) &&
         stride_fits(kv.slot_stride) && stride_fits(kv.kv_stride) && stride_fits(kv.head_stride) &&
         stride_fits(kv.token_stride) && kv.num_slots > 0 && kv.num_slots <= INT32_MAX &&
         IsAligned(p.q) && p.q_token_stride % 8 == 0;
}

const char* LaunchHopper(const AttnLaunch& launch, int num_items, void* stream) {
  TensorMap map;
  if (!MapOfKv(launch.p.kv, &map)) return "attn_paged: the driver cannot make a tensor map of kv";
  const bool wide = launch.p.kv.head_dim == 128;
  if (launch.p.kv.dtype == DType::kBFloat16) {
    return wide ? LaunchShape<Bf16, 128>(launch, map, num_items, stream)
                : LaunchShape<Bf16, 64>(launch, map, num_items, stream);
  }
  return wide ? LaunchShape<Fp16, 128>(launch, map, num_items, stream)
              : LaunchShape<Fp16, 64>(launch, map, num_items, stream);
}

}  // namespace cachedattn::cuda
