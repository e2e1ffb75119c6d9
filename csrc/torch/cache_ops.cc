// rope_table (on CPU), rope_apply_, kv_append, merge_states, cpu_isa: checks, outputs, parameters,
// call.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "csrc/torch/checks.h"
#include "csrc/torch/cuda_call.h"

namespace cachedattn {
namespace {

Tensor RopeTableOp(const Tensor& inv_freq, int64_t n, int64_t stride) {
  const Device device(torch::headeronly::DeviceType::CPU);
  CheckContiguous(inv_freq, "inv_freq", 1, ScalarType::Double, device);
  STD_TORCH_CHECK(n >= 0, "n: must not be negative, is ", n);
  STD_TORCH_CHECK(stride >= 1, "stride: must be at least 1, is ", stride);
  const int64_t pairs = inv_freq.size(0);
  Tensor table = EmptyOn(device, {n, pairs, 2}, ScalarType::Float);
  RopeTable(static_cast<const double*>(inv_freq.const_data_ptr()), static_cast<int>(pairs), n,
            stride, static_cast<float*>(table.mutable_data_ptr()));
  return table;
}

void RopeApplyOp(Tensor x, const Tensor& positions, const Tensor& rope_lo, const Tensor& rope_hi,
                 bool interleaved, bool inverse) {
  const Device device = x.device();
  RopeApplyParams p;
  p.dtype = ElementOf(x, "x");
  CheckTensor(x, "x", 3, ScalarOf(p.dtype), device);
  CheckContiguous(positions, "positions", 1, ScalarType::Int, device);
  p.num_tokens = x.size(0);
  p.num_heads = static_cast<int>(x.size(1));
  p.head_dim = static_cast<int>(x.size(2));
  p.token_stride = x.stride(0);
  p.head_stride = x.stride(1);
  p.rope = RopeOf(rope_lo, rope_hi, interleaved, p.head_dim, device);
  p.inverse = inverse;
  STD_TORCH_CHECK(positions.size(0) == p.num_tokens, "positions: must be [", p.num_tokens,
                  "], is [", positions.size(0), "]");
  p.x = x.mutable_data_ptr();
  p.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  if (device.is_cpu()) {
    const int64_t limit = int64_t{p.rope.num_hi} * RopeTables::kLoRows;
    for (int64_t i = 0; i < p.num_tokens; ++i) {
      STD_TORCH_CHECK(p.positions[i] >= 0 && p.positions[i] < limit, "positions: ", p.positions[i],
                      " is outside [0, ", limit, "), what rope_hi reaches");
    }
    RopeApply(p, TorchWorkers());
  } else if constexpr (kHasCuda) {
    CallOnStream("rope_apply_", device, [&](void* stream) { return CudaRopeApply(p, stream); });
  }
}

void KvAppendOp(const Tensor& k, const Tensor& v, Tensor kv, const Tensor& slot_mapping) {
  const Device device = kv.device();
  KvAppendParams p;
  p.kv = ViewOfKv(kv, device);
  const ScalarType dtype = ScalarOf(p.kv.dtype);
  CheckRows(k, "k", dtype, p.kv.num_kv_heads, p.kv.head_dim, device);
  CheckRows(v, "v", dtype, p.kv.num_kv_heads, p.kv.head_dim, device);
  CheckContiguous(slot_mapping, "slot_mapping", 1, ScalarType::Long, device);
  p.num_tokens = k.size(0);
  STD_TORCH_CHECK(v.size(0) == p.num_tokens, "v: must have as many rows as k, ", p.num_tokens,
                  ", has ", v.size(0));
  STD_TORCH_CHECK(slot_mapping.size(0) == p.num_tokens, "slot_mapping: must be [", p.num_tokens,
                  "], is [", slot_mapping.size(0), "]");
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_token_stride = k.stride(0);
  p.v_token_stride = v.stride(0);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  if (device.is_cpu()) {
    const int64_t limit = p.kv.num_slots * p.kv.block_size;
    for (int64_t i = 0; i < p.num_tokens; ++i) {
      STD_TORCH_CHECK(p.slot_mapping[i] >= -1 && p.slot_mapping[i] < limit,
                      "slot_mapping: ", p.slot_mapping[i], " is outside [-1, ", limit,
                      "), kv's places");
    }
    KvAppend(p, TorchWorkers());
  } else if constexpr (kHasCuda) {
    CallOnStream("kv_append", device, [&](void* stream) { return CudaKvAppend(p, stream); });
  }
}

std::tuple<Tensor, Tensor> MergeStatesOp(const Tensor& o, const Tensor& lse) {
  const Device device = o.device();
  MergeParams p;
  p.dtype = ElementOf(o, "o");
  CheckContiguous(o, "o", 4, ScalarOf(p.dtype), device);
  CheckContiguous(lse, "lse", 3, ScalarType::Float, device);
  p.num_states = static_cast<int>(o.size(0));
  p.num_rows = o.size(1);
  p.num_heads = static_cast<int>(o.size(2));
  p.head_dim = static_cast<int>(o.size(3));
  STD_TORCH_CHECK(p.num_states >= 1 && p.head_dim >= 1, "o: needs at least one state and dim");
  STD_TORCH_CHECK(
      lse.size(0) == p.num_states && lse.size(1) == p.num_rows && lse.size(2) == p.num_heads,
      "lse: must be [", p.num_states, ", ", p.num_rows, ", ", p.num_heads,
      "], as o without head_dim");
  Tensor out = EmptyOn(device, {p.num_rows, p.num_heads, p.head_dim}, o.scalar_type());
  Tensor out_lse = EmptyOn(device, {p.num_rows, p.num_heads}, ScalarType::Float);
  p.o = o.const_data_ptr();
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.lse_out = static_cast<float*>(out_lse.mutable_data_ptr());
  if (device.is_cpu()) {
    MergeStates(p, TorchWorkers());
  } else if constexpr (kHasCuda) {
    CallOnStream("merge_states", device, [&](void* stream) { return CudaMergeStates(p, stream); });
  }
  return {out, out_lse};
}

std::string CpuIsaOp() { return CpuIsaName(); }

}  // namespace
}  // namespace cachedattn

STABLE_TORCH_LIBRARY_IMPL(cachedattn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cachedattn::CpuIsaOp));
}

STABLE_TORCH_LIBRARY_IMPL(cachedattn, CPU, m) {
  m.impl("rope_table", TORCH_BOX(&cachedattn::RopeTableOp));
  m.impl("rope_apply_", TORCH_BOX(&cachedattn::RopeApplyOp));
  m.impl("kv_append", TORCH_BOX(&cachedattn::KvAppendOp));
  m.impl("merge_states", TORCH_BOX(&cachedattn::MergeStatesOp));
}
#ifdef CACHEDATTN_CUDA
STABLE_TORCH_LIBRARY_IMPL(cachedattn, CUDA, m) {
  m.impl("rope_apply_", TORCH_BOX(&cachedattn::RopeApplyOp));
  m.impl("kv_append", TORCH_BOX(&cachedattn::KvAppendOp));
  m.impl("merge_states", TORCH_BOX(&cachedattn::MergeStatesOp));
}
#endif
