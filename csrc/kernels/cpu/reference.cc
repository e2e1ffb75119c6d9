// The portable kernels: plain loops, float32 sums. The oracle that the vectorised ones are held
// against, and what runs where no instruction set above x86-64 or another machine is found.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "csrc/kernels/cpu/isa.h"
#include "csrc/kernels/cpu/scalar.h"

namespace cachedattn {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

template <typename T>
void LoadRotated(const T* x, int head_dim, const RopeTables& rope, int64_t position, float* out) {
  for (int d = 0; d < head_dim; ++d) out[d] = ToFloat(x[d]);
  for (int pair = 0; pair < rope.rotary_dim / 2; ++pair) {
    float cosine, sine;
    PairAngle(rope, position, pair, &cosine, &sine);
    float& a = out[PairFirst(rope, pair)];
    float& b = out[PairSecond(rope, pair)];
    const float first = a, second = b;
    a = first * cosine - second * sine;
    b = second * cosine + first * sine;
  }
}

// Offset, in elements, of K of token `position` of sequence `seq`.
int64_t KeyOffset(const AttnParams& p, int seq, int kv_head, int64_t position) {
  const int64_t slot = p.block_table[seq * p.max_blocks + position / p.kv.block_size];
  return slot * p.kv.slot_stride + kv_head * p.kv.head_stride +
         (position % p.kv.block_size) * p.kv.token_stride;
}

int64_t ScratchFloats(const AttnParams& p, int64_t rows) {
  return (rows + 1) * p.kv.head_dim;  // rotated q rows, one rotated key
}

template <typename T>
void AttendRows(const AttnParams& p, const AttnTask& task, const AttnState& state, float* scratch) {
  const int group = p.num_q_heads / p.kv.num_kv_heads, dim = p.kv.head_dim;
  const int rows = task.num_tokens * group;
  const int q_len = p.cu_q[task.seq + 1] - p.cu_q[task.seq];
  const int64_t first_position = p.kv_lens[task.seq] - q_len + task.row_begin;
  const T* kv = static_cast<const T*>(p.kv.data);
  for (int r = 0; r < rows; ++r) {
    const int64_t token = p.cu_q[task.seq] + task.row_begin + r / group;
    const T* q = static_cast<const T*>(p.q) + token * p.q_token_stride +
                 (task.kv_head * group + r % group) * dim;
    LoadRotated(q, dim, p.rope, std::max<int64_t>(0, first_position + r / group),
                scratch + int64_t{r} * dim);
    state.m[r] = -kInfinity;
    state.l[r] = 0.f;
  }
  std::fill_n(state.o, int64_t{rows} * dim, 0.f);
  float* key = scratch + int64_t{rows} * dim;
  for (int64_t j = task.kv_begin; j < task.kv_end; ++j) {
    const int64_t offset = KeyOffset(p, task.seq, task.kv_head, j);
    const T* value = kv + offset + p.kv.kv_stride;
    LoadRotated(kv + offset, dim, p.rope, j, key);
    for (int r = 0; r < rows; ++r) {
      const int64_t position = first_position + r / group;
      if (j > position || (p.window > 0 && j + p.window <= position)) continue;
      const float* q = scratch + int64_t{r} * dim;
      float* o = state.o + int64_t{r} * dim;
      float logit = 0.f;
      for (int d = 0; d < dim; ++d) logit += q[d] * key[d];
      logit *= p.sm_scale;
      if (p.softcap > 0.f) logit = p.softcap * std::tanh(logit / p.softcap);
      logit *= kLog2E;
      const float peak = std::max(state.m[r], logit);
      const float keep = std::exp2(state.m[r] - peak), weight = std::exp2(logit - peak);
      state.m[r] = peak;
      state.l[r] = state.l[r] * keep + weight;
      for (int d = 0; d < dim; ++d) o[d] = o[d] * keep + weight * ToFloat(value[d]);
    }
  }
}

void Attend(const AttnParams& p, const AttnTask& task, const AttnState& state, float* scratch) {
  WithElement(p.kv.dtype, [&](auto* element) {
    AttendRows<std::remove_pointer_t<decltype(element)>>(p, task, state, scratch);
  });
}

template <typename T>
void FinishRow(const AttnParams& p, int64_t token, int head, const AttnState* states,
               int num_splits, int64_t row) {
  const int dim = p.kv.head_dim;
  T* out = static_cast<T*>(p.out) + token * p.out_token_stride + int64_t{head} * dim;
  float peak = -kInfinity;
  for (int s = 0; s < num_splits; ++s) peak = std::max(peak, states[s].m[row]);
  float* lse = p.lse + token * p.num_q_heads + head;
  if (peak == -kInfinity) {
    for (int d = 0; d < dim; ++d) FromFloat(0.f, out + d);
    *lse = -kInfinity;
    return;
  }
  if (p.sinks != nullptr) peak = std::max(peak, p.sinks[head] * kLog2E);
  float total = p.sinks != nullptr ? std::exp2(p.sinks[head] * kLog2E - peak) : 0.f;
  for (int s = 0; s < num_splits; ++s) {
    total += states[s].l[row] * std::exp2(states[s].m[row] - peak);
  }
  for (int d = 0; d < dim; ++d) {
    float sum = 0.f;
    for (int s = 0; s < num_splits; ++s) {
      sum += states[s].o[row * dim + d] * std::exp2(states[s].m[row] - peak);
    }
    FromFloat(sum / total, out + d);
  }
  *lse = (peak + std::log2(total)) / kLog2E;
}

void Finish(const AttnParams& p, const AttnTask& task, float* base, int num_splits) {
  const int group = p.num_q_heads / p.kv.num_kv_heads, dim = p.kv.head_dim;
  const int64_t rows = int64_t{task.num_tokens} * group;
  std::vector<AttnState> states;
  for (int s = 0; s < num_splits; ++s) {
    states.push_back(StateAt(base + s * StateFloats(rows, dim), rows, dim));
  }
  WithElement(p.kv.dtype, [&](auto* element) {
    for (int64_t r = 0; r < rows; ++r) {
      FinishRow<std::remove_pointer_t<decltype(element)>>(
          p, p.cu_q[task.seq] + task.row_begin + r / group,
          static_cast<int>(task.kv_head * group + r % group), states.data(), num_splits, r);
    }
  });
}

template <typename T>
void RotateTokens(const RopeApplyParams& p, int64_t begin, int64_t end) {
  const int num_pairs = p.rope.rotary_dim / 2;
  for (int64_t n = begin; n < end; ++n) {
    for (int pair = 0; pair < num_pairs; ++pair) {
      float cosine, sine;
      PairAngle(p.rope, p.positions[n], pair, &cosine, &sine);
      if (p.inverse) sine = -sine;
      for (int h = 0; h < p.num_heads; ++h) {
        T* x = static_cast<T*>(p.x) + n * p.token_stride + h * p.head_stride;
        T* first = x + PairFirst(p.rope, pair);
        T* second = x + PairSecond(p.rope, pair);
        const float a = ToFloat(*first), b = ToFloat(*second);
        FromFloat(a * cosine - b * sine, first);
        FromFloat(b * cosine + a * sine, second);
      }
    }
  }
}

void Rope(const RopeApplyParams& p, int64_t begin, int64_t end) {
  WithElement(p.dtype, [&](auto* element) {
    RotateTokens<std::remove_pointer_t<decltype(element)>>(p, begin, end);
  });
}

}  // namespace

const CpuKernels kReferenceKernels = {"reference", ScratchFloats, Attend, Finish, Rope};

}  // namespace cachedattn
