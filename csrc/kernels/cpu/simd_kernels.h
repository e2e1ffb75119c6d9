// The function table of one instruction set. A translation unit includes this with
//   CA_SIMD_HEADER   the header that defines Simd
//   CA_SIMD_NAME     the name users know
//   CA_SIMD_TABLE    the table's identifier
//   CA_SIMD_NARROWER the table that serves what needs narrower vectors
// Everything but the table has internal linkage, and no standard header with inline functions is
// used: the linker must never pick code built for this instruction set for portable callers.
#pragma once

#include <immintrin.h>

#include "csrc/kernels/cpu/isa.h"

namespace cachedattn {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

constexpr int kKeyTile = 64;

// Each builds on those before it.
#include CA_SIMD_HEADER

#include "csrc/kernels/cpu/simd_gemm.h"
#include "csrc/kernels/cpu/simd_rope.h"
#include "csrc/kernels/cpu/simd_softmax.h"
#ifdef __AVX512BF16__
#include "csrc/kernels/cpu/simd_pairs.h"
#endif

#include "csrc/kernels/cpu/simd_task.h"

#include "csrc/kernels/cpu/simd_decode.h"
#include "csrc/kernels/cpu/simd_extend.h"

// Shorter rows are left to narrower vectors.
bool Serves(int head_dim) { return head_dim >= 2 * Simd::kLanes && head_dim <= 256; }

int64_t Scratch(const AttnParams& p, int64_t rows) {
  const int64_t dim = p.kv.head_dim;
  if (!Serves(p.kv.head_dim)) return CA_SIMD_NARROWER.scratch_floats(p, rows);
  const int64_t floats =
      rows > kMaxDecodeRows ? ExtendScratchFloats(rows, dim) : DecodeScratchFloats(rows, dim);
  return (floats + 15) / 16 * 16;  // the state behind it begins on a cache line too
}

template <typename T>
void AttendRows(const AttnParams& p, const AttnTask& task, const AttnState& state, float* scratch) {
  const TaskView<T> t(p, task);
  if (t.rows > kMaxDecodeRows) return Extend(t, state, scratch);
  return Decode(t, state, scratch);
}

void Attend(const AttnParams& p, const AttnTask& task, const AttnState& state, float* scratch) {
  if (!Serves(p.kv.head_dim)) return CA_SIMD_NARROWER.attend(p, task, state, scratch);
  switch (p.kv.dtype) {
    case DType::kFloat32:
      return AttendRows<float>(p, task, state, scratch);
    case DType::kBFloat16:
      return AttendRows<Bf16>(p, task, state, scratch);
    case DType::kFloat16:
      return AttendRows<Fp16>(p, task, state, scratch);
  }
}

// Merges the states of one row, in split order.
template <typename T>
void FinishRow(const AttnParams& p, int64_t token, int head, float* states, int num_splits,
               int64_t rows, int64_t row) {
  constexpr float kLog2E = 1.44269504088896340736f;
  const int64_t dim = p.kv.head_dim, stride = StateFloats(rows, p.kv.head_dim);
  const float* o = states + row * dim;
  float *m = states + rows * dim + row, *l = m + rows;
  T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * dim;
  float* lse = p.lse + token * p.num_q_heads + head;
  float peak = -__builtin_inff();
  for (int s = 0; s < num_splits; ++s) peak = m[s * stride] > peak ? m[s * stride] : peak;
  if (peak == -__builtin_inff()) {
    for (int64_t i = 0; i < dim; i += Simd::kLanes) Simd::Store(Simd::Zero(), out + i);
    *lse = peak;
    return;
  }
  float total = 0.f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E;
    peak = sink > peak ? sink : peak;
    total = __builtin_exp2f(sink - peak);
  }
  for (int s = 0; s < num_splits; ++s) {
    m[s * stride] = __builtin_exp2f(m[s * stride] - peak);  // from here on the split's weight
    total += l[s * stride] * m[s * stride];
  }
  const Simd::F inverse = Simd::Set(1.f / total);
  for (int64_t i = 0; i < dim; i += Simd::kLanes) {
    Simd::F sum = Simd::Zero();
    for (int s = 0; s < num_splits; ++s) {
      sum = Simd::Fma(Simd::Load(o + s * stride + i), Simd::Set(m[s * stride]), sum);
    }
    Simd::Store(Simd::Mul(sum, inverse), out + i);
  }
  *lse = (peak + __builtin_log2f(total)) / kLog2E;
}

template <typename T>
void FinishRows(const AttnParams& p, const AttnTask& task, float* states, int num_splits) {
  const int group = p.num_q_heads / p.kv.num_kv_heads;
  const int64_t rows = int64_t{task.num_tokens} * group;
  for (int64_t r = 0; r < rows; ++r) {
    FinishRow<T>(p, p.cu_q[task.seq] + task.row_begin + r / group,
                 static_cast<int>(task.kv_head * group + r % group), states, num_splits, rows, r);
  }
}

void Finish(const AttnParams& p, const AttnTask& task, float* states, int num_splits) {
  switch (p.kv.dtype) {
    case DType::kFloat32:
      return FinishRows<float>(p, task, states, num_splits);
    case DType::kBFloat16:
      return FinishRows<Bf16>(p, task, states, num_splits);
    case DType::kFloat16:
      return FinishRows<Fp16>(p, task, states, num_splits);
  }
}

void Rope(const RopeApplyParams& p, int64_t begin, int64_t end) {
  if (!Serves(p.head_dim)) return CA_SIMD_NARROWER.rope(p, begin, end);
  switch (p.dtype) {
    case DType::kFloat32:
      return RotateTokens<float>(p, begin, end);
    case DType::kBFloat16:
      return RotateTokens<Bf16>(p, begin, end);
    case DType::kFloat16:
      return RotateTokens<Fp16>(p, begin, end);
  }
}

}  // namespace

const CpuKernels CA_SIMD_TABLE = {CA_SIMD_NAME, Scratch, Attend, Finish, Rope};

}  // namespace cachedattn
