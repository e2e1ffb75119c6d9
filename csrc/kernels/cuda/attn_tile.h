// What the attention kernels share: which rows and keys a block works on, where K and V lie, how
// angles come about, and how the states of splits are saved and merged.
//
// A block takes up to R query rows of one plan item and one KV head (R is the kernel's row tile).
// Rows are ordered r = token * G + g as on the CPU, so all query heads of a group share each K and
// V tile, and the causal limit never falls from one row to the next. Keys come in tiles of 64
// aligned to absolute positions. Logits are in base 2: softmax is 2^(s - m), and a state (o, m, l)
// holds o = sum of 2^(s - m) v, l = sum of 2^(s - m).
#pragma once

#include "csrc/kernels/attn_plan.h"
#include "csrc/kernels/cuda/device.h"
#include "csrc/kernels/params.h"

namespace cachedattn::cuda {

constexpr int kKeyTile = 64;
constexpr float kLog2E = 1.44269504088896340736f;

// A launch. The grid is (items of the plan, KV heads x row blocks of an item); a block whose item
// has rows outside (min_rows, max_rows] is another kernel's and returns at once.
struct AttnLaunch {
  AttnParams p;
  float* partials;  // states of splits; place given by PlanItem::partial_token as on the CPU
  int*
      finished;  // [items, H, row blocks], zero: splits of a group that are done, at its first item
  int row_blocks;  // blocks that share an item's rows
  int min_rows, max_rows;
};

// ---- what a block works on ----

struct AttnTile {
  int seq, kv_head;
  int group;             // G
  int item_rows;         // rows of the plan item, all row blocks together
  int row_begin;         // first of the item's rows that this block takes
  int num_rows;          // how many; 0: none, the block returns
  int row_block;         // which of AttnLaunch::row_blocks
  int64_t first_token;   // row of q of the item's first token
  int first_position;    // of the item's first token; negative where rows precede the context
  int kv_begin, kv_end;  // keys of the split that some row of the block sees; kv_begin % 64 == 0
  int split, num_splits, plan_group, partial_token;

