// Attention on CUDA cores in float32: any element type, head_dim and rotary_dim. What the tensor
// core kernels do not take runs here, and they are compared with it.
//
// A block has 16 rows; each of its 4 warps owns 4. Keys come 32 at a time: the block rotates them
// into shared memory, then a lane is a key in q k, and two dims of the sums in p v.
#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace cachedattn::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kWarpRows = kPlainRows / kWarps;
constexpr int kKeys = 32;
constexpr int kMaxDim = 256;

// Shared memory in floats: q [16][D], k [32][D + 4], v [32][D], p [warp][32 keys][4 rows], 84 KB at
// D = 256. The lanes of a warp read 16 bytes of their own k rows at once: D + 4 spreads them over
// all banks.
struct PlainShared {
  int dim;
  CA_DEVICE float* Query(int row) const { return At(row * dim); }
  CA_DEVICE float* Key(int key) const { return At(kPlainRows * dim + key * (dim + 4)); }
  CA_DEVICE float* Value(int key) const { return At((kPlainRows + kKeys + key) * dim + 4 * kKeys); }
  CA_DEVICE float* Weights(int warp, int key) const {
    return At((kPlainRows + 2 * kKeys) * dim + 4 * kKeys + (warp * kKeys + key) * kWarpRows);
  }
  CA_DEVICE float* At(int i) const { return reinterpret_cast<float*>(SharedMemory()) + i; }
};
constexpr int PlainBytes(int dim) {
  return 4 * ((kPlainRows + 2 * kKeys) * dim + 4 * kKeys + kPlainRows * kKeys);
}

CA_DEVICE float LoadElement(const float* p) { return *p; }
template <typename T>
CA_DEVICE float LoadElement(const T* p) {
  return UnpackPair<T>(p->bits).x;
}

// Pair `i` of D / 2 of row x, rotated to `position` and scaled, to `shared`. Dims from rotary_dim
// on make pairs too, which are not rotated.
template <typename T>
CA_DEVICE void LoadPair(const RopeTables& rope, const T* x, int i, int position, float scale,
                        float* shared) {
  const bool rotated = i < rope.rotary_dim / 2;
  const int first = rotated ? PairFirst(rope, i) : 2 * i;
  const int second = rotated ? PairSecond(rope, i) : 2 * i + 1;
  F2 pair = {LoadElement(x + first), LoadElement(x + second)};
  if (rotated) pair = Rotate(pair, PairAngle(rope, i, position));
  StoreShared<float>(shared + first, pair.x * scale);
  StoreShared<float>(shared + second, pair.y * scale);
}

template <typename T>
CA_DEVICE void LoadQueries(const AttnParams& p, const AttnTile& tile, PlainShared shared) {
  const int pairs = shared.dim / 2;
  const float scale = QueryScale(p);
  for (int i = ThreadIndex(); i < kPlainRows * pairs; i += 32 * kWarps) {
    if (i >= tile.num_rows * pairs) {  // rows that are not there
      StoreShared<F2>(shared.At(2 * i), {0.f, 0.f});
      continue;
    }
    const int row = i / pairs, position = tile.Position(row);
    // A row before the context attends to nothing: any angle will do.
    LoadPair(p.rope, static_cast<const T*>(p.q) + QueryOffset(p, tile, row), i % pairs,
             position > 0 ? position : 0, scale, shared.Query(row));
  }
}

// K, rotated, and V of `count` keys from `begin` on.
template <typename T>
CA_DEVICE void LoadKeys(const AttnParams& p, const AttnTile& tile, int begin, int count,
                        PlainShared shared) {
  const int pairs = shared.dim / 2;
  for (int i = ThreadIndex(); i < count * pairs; i += 32 * kWarps) {
    const int key = i / pairs, pair = i % pairs;
    const T* k = static_cast<const T*>(p.kv.data) + KeyOffset(p, tile, begin + key);
    const T* v = k + p.kv.kv_stride + 2 * pair;
    LoadPair(p.rope, k, pair, begin + key, 1.f, shared.Key(key));
    StoreShared<float>(shared.Value(key) + 2 * pair, LoadElement(v));
    StoreShared<float>(shared.Value(key) + 2 * pair + 1, LoadElement(v + 1));
  }
}

CA_DEVICE float WarpMax(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = Max(x, ShuffleXor(x, lanes));
  return x;
}
CA_DEVICE float WarpSum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += ShuffleXor(x, lanes);
  return x;
}

// The state of one row, in its warp: every lane has m and l, and of o dims 2 lane + 64 j and + 1.
struct RowState {
  float m = -Infinity(), l = 0.f;
  F2 o[kMaxDim / 64] = {};
};

CA_DEVICE float Dot(F4 x, F4 y, float sum) {
  return Fma(x.x, y.x, Fma(x.y, y.y, Fma(x.z, y.z, Fma(x.w, y.w, sum))));
}

// Turns the logits of a row (a key each lane) into weights, and shrinks its state to the new peak.
CA_DEVICE float Softmax(float logit, RowState* state) {
  const float peak = Max(state->m, WarpMax(logit));
  const float shift = peak == -Infinity() ? 0.f : peak;  // no key so far: all weights are 0
  const float weight = Exp2(logit - shift), keep = Exp2(state->m - shift);
  state->m = peak;
  state->l = state->l * keep + WarpSum(weight);
  CA_UNROLL
  for (int j = 0; j < kMaxDim / 64; ++j) {
    state->o[j] = {state->o[j].x * keep, state->o[j].y * keep};
  }
  return weight;
}

