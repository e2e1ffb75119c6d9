// attn_plan (on CPU) and attn_paged: checks, outputs, parameters, call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "csrc/torch/checks.h"
#include "csrc/torch/cuda_call.h"

namespace cachedattn {
namespace {

const int32_t* Int32Data(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// cu_q [B + 1], kv_lens [B]. Returns B.
int CheckLengths(const Tensor& cu_q, const Tensor& kv_lens, const Device& device) {
  CheckContiguous(cu_q, "cu_q", 1, ScalarType::Int, device);
  CheckContiguous(kv_lens, "kv_lens", 1, ScalarType::Int, device);
  const int64_t num_seqs = kv_lens.size(0);
  STD_TORCH_CHECK(cu_q.size(0) == num_seqs + 1, "cu_q: must be [", num_seqs + 1, "] (kv_lens has ",
                  num_seqs, " sequences), is [", cu_q.size(0), "]");
  return static_cast<int>(num_seqs);
}

// cu_q goes from 0 without steps back, kv_lens are not negative.
void CheckLengthValues(const int32_t* cu_q, const int32_t* kv_lens, int num_seqs) {
  STD_TORCH_CHECK(cu_q[0] == 0, "cu_q: must begin with 0");
  for (int b = 0; b < num_seqs; ++b) {
    STD_TORCH_CHECK(cu_q[b + 1] >= cu_q[b], "cu_q: must not decrease, does at ", b + 1);
    STD_TORCH_CHECK(kv_lens[b] >= 0, "kv_lens: must not be negative, is ", kv_lens[b], " at ", b);
  }
}

Tensor AttnPlanOp(const Tensor& cu_q, const Tensor& kv_lens, int64_t num_q_heads,
                  int64_t num_kv_heads, int64_t block_size, int64_t workers) {
  const Device device(torch::headeronly::DeviceType::CPU);
  const int num_seqs = CheckLengths(cu_q, kv_lens, device);
  CheckLengthValues(Int32Data(cu_q), Int32Data(kv_lens), num_seqs);
  STD_TORCH_CHECK(num_kv_heads >= 1 && num_q_heads >= 1 && num_q_heads % num_kv_heads == 0,
                  "num_q_heads: must be a multiple of num_kv_heads, is ", num_q_heads, " over ",
                  num_kv_heads);
  STD_TORCH_CHECK(block_size == 16 || block_size == 32 || block_size == 64 || block_size == 128,
                  "block_size: must be 16, 32, 64 or 128, is ", block_size);
  STD_TORCH_CHECK(workers >= 1, "workers: must be at least 1, is ", workers);
  const std::vector<int32_t> words =
      MakeAttnPlan(Int32Data(cu_q), Int32Data(kv_lens), num_seqs,
                   static_cast<int>(num_q_heads / num_kv_heads), static_cast<int>(workers));
  Tensor plan = EmptyOn(device, {static_cast<int64_t>(words.size())}, ScalarType::Int);
  std::memcpy(plan.mutable_data_ptr(), words.data(), words.size() * sizeof(int32_t));
  return plan;
}

// Every block that some row reads must be in the table, in range, and within reach of the RoPE
// tables.
void CheckBlockTable(const AttnParams& p) {
  const int64_t reach = int64_t{p.rope.num_hi} * RopeTables::kLoRows;
  for (int b = 0; b < p.num_seqs; ++b) {
    if (p.cu_q[b + 1] == p.cu_q[b]) continue;
    const int64_t blocks = (int64_t{p.kv_lens[b]} + p.kv.block_size - 1) / p.kv.block_size;
    STD_TORCH_CHECK(blocks <= p.max_blocks, "kv_lens: ", p.kv_lens[b], " at ", b, " needs ", blocks,
                    " blocks, block_table has ", p.max_blocks);
    STD_TORCH_CHECK(p.rope.rotary_dim == 0 || p.kv_lens[b] <= reach, "kv_lens: ", p.kv_lens[b],
                    " at ", b, " is past ", reach, ", what rope_hi reaches");
    for (int64_t i = 0; i < blocks; ++i) {
      const int32_t slot = p.block_table[b * p.max_blocks + i];
      STD_TORCH_CHECK(slot >= 0 && slot < p.kv.num_slots, "block_table: slot ", slot, " at [", b,
                      ", ", i, "] is outside [0, ", p.kv.num_slots, ")");
    }
  }
}

// What only memory that the host reads allows: lengths, plan and block table against each other.
void CheckContents(const AttnParams& p, int64_t max_q_len) {
  CheckLengthValues(p.cu_q, p.kv_lens, p.num_seqs);
  STD_TORCH_CHECK(p.cu_q[p.num_seqs] == p.num_rows, "cu_q: must end with ", p.num_rows,
                  ", the rows of q, ends with ", p.cu_q[p.num_seqs]);
  STD_TORCH_CHECK(AttnPlanMatches(p.plan, p.plan_size, p.cu_q, p.kv_lens, p.num_seqs),
                  "plan: was not made by attn_plan for these cu_q and kv_lens");
  for (int b = 0; b < p.num_seqs; ++b) {
    STD_TORCH_CHECK(p.cu_q[b + 1] - p.cu_q[b] <= max_q_len, "max_q_len: is ", max_q_len,
                    ", sequence ", b, " has ", p.cu_q[b + 1] - p.cu_q[b], " rows");
  }
  CheckBlockTable(p);
}

void Run(const AttnParams& p, int64_t max_q_len, const Device& device) {
  if (device.is_cpu()) {
    CheckContents(p, max_q_len);
    AttnPaged(p, TorchWorkers());
  } else if constexpr (kHasCuda) {
    const int longest = static_cast<int>(std::min(max_q_len, p.num_rows));
    Tensor workspace = EmptyOn(device, {CudaAttnWorkspaceBytes(p)}, ScalarType::Byte);
    void* const memory = workspace.mutable_data_ptr();
    CallOnStream("attn_paged", device,
                 [&](void* stream) { return CudaAttnPaged(p, longest, memory, stream); });
  }
}

std::tuple<Tensor, Tensor> AttnPagedOp(const Tensor& q, const Tensor& kv, const Tensor& block_table,
                                       const Tensor& kv_lens, const Tensor& cu_q,
                                       const Tensor& plan, int64_t max_q_len,
                                       std::optional<Tensor> rope_lo, std::optional<Tensor> rope_hi,
                                       double sm_scale, bool interleaved, int64_t window,
                                       double softcap, std::optional<Tensor> sinks) {
  const Device device = q.device();
  AttnParams p;
  p.kv = ViewOfKv(kv, device);
  STD_TORCH_CHECK(q.dim() == 3, "q: must have 3 dimensions, has ", q.dim());
  CheckRows(q, "q", ScalarOf(p.kv.dtype), q.size(1), p.kv.head_dim, device);
  CheckContiguous(block_table, "block_table", 2, ScalarType::Int, device);
  CheckContiguous(plan, "plan", 1, ScalarType::Int, device);
  p.num_seqs = CheckLengths(cu_q, kv_lens, device);
  p.num_rows = q.size(0);
  p.num_q_heads = static_cast<int>(q.size(1));
  p.max_blocks = block_table.size(1);
  p.block_table = Int32Data(block_table);
  p.kv_lens = Int32Data(kv_lens);
  p.cu_q = Int32Data(cu_q);
  p.plan = Int32Data(plan);
  p.plan_size = plan.size(0);
  p.rope = RopeOf(rope_lo, rope_hi, interleaved, p.kv.head_dim, device);
  p.sm_scale = static_cast<float>(sm_scale);
  p.softcap = static_cast<float>(softcap);
  // Kernels subtract it from positions in 32 bits.
  p.window = static_cast<int>(std::min<int64_t>(window, INT32_MAX / 2));
  STD_TORCH_CHECK(p.num_q_heads >= 1 && p.num_q_heads % p.kv.num_kv_heads == 0, "q: its heads (",
                  p.num_q_heads, ") must be a multiple of kv's (", p.kv.num_kv_heads, ")");
  STD_TORCH_CHECK(block_table.size(0) == p.num_seqs, "block_table: must have ", p.num_seqs,
                  " rows, as kv_lens, has ", block_table.size(0));
  STD_TORCH_CHECK(sm_scale > 0., "sm_scale: must be positive, is ", sm_scale);
  STD_TORCH_CHECK(softcap >= 0., "softcap: must not be negative, is ", softcap);
  STD_TORCH_CHECK(window >= 0, "window: must not be negative, is ", window);
  STD_TORCH_CHECK(max_q_len >= 0, "max_q_len: must not be negative, is ", max_q_len);
  if (sinks.has_value()) {
    CheckContiguous(*sinks, "sinks", 1, ScalarType::Float, device);
    STD_TORCH_CHECK(sinks->size(0) == p.num_q_heads, "sinks: must be [", p.num_q_heads, "], is [",
                    sinks->size(0), "]");
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  Tensor out = EmptyOn(device, {p.num_rows, p.num_q_heads, p.kv.head_dim}, q.scalar_type());
  Tensor lse = EmptyOn(device, {p.num_rows, p.num_q_heads}, ScalarType::Float);
  p.q = q.const_data_ptr();
  p.q_token_stride = q.stride(0);
  p.out = out.mutable_data_ptr();
  p.out_token_stride = int64_t{p.num_q_heads} * p.kv.head_dim;
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  Run(p, max_q_len, device);
  return {out, lse};
}

}  // namespace
}  // namespace cachedattn

STABLE_TORCH_LIBRARY_IMPL(cachedattn, CPU, m) {
  m.impl("attn_plan", TORCH_BOX(&cachedattn::AttnPlanOp));
  m.impl("attn_paged", TORCH_BOX(&cachedattn::AttnPagedOp));
}
#ifdef CACHEDATTN_CUDA
STABLE_TORCH_LIBRARY_IMPL(cachedattn, CUDA, m) {
  m.impl("attn_paged", TORCH_BOX(&cachedattn::AttnPagedOp));
}
#endif
