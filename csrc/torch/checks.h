// Argument checks shared by the ops. Every message names the argument as the schema does.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "csrc/kernels/params.h"

namespace cachedattn {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// Rank, dtype, that it is on `device`; an innermost stride of 1 unless the tensor is empty.
void CheckTensor(const Tensor& tensor, const char* name, int64_t rank, ScalarType dtype,
                 const Device& device);
// As CheckTensor, and no gaps: data[i] is element i.
void CheckContiguous(const Tensor& tensor, const char* name, int64_t rank, ScalarType dtype,
                     const Device& device);

// Element type of a K, V, q or o tensor; float32, bfloat16 or float16.
DType ElementOf(const Tensor& tensor, const char* name);
ScalarType ScalarOf(DType dtype);

// One layer of a pool [num_slots, 2, H, P, D]; checks P, D and that tokens do not overlap.
KvView ViewOfKv(const Tensor& kv, const Device& device);

// The two tables, checked against head_dim; rotary_dim 0 when both are absent.
RopeTables RopeOf(const std::optional<Tensor>& rope_lo, const std::optional<Tensor>& rope_hi,
                  bool interleaved, int head_dim, const Device& device);

// [rows, heads, head_dim] with heads head_dim apart (rows may have a gap).
void CheckRows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t heads,
               int64_t head_dim, const Device& device);

// torch's own thread pool, as many threads as torch.set_num_threads allows.
Workers TorchWorkers();

// A new tensor whose content is undefined.
Tensor EmptyOn(const Device& device, std::initializer_list<int64_t> shape, ScalarType dtype);

}  // namespace cachedattn
