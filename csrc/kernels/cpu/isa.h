// One table of functions per instruction set, chosen once (isa.cc). The drivers (attention.cc,
// cache_ops.cc) split the work and own the memory; the functions here do the arithmetic.
#pragma once

#include <cstdint>
#include <span>

#include "csrc/kernels/params.h"

namespace cachedattn {

// One KV head's share of a plan item. Rows are ordered r = token * G + g, so that the causal limit
// never falls from one row to the next.
struct AttnTask {
  int seq = 0, kv_head = 0;
  int row_begin = 0, num_tokens = 0;  // rows of the sequence
  int kv_begin = 0, kv_end = 0;       // kv_begin is a multiple of 64
};

// Unnormalised attention of R = num_tokens * G rows over some keys: o = sum of 2^(s - m) v,
// l = sum of 2^(s - m), with logits s in base 2. l = 0: no key, o is all 0.
struct AttnState {
  float* o = nullptr;  // [R, D]
  float* m = nullptr;  // [R]
  float* l = nullptr;  // [R]
};
static constexpr int64_t StateFloats(int64_t rows, int head_dim) { return rows * (head_dim + 2); }
static inline AttnState StateAt(float* base, int64_t rows, int head_dim) {
  return {base, base + rows * head_dim, base + rows * (head_dim + 1)};
}

struct CpuKernels {
  const char* name;
  // Floats of scratch that attend needs for `rows` rows. Scratch is 64-byte aligned.
  int64_t (*scratch_floats)(const AttnParams& params, int64_t rows);
  void (*attend)(const AttnParams& params, const AttnTask& task, const AttnState& state,
                 float* scratch);
  // Merges `num_splits` states, StateFloats apart, in order, and writes out and lse.
  void (*finish)(const AttnParams& params, const AttnTask& task, float* states, int num_splits);
  // Rotates tokens [begin, end) in place.
  void (*rope)(const RopeApplyParams& params, int64_t begin, int64_t end);
};

extern const CpuKernels kReferenceKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
// The tables that this machine can run, narrowest first.
std::span<const CpuKernels* const> SupportedCpuKernels();
const CpuKernels& ActiveCpuKernels();

// AttnPaged with the kernels of `kernels`.
void AttnPagedWith(const CpuKernels& kernels, const AttnParams& params, const Workers& workers);

}  // namespace cachedattn
