// The contract between ops and kernels: plain structs, raw pointers, shapes beside them.
//
// Sizes: Tq query rows in all, B sequences, Hq query heads, H KV heads, G = Hq / H, D head_dim,
// P tokens in a block, r rotary dims (even, <= D). K is stored before RoPE; a kernel rotates it
// as it reads. A block's base position is P times its index in the block table (design D2, D4).
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/base/types.h"

namespace cachedattn {

// cos and sin of position p are rows of two tables: angle(p) = angle(hi row p / 256) + angle(lo
// row p % 256). Rows are [r / 2][2] (cos, sin), float32, computed in float64.
struct RopeTables {
  static constexpr int kLoRows = 256;
  const float* lo = nullptr;  // [256, r / 2, 2]
  const float* hi = nullptr;  // [num_hi, r / 2, 2], row i = position 256 * i
  int num_hi = 0;
  int rotary_dim = 0;        // r; 0: no rotation
  bool interleaved = false;  // pairs (2i, 2i + 1) instead of (i, i + r / 2)
};

// One layer of a slot pool, seen as [num_slots, 2, H, P, D] with strides in elements.
struct KvView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t num_slots = 0;
  int num_kv_heads = 0, block_size = 0, head_dim = 0;
  int64_t slot_stride = 0;                    // from slot to slot
  int64_t kv_stride = 0;                      // from K to V
  int64_t head_stride = 0, token_stride = 0;  // innermost stride is 1
};

struct RopeApplyParams {
  void* x = nullptr;  // [N, H, D], rotated in place
  DType dtype = DType::kFloat32;
  int64_t num_tokens = 0;
  int num_heads = 0, head_dim = 0;
  int64_t token_stride = 0, head_stride = 0;
  const int32_t* positions = nullptr;  // [N]
  RopeTables rope;
  bool inverse = false;
};

struct KvAppendParams {
  const void* k = nullptr;  // [N, H, D], before RoPE
  const void* v = nullptr;  // [N, H, D]
  int64_t num_tokens = 0;
  int64_t k_token_stride = 0, v_token_stride = 0;  // elements; heads are D apart
  const int64_t* slot_mapping = nullptr;           // [N] slot * P + offset; -1: skip
  KvView kv;
};

struct AttnParams {
  const void* q = nullptr;  // [Tq, Hq, D], before RoPE; same dtype as kv
  void* out = nullptr;      // [Tq, Hq, D]
  float* lse = nullptr;     // [Tq, Hq], natural log; -inf for rows that attend to nothing
  int64_t num_rows = 0;     // Tq
  int num_seqs = 0, num_q_heads = 0;
  int64_t q_token_stride = 0, out_token_stride = 0;  // elements; heads are D apart
  const int32_t* block_table = nullptr;              // [B, max_blocks], -1 past the end
  int64_t max_blocks = 0;
  const int32_t* kv_lens = nullptr;  // [B] tokens in the context, this step's included
  const int32_t* cu_q = nullptr;     // [B + 1] first row of each sequence
  const int32_t* plan = nullptr;     // opaque, from attn_plan
  int64_t plan_size = 0;
  KvView kv;
  RopeTables rope;
  float sm_scale = 1.f;
  float softcap = 0.f;           // 0: none
  int window = 0;                // attend to the last `window` tokens; 0: to all
  const float* sinks = nullptr;  // [Hq] logits that join the denominator; nullptr: none
};

struct MergeParams {
  const void* o = nullptr;  // [S, N, H, D]
  DType dtype = DType::kFloat32;
  const float* lse = nullptr;  // [S, N, H]
  void* out = nullptr;         // [N, H, D]
  float* lse_out = nullptr;    // [N, H]
  int num_states = 0, num_heads = 0, head_dim = 0;
  int64_t num_rows = 0;
};

// Sums of the 4 KiB leaves of layer slices (csrc/base/slice_sum.h). All slices are `size` bytes, in
// rows of `row_bytes`; what follows the first used_bytes[i] of each row is taken for zero.
struct LeafSumsParams {
  static constexpr int kMaxSlices = 128;
  const void* slices[kMaxSlices] = {};  // multiples of 8, as all the sizes are
  uint64_t* sums[kMaxSlices] = {};      // of each slice, a sum a leaf
  uint32_t used_bytes[kMaxSlices] = {};
  int num_slices = 0;
  uint32_t size = 0, row_bytes = 0;
  uint64_t secret[24] = {}, secret_last[8] = {}, secret_end[8] = {};  // LeafSecret
};

// The caller's thread pool: run calls fn(ctx, i) for i in [0, n) and returns when all are done.
// num_threads is a hint for n; results never depend on it.
struct Workers {
  int num_threads = 1;
  void (*run)(int n, void (*fn)(void* ctx, int i), void* ctx) = nullptr;
};

// Entry points, CPU. Arguments were checked by the caller (csrc/torch/ops.cc): ids are in range,
// shapes agree, tables reach as far as the positions.

// out: [n, num_pairs, 2], cos and sin of i * stride * inv_freq, computed in float64.
CA_API void RopeTable(const double* inv_freq, int num_pairs, int64_t n, int64_t stride, float* out);
CA_API void RopeApply(const RopeApplyParams& params, const Workers& workers);
CA_API void KvAppend(const KvAppendParams& params, const Workers& workers);
// The plan of an AttnPaged call (attn_plan.h), for every device. cu_q [num_seqs + 1], kv_lens
// [num_seqs]; group = Hq / H.
CA_API std::vector<int32_t> MakeAttnPlan(const int32_t* cu_q, const int32_t* kv_lens, int num_seqs,
                                         int group, int workers);

// True if `plan` was made for exactly these lengths and is intact.
CA_API bool AttnPlanMatches(const int32_t* plan, int64_t plan_size, const int32_t* cu_q,
                            const int32_t* kv_lens, int num_seqs);

CA_API void AttnPaged(const AttnParams& params, const Workers& workers);
CA_API void MergeStates(const MergeParams& params, const Workers& workers);

// Name of the instruction set in use: "reference", "avx2", "avx512" or "avx512_bf16". The fastest
// that this machine has, or what CACHEDATTN_CPU_ISA asks for.
CA_API const char* CpuIsaName();

// Entry points, CUDA (csrc/kernels/cuda/). Every pointer in the params is device memory, the plan
// too; `stream` is a cudaStream_t. They enqueue and return, never wait, allocate nothing and may be
// captured in a CUDA graph. Contents of device memory (ids, lengths, the plan) cannot be checked:
// the caller vouches for them. Return nullptr, or what went wrong at launch.

CA_API const char* CudaRopeApply(const RopeApplyParams& params, void* stream);
CA_API const char* CudaKvAppend(const KvAppendParams& params, void* stream);
CA_API const char* CudaMergeStates(const MergeParams& params, void* stream);
const char* CudaLeafSums(const LeafSumsParams& params, void* stream);
// Bytes of device memory that CudaAttnPaged needs beside its params (contents undefined), for these
// shapes; max_blocks and the strides do not matter.
CA_API int64_t CudaAttnWorkspaceBytes(const AttnParams& params);
// max_q_len: no sequence has more query rows. `workspace` is aligned to 256 bytes.
CA_API const char* CudaAttnPaged(const AttnParams& params, int max_q_len, void* workspace,
                                 void* stream);

}  // namespace cachedattn
