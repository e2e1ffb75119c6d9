// The ops around attention: RoPE tables, rotation in place, cache writes, merging of states.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "csrc/kernels/cpu/isa.h"
#include "csrc/kernels/cpu/scalar.h"

namespace cachedattn {
namespace {

// Runs body(begin, end) over [0, n) in equal chunks, on one worker per `grain` of them at most.
template <typename Body>
void Chunks(const Workers& workers, int64_t n, int64_t grain, const Body& body) {
  const int parts =
      static_cast<int>(std::min<int64_t>(workers.num_threads, std::max<int64_t>(1, n / grain)));
  if (parts <= 1) return body(int64_t{0}, n);
  struct Context {
    const Body& body;
    int64_t n;
    int parts;
  } context{body, n, parts};
  workers.run(
      parts,
      [](void* ctx, int i) {
        const Context& c = *static_cast<Context*>(ctx);
        c.body(c.n * i / c.parts, c.n * (i + 1) / c.parts);
      },
      &context);
}

// Elements that are worth waking another thread for (about 10 us of work).
constexpr int64_t kGrainElements = 1 << 16;

template <typename T>
void MergeRow(const MergeParams& p, int64_t row) {
  const int64_t rows = p.num_rows * p.num_heads, dim = p.head_dim;
  float peak = -std::numeric_limits<float>::infinity();
  for (int s = 0; s < p.num_states; ++s) peak = std::max(peak, p.lse[s * rows + row]);
  T* out = static_cast<T*>(p.out) + row * dim;
  if (std::isinf(peak) && peak < 0) {
    for (int64_t d = 0; d < dim; ++d) FromFloat(0.f, out + d);
    p.lse_out[row] = peak;
    return;
  }
  double total = 0;
  for (int s = 0; s < p.num_states; ++s) total += std::exp(double{p.lse[s * rows + row]} - peak);
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (int s = 0; s < p.num_states; ++s) {
      const double weight = std::exp(double{p.lse[s * rows + row]} - peak);
      // A state without keys may hold anything.
      if (weight > 0)
        sum += weight * ToFloat(static_cast<const T*>(p.o)[(s * rows + row) * dim + d]);
    }
    FromFloat(static_cast<float>(sum / total), out + d);
  }
  p.lse_out[row] = static_cast<float>(peak + std::log(total));
}

}  // namespace

void RopeTable(const double* inv_freq, int num_pairs, int64_t n, int64_t stride, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int pair = 0; pair < num_pairs; ++pair) {
      const double angle = static_cast<double>(i * stride) * inv_freq[pair];
      *out++ = static_cast<float>(std::cos(angle));
      *out++ = static_cast<float>(std::sin(angle));
    }
  }
}

void RopeApply(const RopeApplyParams& p, const Workers& workers) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (int64_t{p.num_heads} * p.head_dim));
  Chunks(workers, p.num_tokens, grain,
         [&](int64_t begin, int64_t end) { ActiveCpuKernels().rope(p, begin, end); });
}

void KvAppend(const KvAppendParams& p, const Workers& workers) {
  const int64_t size = SizeOf(p.kv.dtype), row_bytes = p.kv.head_dim * size;
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / (int64_t{p.kv.num_kv_heads} * p.kv.head_dim));
  Chunks(workers, p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (p.slot_mapping[n] < 0) continue;
      const int64_t slot = p.slot_mapping[n] / p.kv.block_size;
      const int64_t offset = p.slot_mapping[n] % p.kv.block_size;
      char* place = static_cast<char*>(p.kv.data) +
                    (slot * p.kv.slot_stride + offset * p.kv.token_stride) * size;
      const char* k = static_cast<const char*>(p.k) + n * p.k_token_stride * size;
      const char* v = static_cast<const char*>(p.v) + n * p.v_token_stride * size;
      for (int h = 0; h < p.kv.num_kv_heads; ++h) {
        char* head = place + h * p.kv.head_stride * size;
        std::memcpy(head, k + h * row_bytes, row_bytes);
        std::memcpy(head + p.kv.kv_stride * size, v + h * row_bytes, row_bytes);
      }
    }
  });
}

void MergeStates(const MergeParams& p, const Workers& workers) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (int64_t{p.head_dim} * p.num_states));
  Chunks(workers, p.num_rows * p.num_heads, grain, [&](int64_t begin, int64_t end) {
    WithElement(p.dtype, [&](auto* element) {
      for (int64_t row = begin; row < end; ++row) {
        MergeRow<std::remove_pointer_t<decltype(element)>>(p, row);
      }
    });
  });
}

}  // namespace cachedattn
