// attn_paged on one thread, by phase, batch, history, new tokens, shape and instruction set:
//
//     attention_bench --benchmark_filter=decode/b1/8192.1/llama8b
//
// Counters: flops (a multiply and an add for each of q k and p v of every visible key) and bytes of
// KV, each read once, both a second. KV sets from a pool larger than most caches take turns.
// bench_attention.py measures the op, with threads, beside peers and limits.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "csrc/kernels/cpu/isa.h"

namespace cachedattn {
namespace {

struct Shape {
  const char* name;
  int q_heads, kv_heads, head_dim;
};
constexpr Shape kShapes[] = {{"llama8b", 32, 8, 128},
                             {"llama13b", 40, 40, 128},
                             {"qwen", 28, 4, 128},
                             {"smollm2", 9, 3, 64}};
struct Case {
  const char* phase;
  int batch, history, new_tokens;
};
constexpr Case kCases[] = {{"decode", 1, 2048, 1},   {"decode", 1, 8192, 1},
                           {"decode", 16, 2048, 1},  {"extend", 1, 2048, 128},
                           {"extend", 1, 8192, 128}, {"prefill", 1, 0, 2048}};
constexpr int kBlock = 64;
constexpr int64_t kPoolBytes = int64_t{1} << 30;

// bfloat16 values of random sign in [1, 2): no denormals, no overflow.
void Fill(std::span<uint16_t> values) {
  uint32_t state = 1;
  for (uint16_t& value : values) {
    state = state * 1664525 + 1013904223;
    value = static_cast<uint16_t>(0x3f80 | (state >> 16 & 0x807f));
  }
}

// In huge pages, as the store's slabs are.
std::span<uint16_t> Pool() {
  static const std::span<uint16_t> pool = [] {
    void* data =
        mmap(nullptr, kPoolBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) std::abort();
    madvise(data, kPoolBytes, MADV_HUGEPAGE);
    const std::span<uint16_t> values(static_cast<uint16_t*>(data), kPoolBytes / 2);
    Fill(values);
    return values;
  }();
  return pool;
}

std::vector<float> Table(int head_dim, int64_t rows, int64_t stride) {
  std::vector<double> inv_freq;
  for (int i = 0; i < head_dim / 2; ++i) inv_freq.push_back(std::pow(1e4, -2. * i / head_dim));
  std::vector<float> table(rows * head_dim);
  RopeTable(inv_freq.data(), head_dim / 2, rows, stride, table.data());
  return table;
}

void Attention(benchmark::State& state, const Shape& shape, const Case& c,
               const CpuKernels& kernels) {
  const int32_t kv_len = c.history + c.new_tokens, blocks = (kv_len + kBlock - 1) / kBlock;
  const int64_t head = int64_t{kBlock} * shape.head_dim, row = shape.q_heads * shape.head_dim;
  const int64_t set_slots = int64_t{c.batch} * blocks, slot = 2 * shape.kv_heads * head;
  const std::span<uint16_t> kv = Pool();
  const int64_t sets = static_cast<int64_t>(kv.size()) / (set_slots * slot);
  std::vector<uint16_t> q(c.batch * c.new_tokens * row), out(q.size());
  Fill(q);
  std::vector<float> lse(c.batch * c.new_tokens * shape.q_heads);
  const int64_t num_hi = kv_len / 256 + 1;
  const std::vector<float> lo = Table(shape.head_dim, 256, 1),
                           hi = Table(shape.head_dim, num_hi, 256);
  std::vector<int32_t> table(set_slots), cu_q;
  const std::vector<int32_t> kv_lens(c.batch, kv_len);
  for (int b = 0; b <= c.batch; ++b) cu_q.push_back(b * c.new_tokens);
  const std::vector<int32_t> plan =
      MakeAttnPlan(cu_q.data(), kv_lens.data(), c.batch, shape.q_heads / shape.kv_heads, 1);

  AttnParams p;
  p.q = q.data(), p.out = out.data(), p.lse = lse.data();
  p.num_rows = cu_q.back(), p.num_seqs = c.batch, p.num_q_heads = shape.q_heads;
  p.q_token_stride = p.out_token_stride = row;
  p.block_table = table.data(), p.max_blocks = blocks;
  p.kv_lens = kv_lens.data(), p.cu_q = cu_q.data();
  p.plan = plan.data(), p.plan_size = static_cast<int64_t>(plan.size());
  p.kv = {kv.data(),      DType::kBFloat16, sets * set_slots,
          shape.kv_heads, kBlock,           shape.head_dim,
          slot,           slot / 2,         head,
          shape.head_dim};
  p.rope = {lo.data(), hi.data(), static_cast<int>(num_hi), shape.head_dim, false};
  p.sm_scale = 1.f / std::sqrt(static_cast<float>(shape.head_dim));
  int64_t set = 0;
  for (auto _ : state) {
    // Neighbours in a sequence lie 7 slots apart, as in a pool that has been in use; 7 divides no
    // case's number of blocks.
    for (int64_t i = 0; i < set_slots; ++i) {
      table[i] = static_cast<int32_t>(set * set_slots + i * 7 % set_slots);
    }
    set = (set + 1) % sets;
    AttnPagedWith(kernels, p, Workers{});
    benchmark::DoNotOptimize(out.data());
  }
  const double pairs = c.batch * c.new_tokens * (c.history + (c.new_tokens + 1) / 2.);
  const double bytes = 4. * c.batch * kv_len * shape.kv_heads * shape.head_dim;
  const auto rate = benchmark::Counter::kIsIterationInvariantRate;
  state.counters["flops"] = benchmark::Counter(4. * pairs * shape.q_heads * shape.head_dim, rate);
  state.counters["kv_bytes"] = benchmark::Counter(bytes, rate);
}

const bool kRegistered = [] {
  for (const Shape& shape : kShapes) {
    for (const Case& c : kCases) {
      for (const CpuKernels* kernels : SupportedCpuKernels()) {
        if (kernels == &kReferenceKernels) continue;  // minutes, and nobody's choice
        const std::string name = std::string(c.phase) + "/b" + std::to_string(c.batch) + "/" +
                                 std::to_string(c.history) + "+" + std::to_string(c.new_tokens) +
                                 "/" + shape.name + "/" + kernels->name;
        benchmark::RegisterBenchmark(name.c_str(), Attention, shape, c, *kernels)->MinTime(0.2);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace cachedattn
