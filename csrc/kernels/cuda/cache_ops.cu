// The ops around attention on CUDA: cache writes, rotation in place, merging of states.
//
// Each is bound by memory. A block takes one token of the first two; offsets within a token fit 32
// bits, offsets of tokens do not.
#include <cassert>
#include <type_traits>

#include "csrc/kernels/cuda/attn_tile.h"
#include "csrc/kernels/cuda/launch.h"

namespace cachedattn {
namespace cuda {
namespace {

// K and V of a token with 8 heads of 128 dims in 16 bits are 128 vectors of 16 bytes each.
constexpr int kThreads = 128;

// ---- elements ----

// kCount elements as one vector, of 16 bytes at most.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Elements {
  T values[kCount];
};

CA_DEVICE float ToFloat(float value) { return value; }
template <typename T>
CA_DEVICE float ToFloat(T value) {
  return UnpackPair<T>(value.bits).x;
}
template <typename T>
CA_DEVICE T FromFloat(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return {static_cast<uint16_t>(PackPair<T>(value, 0.f))};
  }
}

// Reads or writes kCount elements at `p`, which is aligned to all of them together.
template <int kCount, typename T>
CA_DEVICE void LoadElements(const T* p, float* values) {
  const auto vector = *reinterpret_cast<const Elements<T, kCount>*>(p);
  CA_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = ToFloat(vector.values[i]);
}
template <int kCount, typename T>
CA_DEVICE void StoreElements(T* p, const float* values) {
  Elements<T, kCount> vector;
  CA_UNROLL
  for (int i = 0; i < kCount; ++i) vector.values[i] = FromFloat<T>(values[i]);
  *reinterpret_cast<Elements<T, kCount>*>(p) = vector;
}

bool IsAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- kv_append ----

// Vectors V are 16 bytes, or 2 where something is not aligned. A thread has its loads of K and of V
// under way together.
template <typename V>
CA_KERNEL(kThreads, 1)
KvAppendKernel(KvAppendParams p) {
  const int64_t token = BlockIndex().x;
  const int64_t place = p.slot_mapping[token];
  if (place < 0) return;
  assert(place < p.kv.num_slots * p.kv.block_size);
  const int64_t slot = place / p.kv.block_size, offset = place % p.kv.block_size;
  const int size = p.kv.dtype == DType::kFloat32 ? 4 : 2;
  const int row_vectors = p.kv.head_dim * size / static_cast<int>(sizeof(V));
  const char* k = static_cast<const char*>(p.k) + token * p.k_token_stride * size;
  const char* v = static_cast<const char*>(p.v) + token * p.v_token_stride * size;
  char* to =
      static_cast<char*>(p.kv.data) + (slot * p.kv.slot_stride + offset * p.kv.token_stride) * size;
  for (int i = ThreadIndex(); i < p.kv.num_kv_heads * row_vectors; i += kThreads) {
    const int head = i / row_vectors, column = i % row_vectors;
    const V k_vector = reinterpret_cast<const V*>(k)[i],
            v_vector = reinterpret_cast<const V*>(v)[i];
    V* row = reinterpret_cast<V*>(to + head * p.kv.head_stride * size) + column;
    *row = k_vector;
    *reinterpret_cast<V*>(reinterpret_cast<char*>(row) + p.kv.kv_stride * size) = v_vector;
  }
}

// ---- rope_apply_ ----

// The angles of kPairs pairs from `pair` on.
template <int kPairs>
CA_DEVICE void PairAngles(const RopeApplyParams& p, int pair, int position, F2 (&angles)[kPairs]) {
  CA_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    angles[i] = PairAngle(p.rope, pair + i, position);
    if (p.inverse) angles[i].y = -angles[i].y;
  }
}

// Rotates kPairs pairs of a head's `row`, from `pair` on.
template <int kPairs, typename T>
CA_DEVICE void RotatePairs(const RopeTables& rope, T* row, int pair, const F2 (&angles)[kPairs]) {
  // Two vectors: of pairs side by side, or of first and of second elements.
  T* const lower = row + PairFirst(rope, pair);
  T* const upper = rope.interleaved ? lower + kPairs : row + PairSecond(rope, pair);
  float x[2 * kPairs];
  LoadElements<kPairs>(lower, x);
  LoadElements<kPairs>(upper, x + kPairs);
  CA_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    if (rope.interleaved) {
      const F2 rotated = Rotate({x[2 * i], x[2 * i + 1]}, angles[i]);
      x[2 * i] = rotated.x, x[2 * i + 1] = rotated.y;
    } else {
      const F2 rotated = Rotate({x[i], x[i + kPairs]}, angles[i]);
      x[i] = rotated.x, x[i + kPairs] = rotated.y;
    }
  }
  StoreElements<kPairs>(lower, x);
  StoreElements<kPairs>(upper, x + kPairs);
}

// kPairs is 1, or 4 where r / 2 is a multiple of 4 and rows are aligned to 16 bytes. A
// thread keeps to its pairs and goes from head to head, so that it makes their angles once.
template <typename T, int kPairs>
CA_KERNEL(kThreads, 1)
RopeApplyKernel(RopeApplyParams p) {
  const int64_t token = BlockIndex().x;
  const int position = p.positions[token];
  assert(position >= 0 && position < p.rope.num_hi * RopeTables::kLoRows);
  T* x = static_cast<T*>(p.x) + token * p.token_stride;
  const int half = p.rope.rotary_dim / 2;
  const int threads_a_head = half / kPairs < kThreads ? half / kPairs : kThreads;
  const int heads_at_once = kThreads / threads_a_head;
  const int first_head = ThreadIndex() / threads_a_head;
  if (first_head >= heads_at_once) return;  // left over
  for (int pair = ThreadIndex() % threads_a_head * kPairs; pair < half;
       pair += threads_a_head * kPairs) {
    F2 angles[kPairs];
    PairAngles(p, pair, position, angles);
    for (int head = first_head; head < p.num_heads; head += heads_at_once) {
      RotatePairs(p.rope, x + head * p.head_stride, pair, angles);
    }
  }
}

