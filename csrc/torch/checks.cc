#include "csrc/torch/checks.h"

#include <algorithm>
#include <string>

namespace cachedattn {
namespace {

const char* NameOf(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

std::string NameOf(const Device& device) {
  if (device.is_cpu()) return "the CPU";
  return device.is_cuda() ? "cuda:" + std::to_string(device.index()) : "another device";
}

void RunOnTorchThreads(int n, void (*fn)(void*, int), void* ctx) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(ctx, static_cast<int>(i));
  });
}

}  // namespace

void CheckTensor(const Tensor& tensor, const char* name, int64_t rank, ScalarType dtype,
                 const Device& device) {
  const Device own = tensor.device();
  STD_TORCH_CHECK(own.type() == device.type() && (own.is_cpu() || own.index() == device.index()),
                  name, ": must be on ", NameOf(device), ", is on ", NameOf(own));
  STD_TORCH_CHECK(tensor.dim() == rank, name, ": must have ", rank, " dimensions, has ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": must be ", NameOf(dtype), ", is ",
                  NameOf(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(rank - 1) <= 1 || tensor.stride(rank - 1) == 1,
                  name, ": the last dimension must be contiguous");
}

void CheckContiguous(const Tensor& tensor, const char* name, int64_t rank, ScalarType dtype,
                     const Device& device) {
  CheckTensor(tensor, name, rank, dtype, device);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
}

DType ElementOf(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      name, ": must be float32, bfloat16 or float16, is ", NameOf(dtype));
  return dtype == ScalarType::Float      ? DType::kFloat32
         : dtype == ScalarType::BFloat16 ? DType::kBFloat16
                                         : DType::kFloat16;
}

ScalarType ScalarOf(DType dtype) {
  return dtype == DType::kFloat32    ? ScalarType::Float
         : dtype == DType::kBFloat16 ? ScalarType::BFloat16
                                     : ScalarType::Half;
}

KvView ViewOfKv(const Tensor& kv, const Device& device) {
  const DType dtype = ElementOf(kv, "kv");
  CheckTensor(kv, "kv", 5, ScalarOf(dtype), device);
  const int64_t block = kv.size(3), dim = kv.size(4);
  STD_TORCH_CHECK(kv.size(1) == 2, "kv: dimension 1 must be 2 (K, V), is ", kv.size(1));
  STD_TORCH_CHECK(block == 16 || block == 32 || block == 64 || block == 128,
                  "kv: block size must be 16, 32, 64 or 128, is ", block);
  STD_TORCH_CHECK(dim >= 16 && dim <= 256 && dim % 16 == 0,
                  "kv: head_dim must be a multiple of 16 from 16 to 256, is ", dim);
  STD_TORCH_CHECK(kv.size(2) >= 1, "kv: needs at least one KV head");
  KvView view;
  view.data = kv.mutable_data_ptr();
  view.dtype = dtype;
  view.num_slots = kv.size(0);
  view.num_kv_heads = static_cast<int>(kv.size(2));
  view.block_size = static_cast<int>(block);
  view.head_dim = static_cast<int>(dim);
  view.slot_stride = kv.stride(0);
  view.kv_stride = kv.stride(1);
  view.head_stride = kv.stride(2);
  view.token_stride = kv.stride(3);
  STD_TORCH_CHECK(view.token_stride >= dim, "kv: tokens overlap");
  return view;
}

RopeTables RopeOf(const std::optional<Tensor>& rope_lo, const std::optional<Tensor>& rope_hi,
                  bool interleaved, int head_dim, const Device& device) {
  STD_TORCH_CHECK(rope_lo.has_value() == rope_hi.has_value(),
                  "rope_lo, rope_hi: give both or neither");
  RopeTables rope;
  if (!rope_lo.has_value()) return rope;
  CheckContiguous(*rope_lo, "rope_lo", 3, ScalarType::Float, device);
  CheckContiguous(*rope_hi, "rope_hi", 3, ScalarType::Float, device);
  const int64_t pairs = rope_lo->size(1);
  STD_TORCH_CHECK(rope_lo->size(0) == RopeTables::kLoRows && rope_lo->size(2) == 2,
                  "rope_lo: must be [256, rotary_dim / 2, 2]");
  STD_TORCH_CHECK(rope_hi->size(1) == pairs && rope_hi->size(2) == 2, "rope_hi: must be [n, ",
                  pairs, ", 2], as rope_lo");
  STD_TORCH_CHECK(2 * pairs <= head_dim, "rope_lo: rotary_dim ", 2 * pairs,
                  " is larger than head_dim ", head_dim);
  rope.lo = static_cast<const float*>(rope_lo->const_data_ptr());
  rope.hi = static_cast<const float*>(rope_hi->const_data_ptr());
  rope.num_hi = static_cast<int>(rope_hi->size(0));
  rope.rotary_dim = static_cast<int>(2 * pairs);
  rope.interleaved = interleaved;
  return rope;
}

void CheckRows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t heads,
               int64_t head_dim, const Device& device) {
  CheckTensor(tensor, name, 3, dtype, device);
  STD_TORCH_CHECK(tensor.size(1) == heads && tensor.size(2) == head_dim, name, ": must be [n, ",
                  heads, ", ", head_dim, "], is [n, ", tensor.size(1), ", ", tensor.size(2), "]");
  STD_TORCH_CHECK(tensor.numel() == 0 || heads == 1 || tensor.stride(1) == head_dim, name,
                  ": heads must lie head_dim apart");
}

Workers TorchWorkers() {
  return {static_cast<int>(torch::stable::get_num_threads()), RunOnTorchThreads};
}

Tensor EmptyOn(const Device& device, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, device);
}

}  // namespace cachedattn