  CA_DEVICE int Position(int row) const { return first_position + (row_begin + row) / group; }
  CA_DEVICE int64_t Token(int row) const { return first_token + (row_begin + row) / group; }
  CA_DEVICE int Head(int row) const { return kv_head * group + (row_begin + row) % group; }
};

// Largest multiple of 64 that is at most x >= 0.
CA_DEVICE int AlignDownToTile(int x) { return x / kKeyTile * kKeyTile; }

// The tile of this block, for a kernel whose row tile is `row_tile`.
CA_DEVICE AttnTile MakeTile(const AttnLaunch& launch, int row_tile) {
  const AttnParams& p = launch.p;
  const PlanItem item =
      reinterpret_cast<const PlanItem*>(p.plan + kPlanHeaderWords)[BlockIndex().x];
  AttnTile t;
  t.seq = item.seq;
  t.kv_head = BlockIndex().y / launch.row_blocks;
  t.row_block = BlockIndex().y % launch.row_blocks;
  t.group = p.num_q_heads / p.kv.num_kv_heads;
  t.item_rows = item.num_tokens * t.group;
  t.row_begin = t.row_block * row_tile;
  const int left = t.item_rows - t.row_begin;
  const bool mine = t.item_rows > launch.min_rows && t.item_rows <= launch.max_rows && left > 0;
  t.num_rows = mine ? (left < row_tile ? left : row_tile) : 0;
  if (!mine) return t;
  const int q_len = p.cu_q[t.seq + 1] - p.cu_q[t.seq];
  t.first_token = p.cu_q[t.seq] + item.row_begin;
  t.first_position = p.kv_lens[t.seq] - q_len + item.row_begin;
  t.split = item.split, t.num_splits = item.num_splits;
  t.plan_group = item.group, t.partial_token = item.partial_token;
  // Causal: the last row sees keys up to its own position. Window: the first row looks furthest
  // back.
  const int last = t.Position(t.num_rows - 1) + 1;
  const int first = p.window > 0 && p.window < last ? t.Position(0) - p.window + 1 : 0;
  t.kv_begin = item.kv_begin;
  if (first > t.kv_begin) t.kv_begin = AlignDownToTile(first);
  t.kv_end = last < item.kv_end ? last : item.kv_end;
  return t;
}

// Keys that `row` of the tile attends to, [begin, end); empty where end <= begin.
CA_DEVICE Index3 KeyLimits(const AttnLaunch& launch, const AttnTile& t, int row) {
  const int position = t.Position(row);
  const int window = launch.p.window;
  const int begin = window > 0 && window <= position ? position - window + 1 : 0;
  const int end = position + 1 < t.kv_end ? position + 1 : t.kv_end;
  return {begin, end, 0};
}

// Offset in elements of K of token `key`; V lies kv.kv_stride further.
CA_DEVICE int64_t KeyOffset(const AttnParams& p, const AttnTile& t, int key) {
  const int block = key / p.kv.block_size;
  const int64_t slot = p.block_table[t.seq * p.max_blocks + block];
  return slot * p.kv.slot_stride + t.kv_head * p.kv.head_stride +
         (key - block * p.kv.block_size) * p.kv.token_stride;
}

// Offset in elements of row `row` of q.
CA_DEVICE int64_t QueryOffset(const AttnParams& p, const AttnTile& t, int row) {
  return t.Token(row) * p.q_token_stride + int64_t{t.Head(row)} * p.kv.head_dim;
}

// ---- angles ----

// (cos, sin) of `position` for pair `pair`: the product of a hi and a lo rotation. position >= 0.
CA_DEVICE F2 PairAngle(const RopeTables& rope, int pair, int position) {
  const int pairs = rope.rotary_dim / 2;
  const int hi_row = position / RopeTables::kLoRows, lo_row = position % RopeTables::kLoRows;
  const float* lo = rope.lo + 2 * (int64_t{lo_row} * pairs + pair);
  const float* hi = rope.hi + 2 * (int64_t{hi_row} * pairs + pair);
  return {hi[0] * lo[0] - hi[1] * lo[1], hi[1] * lo[0] + hi[0] * lo[1]};
}
// Dims of pair `pair`.
CA_DEVICE int PairFirst(const RopeTables& rope, int pair) {
  return rope.interleaved ? 2 * pair : pair;
}
CA_DEVICE int PairSecond(const RopeTables& rope, int pair) {
  return rope.interleaved ? 2 * pair + 1 : pair + rope.rotary_dim / 2;
}
// The rotation by `angle` of (x.x, x.y).
CA_DEVICE F2 Rotate(F2 x, F2 angle) {
  return {x.x * angle.x - x.y * angle.y, x.y * angle.x + x.x * angle.y};
}

// ---- logits ----

// What q is multiplied with, so that q k is a logit in base 2, or what SoftCap takes.
CA_DEVICE float QueryScale(const AttnParams& p) {
  return p.softcap > 0.f ? 2.f * kLog2E * p.sm_scale / p.softcap : kLog2E * p.sm_scale;
}
// cap log2(e) tanh(x), where y = 2 log2(e) x: tanh by one exponential, exact in its limits.
CA_DEVICE float SoftCap(float y, float softcap) {
  const float e = Exp2(y < 125.f ? y : 125.f);
  return softcap * kLog2E * (1.f - Divide(2.f, 1.f + e));
}

// ---- states ----

// The state of this block's split: o [item_rows][D], then m [item_rows], then l [item_rows].
CA_DEVICE float* SplitState(const AttnLaunch& launch, const AttnTile& t, int split) {
  const AttnParams& p = launch.p;
  const int64_t width = p.kv.head_dim + 2;
  return launch.partials + int64_t{t.partial_token} * p.num_q_heads * width +
         (int64_t{t.kv_head} * t.num_splits + split) * t.item_rows * width;
}

// What o is multiplied with to become the output of query head `head`; also its lse. m = -inf: the
// row attends to nothing.
CA_DEVICE float FinishState(const AttnParams& p, int head, float m, float l, float* lse) {
  if (m == -Infinity()) {
    *lse = -Infinity();
    return 0.f;
  }
  float shrink = 1.f;
  if (p.sinks != nullptr) {  // joins the denominator, once
    const float sink = p.sinks[head] * kLog2E, peak = Max(m, sink);
    shrink = Exp2(m - peak);
    l = l * shrink + Exp2(sink - peak);
    m = peak;
  }
  *lse = (m + Log2(l)) / kLog2E;
  return shrink / l;
}

// Two adjacent elements of the output.
template <typename T>
CA_DEVICE void StorePair(T* p, float lower, float upper) {
  *reinterpret_cast<uint32_t*>(p) = PackPair<T>(lower, upper);
}
CA_DEVICE void StorePair(float* p, float lower, float upper) {
  *reinterpret_cast<F2*>(p) = {lower, upper};
}

// Counts this block's split as done. True, in every thread, in the block that is the group's last:
// it then merges. All threads that `sync` is a barrier of call it, the block's first among them,
// after their writes of the state. `flag` is 4 bytes of shared memory.
template <typename Sync>
CA_DEVICE bool IsLastSplit(const AttnLaunch& launch, const AttnTile& t, int* flag, Sync sync) {
  ThreadFence();
  sync();
  if (ThreadIndex() == 0) {
    int* finished =
        launch.finished +
        (int64_t{t.plan_group} * launch.p.kv.num_kv_heads + t.kv_head) * launch.row_blocks +
        t.row_block;
    StoreShared<int>(flag, AtomicAdd(finished, 1) + 1);
  }
  sync();
  const bool last = LoadShared<int>(flag) == t.num_splits;
  ThreadFence();
  return last;
}
CA_DEVICE bool IsLastSplit(const AttnLaunch& launch, const AttnTile& t, int* flag) {
  return IsLastSplit(launch, t, flag, [] { SyncThreads(); });
}

// Merges the splits of this block's rows, always in split order, and writes out and lse. The
// block's first `num_warps` warps call it; a warp takes a row at a time, a lane two dims.
template <typename T>
CA_DEVICE void MergeSplits(const AttnLaunch& launch, const AttnTile& t, int num_warps) {
  const AttnParams& p = launch.p;
  const int dim = p.kv.head_dim;
  for (int row = ThreadIndex() / 32; row < t.num_rows; row += num_warps) {
    const int item_row = t.row_begin + row;
    const int64_t stride = int64_t{t.item_rows} * (dim + 2);  // from split to split
    const float* state = SplitState(launch, t, 0);
    const float* m = state + int64_t{t.item_rows} * dim + item_row;
    const float* l = m + t.item_rows;
    float peak = -Infinity(), total = 0.f;
    for (int s = 0; s < t.num_splits; ++s) peak = Max(peak, LoadFresh(m + s * stride));
    for (int s = 0; s < t.num_splits && peak > -Infinity(); ++s) {
      total += LoadFresh(l + s * stride) * Exp2(LoadFresh(m + s * stride) - peak);
    }
    float lse;
    const float scale = FinishState(p, t.Head(row), peak, total, &lse);
    const int64_t out_row = t.Token(row);
    if (LaneIndex() == 0) p.lse[out_row * p.num_q_heads + t.Head(row)] = lse;
    T* out = static_cast<T*>(p.out) + out_row * p.out_token_stride + int64_t{t.Head(row)} * dim;
    for (int d = 2 * LaneIndex(); d < dim; d += 64) {
      F2 sum = {0.f, 0.f};
      for (int s = 0; s < t.num_splits && peak > -Infinity(); ++s) {
        const float weight = Exp2(LoadFresh(m + s * stride) - peak);
        if (weight == 0.f) continue;  // a split that saw no key may hold anything
        const float* o = state + s * stride + int64_t{item_row} * dim + d;
        sum = {sum.x + weight * LoadFresh(o), sum.y + weight * LoadFresh(o + 1)};
      }
      StorePair(out + d, sum.x * scale, sum.y * scale);
    }
  }
}

}  // namespace cachedattn::cuda
