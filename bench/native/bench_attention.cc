// attn_paged on one thread, by phase and shape: "BM_Attention/<shape>/<new>/<history>/<isa>".
// Counters: flops (a multiply and an add for each of q k and p v of every visible key), kv bytes
// read, both a second. Four KV sets in turn keep the data out of the nearer caches.
#include <benchmark/benchmark.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "csrc/kernels/cpu/isa.h"

namespace cachedattn {
namespace {

struct Shape {
  const char* name;
  int q_heads, kv_heads, head_dim;
};
constexpr Shape kShapes[] = {{"smollm2", 9, 3, 64}, {"llama8b", 32, 8, 128}};
constexpr int kBlock = 64, kSets = 4;

void Attention(benchmark::State& state, const Shape& shape, int new_tokens, int history,
               const CpuKernels& kernels) {
  const int32_t kv_len = history + new_tokens, blocks = (kv_len + kBlock - 1) / kBlock;
  const int64_t head = int64_t{kBlock} * shape.head_dim, row = shape.q_heads * shape.head_dim;
  // bfloat16 1.0 with a few low bits that vary: values near 1, no denormals.
  std::vector<uint16_t> q(new_tokens * row), out(q.size());
  std::vector<uint16_t> kv(kSets * blocks * 2 * shape.kv_heads * head);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint16_t>(0x3f80 ^ (i * 37 % 64));
  for (size_t i = 0; i < kv.size(); ++i) kv[i] = static_cast<uint16_t>(0x3f80 ^ (i * 29 % 64));
  std::vector<float> lse(new_tokens * shape.q_heads), lo(256 * shape.head_dim),
      hi((kv_len / 256 + 1) * shape.head_dim);
  std::vector<double> inv_freq;
  for (int i = 0; i < shape.head_dim / 2; ++i) {
    inv_freq.push_back(std::pow(10000., -2. * i / shape.head_dim));
  }
  RopeTable(inv_freq.data(), shape.head_dim / 2, 256, 1, lo.data());
  RopeTable(inv_freq.data(), shape.head_dim / 2, kv_len / 256 + 1, 256, hi.data());
  std::vector<int32_t> table(blocks);
  const int32_t cu_q[] = {0, new_tokens};
  const std::vector<int32_t> plan =
      MakeAttnPlan(cu_q, &kv_len, 1, shape.q_heads / shape.kv_heads, 1);

  AttnParams p;
  p.q = q.data(), p.out = out.data(), p.lse = lse.data();
  p.num_rows = new_tokens, p.num_seqs = 1, p.num_q_heads = shape.q_heads;
  p.q_token_stride = p.out_token_stride = row;
  p.block_table = table.data(), p.max_blocks = blocks;
  p.kv_lens = &kv_len, p.cu_q = cu_q;
  p.plan = plan.data(), p.plan_size = static_cast<int64_t>(plan.size());
  p.kv = {kv.data(),
          DType::kBFloat16,
          kSets * blocks,
          shape.kv_heads,
          kBlock,
          shape.head_dim,
          2 * shape.kv_heads * head,
          shape.kv_heads * head,
          head,
          shape.head_dim};
  p.rope = {lo.data(), hi.data(), kv_len / 256 + 1, shape.head_dim, false};
  p.sm_scale = 1.f / std::sqrt(static_cast<float>(shape.head_dim));
  int set = 0;
  for (auto _ : state) {
    // Neighbours in the sequence lie 7 slots apart, as in a pool that has been in use.
    for (int i = 0; i < blocks; ++i) table[i] = set * blocks + (i * 7) % blocks;
    set = (set + 1) % kSets;
    AttnPagedWith(kernels, p, Workers{});
    benchmark::DoNotOptimize(out.data());
  }
  const double pairs = new_tokens * (history + (new_tokens + 1) / 2.);
  const double bytes = 4. * kv_len * shape.kv_heads * shape.head_dim;
  state.counters["flops"] = benchmark::Counter(4. * pairs * shape.q_heads * shape.head_dim,
                                               benchmark::Counter::kIsIterationInvariantRate);
  state.counters["kv_bytes"] =
      benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
}

const bool kRegistered = [] {
  constexpr int kCases[][2] = {{1, 512}, {1, 2048}, {1, 8192}, {64, 1500}, {64, 6000}, {1564, 0}};
  for (const Shape& shape : kShapes) {
    for (const auto& [new_tokens, history] : kCases) {
      for (const CpuKernels* kernels : SupportedCpuKernels()) {
        if (kernels == &kReferenceKernels) continue;  // minutes, and nobody's choice
        const std::string name = std::string("BM_Attention/") + shape.name + "/" +
                                 std::to_string(new_tokens) + "/" + std::to_string(history) + "/" +
                                 kernels->name;
        benchmark::RegisterBenchmark(name.c_str(), Attention, shape, new_tokens, history, *kernels)
            ->MinTime(0.2);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace cachedattn