// Adds the keys at `begin`, of which `count` were loaded, to the states of the warp's rows.
CA_DEVICE void AttendKeys(const AttnLaunch& launch, const AttnTile& tile, int begin, int count,
                          PlainShared shared, RowState (&states)[kWarpRows]) {
  const int lane = LaneIndex(), warp = ThreadIndex() / 32;
  float s[kWarpRows] = {};
  for (int d = 0; lane < count && d < shared.dim; d += 4) {
    const F4 k = LoadShared<F4>(shared.Key(lane) + d);
    CA_UNROLL
    for (int i = 0; i < kWarpRows; ++i) {
      s[i] = Dot(LoadShared<F4>(shared.Query(warp * kWarpRows + i) + d), k, s[i]);
    }
  }
  CA_UNROLL
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = warp * kWarpRows + i;
    const Index3 limits = row < tile.num_rows ? KeyLimits(launch, tile, row) : Index3{0, 0, 0};
    if (launch.p.softcap > 0.f) s[i] = SoftCap(s[i], launch.p.softcap);
    if (begin + lane < limits.x || begin + lane >= limits.y) s[i] = -Infinity();
    s[i] = Softmax(s[i], &states[i]);
  }
  StoreShared<F4>(shared.Weights(warp, lane), {s[0], s[1], s[2], s[3]});
  SyncWarp();
  CA_UNROLL
  for (int j = 0; j < kMaxDim / 64; ++j) {
    const int d = 2 * lane + 64 * j;
    for (int k = 0; d < shared.dim && k < count; ++k) {
      const F4 w = LoadShared<F4>(shared.Weights(warp, k));
      const F2 v = LoadShared<F2>(shared.Value(k) + d);
      const float weights[kWarpRows] = {w.x, w.y, w.z, w.w};
      CA_UNROLL
      for (int i = 0; i < kWarpRows; ++i) {
        F2& o = states[i].o[j];
        o = {Fma(weights[i], v.x, o.x), Fma(weights[i], v.y, o.y)};
      }
    }
  }
}

// Writes the output of `row`, or the state of its split.
template <typename T>
CA_DEVICE void StoreRow(const AttnLaunch& launch, const AttnTile& tile, int row,
                        const RowState& state) {
  const AttnParams& p = launch.p;
  const int dim = p.kv.head_dim, head = tile.Head(row), item_row = tile.row_begin + row;
  const bool whole = tile.num_splits == 1;
  float* split = whole ? nullptr : SplitState(launch, tile, tile.split);
  float lse, scale = 1.f;
  if (whole) {
    scale = FinishState(p, head, state.m, state.l, &lse);
    if (LaneIndex() == 0) p.lse[tile.Token(row) * p.num_q_heads + head] = lse;
  } else if (LaneIndex() == 0) {
    split[int64_t{tile.item_rows} * dim + item_row] = state.m;
    split[int64_t{tile.item_rows} * (dim + 1) + item_row] = state.l;
  }
  T* out = static_cast<T*>(p.out) + tile.Token(row) * p.out_token_stride + int64_t{head} * dim;
  CA_UNROLL
  for (int j = 0; j < kMaxDim / 64; ++j) {
    const int d = 2 * LaneIndex() + 64 * j;
    if (d >= dim) break;
    if (whole) {
      StorePair(out + d, state.o[j].x * scale, state.o[j].y * scale);
    } else {
      StorePair(split + int64_t{item_row} * dim + d, state.o[j].x, state.o[j].y);
    }
  }
}

// Two blocks of 84 KB share a multiprocessor; so do the registers.
template <typename T>
CA_KERNEL(32 * kWarps, 2)
PlainKernel(CA_GRID_CONSTANT AttnLaunch launch) {
  const AttnTile tile = MakeTile(launch, kPlainRows);
  if (tile.num_rows == 0) return;
  const PlainShared shared = {launch.p.kv.head_dim};
  const int first_row = ThreadIndex() / 32 * kWarpRows;
  LoadQueries<T>(launch.p, tile, shared);
  RowState states[kWarpRows];
  for (int begin = tile.kv_begin; begin < tile.kv_end; begin += kKeys) {
    const int count = tile.kv_end - begin < kKeys ? tile.kv_end - begin : kKeys;
    SyncThreads();  // the previous keys are no longer needed
    LoadKeys<T>(launch.p, tile, begin, count, shared);
    SyncThreads();
    AttendKeys(launch, tile, begin, count, shared, states);
  }
  CA_UNROLL
  for (int i = 0; i < kWarpRows; ++i) {
    if (first_row + i < tile.num_rows) StoreRow<T>(launch, tile, first_row + i, states[i]);
  }
  if (tile.num_splits == 1) return;
  // No warp needs q any longer then: its place serves as the flag.
  if (IsLastSplit(launch, tile, reinterpret_cast<int*>(SharedMemory()))) {
    MergeSplits<T>(launch, tile, kWarps);
  }
}

template <typename T>
const char* LaunchElement(const AttnLaunch& launch, int num_items, void* stream) {
  const Index3 grid = {num_items, launch.p.kv.num_kv_heads * launch.row_blocks, 1};
  return Launch(PlainKernel<T>, grid, 32 * kWarps, PlainBytes(launch.p.kv.head_dim), stream,
                launch);
}

}  // namespace

const char* LaunchPlain(const AttnLaunch& launch, int num_items, void* stream) {
  switch (launch.p.kv.dtype) {
    case DType::kFloat32:
      return LaunchElement<float>(launch, num_items, stream);
    case DType::kBFloat16:
      return LaunchElement<Bf16>(launch, num_items, stream);
    case DType::kFloat16:
      return LaunchElement<Fp16>(launch, num_items, stream);
  }
  return "no such element type";
}

}  // namespace cachedattn::cuda