// ---- merge_states ----

// A thread merges kCount dims of one row, states in order; kCount is 1, or 4 where the rows allow
// it. Threads of a row make the same weights: few states, and no exchange.
template <typename T, int kCount>
CA_KERNEL(kThreads, 1)
MergeStatesKernel(MergeParams p) {
  const int64_t rows = p.num_rows * p.num_heads;
  const int chunks = p.head_dim / kCount;
  const int64_t index = int64_t{BlockIndex().x} * kThreads + ThreadIndex();
  const int64_t row = index / chunks;
  const int chunk = static_cast<int>(index % chunks);
  if (row >= rows) return;
  const float* lse = p.lse + row;
  float peak = -Infinity(), total = 0.f;
  for (int s = 0; s < p.num_states; ++s) peak = Max(peak, lse[s * rows]);
  float sum[kCount] = {};
  for (int s = 0; s < p.num_states && peak > -Infinity(); ++s) {
    const float weight = Exp2((lse[s * rows] - peak) * kLog2E);
    if (weight == 0.f) continue;  // a state without keys may hold anything
    total += weight;
    float values[kCount];
    LoadElements<kCount>(
        static_cast<const T*>(p.o) + (s * rows + row) * p.head_dim + chunk * kCount, values);
    CA_UNROLL
    for (int i = 0; i < kCount; ++i) sum[i] = Fma(weight, values[i], sum[i]);
  }
  const float scale = total > 0.f ? 1.f / total : 0.f;
  CA_UNROLL
  for (int i = 0; i < kCount; ++i) sum[i] *= scale;
  StoreElements<kCount>(static_cast<T*>(p.out) + row * p.head_dim + chunk * kCount, sum);
  if (chunk == 0) p.lse_out[row] = total > 0.f ? peak + Log2(total) / kLog2E : -Infinity();
}

// ---- starting them ----

template <typename T>
const char* StartRope(const RopeApplyParams& p, void* stream) {
  constexpr int kVector = 16 / sizeof(T);  // elements
  const bool vectors = IsAligned(p.x) && p.rope.rotary_dim % 8 == 0 &&
                       p.token_stride % kVector == 0 && p.head_stride % kVector == 0;
  return Launch(vectors ? RopeApplyKernel<T, 4> : RopeApplyKernel<T, 1>,
                {static_cast<int>(p.num_tokens), 1, 1}, kThreads, 0, stream, p);
}

template <typename T>
const char* StartMerge(const MergeParams& p, void* stream) {
  const bool vectors = IsAligned(p.o) && IsAligned(p.out) && p.head_dim % 4 == 0;
  const int64_t threads = p.num_rows * p.num_heads * (vectors ? p.head_dim / 4 : p.head_dim);
  return Launch(vectors ? MergeStatesKernel<T, 4> : MergeStatesKernel<T, 1>,
                {static_cast<int>((threads + kThreads - 1) / kThreads), 1, 1}, kThreads, 0, stream,
                p);
}

}  // namespace
}  // namespace cuda

const char* CudaKvAppend(const KvAppendParams& p, void* stream) {
  if (p.num_tokens == 0) return nullptr;
  const int64_t vector = 16 / SizeOf(p.kv.dtype);  // elements; head_dim is a multiple of it
  bool vectors = cuda::IsAligned(p.k) && cuda::IsAligned(p.v) && cuda::IsAligned(p.kv.data);
  for (const int64_t stride : {p.k_token_stride, p.v_token_stride, p.kv.slot_stride, p.kv.kv_stride,
                               p.kv.head_stride, p.kv.token_stride}) {
    vectors = vectors && stride % vector == 0;
  }
  return cuda::Launch(vectors ? cuda::KvAppendKernel<cuda::U4> : cuda::KvAppendKernel<uint16_t>,
                      {static_cast<int>(p.num_tokens), 1, 1}, cuda::kThreads, 0, stream, p);
}

const char* CudaRopeApply(const RopeApplyParams& p, void* stream) {
  if (p.num_tokens == 0 || p.num_heads == 0 || p.rope.rotary_dim == 0) return nullptr;
  switch (p.dtype) {
    case DType::kFloat32:
      return cuda::StartRope<float>(p, stream);
    case DType::kBFloat16:
      return cuda::StartRope<cuda::Bf16>(p, stream);
    default:
      return cuda::StartRope<cuda::Fp16>(p, stream);
  }
}

const char* CudaMergeStates(const MergeParams& p, void* stream) {
  if (p.num_rows * p.num_heads == 0) return nullptr;
  switch (p.dtype) {
    case DType::kFloat32:
      return cuda::StartMerge<float>(p, stream);
    case DType::kBFloat16:
      return cuda::StartMerge<cuda::Bf16>(p, stream);
    default:
      return cuda::StartMerge<cuda::Fp16>(p, stream);
  }
}

}  // namespace cachedattn
