// attn_paged on CPU: hands (plan item, KV head) pairs to workers, merges split states.
//
// One parallel region per call. Workers take tasks from a shared counter; the worker that finishes
// a group's last split merges the group, always in split order, so the result does not depend on
// who ran what.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "csrc/kernels/attn_plan.h"
#include "csrc/kernels/cpu/isa.h"

namespace cachedattn {
namespace {

constexpr size_t kAlignment = 64;

// Scratch that only grows, one per thread and use: no allocation on the hot path.
class Scratch {
 public:
  float* Get(int64_t floats) {
    if (floats > size_) {
      data_.reset(static_cast<float*>(
          ::operator new(floats * sizeof(float), std::align_val_t{kAlignment})));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<float[], Delete> data_;
  int64_t size_ = 0;
};

struct Job {
  const AttnParams& params;
  const CpuKernels& kernels;
  float* partials;                 // [partial_tokens * Hq] states, a group and head at a time
  std::atomic<int32_t>* finished;  // [num_groups * H] splits done
  std::atomic<int64_t> next{0};    // task = item * H + kv_head
};

// Tasks of a q tile and KV head, at most. The plan's splits are small enough to fill a GPU; here
// each begins with cold caches and ends with a state to merge. Eight tasks of a long context, 1,024
// keys and more, took 7 to 10 % less time than its 32 splits, and still feed 64 threads (8 KV
// heads).
constexpr int kMaxTileTasks = 8;

// What one task takes: the item's split and those after it, in place of tasks of their own.
PlanItem JoinSplits(const AttnParams& p, PlanItem item) {
  const int joined = (item.num_splits + kMaxTileTasks - 1) / kMaxTileTasks;
  if (joined == 1) return item;
  const int first_position = p.kv_lens[item.seq] - (p.cu_q[item.seq + 1] - p.cu_q[item.seq]);
  const int tile_end = first_position + item.row_begin + item.num_tokens;
  const int64_t end = item.kv_begin + int64_t{joined} * (item.kv_end - item.kv_begin);
  item.kv_end = static_cast<int>(std::min<int64_t>(tile_end, end));
  item.num_splits = (item.num_splits + joined - 1) / joined;
  // Splits that another task has taken along keep no keys.
  if (item.split % joined != 0) item.num_tokens = 0;
  item.split /= joined;
  return item;
}

void RunTask(Job* job, const PlanItem& plan_item, int kv_head) {
  static thread_local Scratch scratch;
  const AttnParams& p = job->params;
  const PlanItem item = JoinSplits(p, plan_item);
  if (item.num_tokens == 0) return;
  const int group = p.num_q_heads / p.kv.num_kv_heads, dim = p.kv.head_dim;
  const int64_t rows = int64_t{item.num_tokens} * group;
  const AttnTask task = {item.seq,        kv_head,       item.row_begin,
                         item.num_tokens, item.kv_begin, item.kv_end};
  const int64_t state_floats = StateFloats(rows, dim);
  float* memory = scratch.Get(job->kernels.scratch_floats(p, rows) + state_floats);
  if (item.group < 0) {
    float* states = memory + job->kernels.scratch_floats(p, rows);
    job->kernels.attend(p, task, StateAt(states, rows, dim), memory);
    job->kernels.finish(p, task, states, 1);
    return;
  }
  float* states = job->partials + int64_t{item.partial_token} * p.num_q_heads * (dim + 2) +
                  kv_head * item.num_splits * state_floats;
  job->kernels.attend(p, task, StateAt(states + item.split * state_floats, rows, dim), memory);
  std::atomic<int32_t>& finished = job->finished[item.group * p.kv.num_kv_heads + kv_head];
  if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == item.num_splits) {
    job->kernels.finish(p, task, states, item.num_splits);
  }
}

void RunWorker(void* ctx, int) {
  Job* job = static_cast<Job*>(ctx);
  const PlanItem* items = ItemsOf(job->params.plan);
  const int heads = job->params.kv.num_kv_heads;
  const int64_t num_tasks = int64_t{HeaderOf(job->params.plan).num_items} * heads;
  for (;;) {
    const int64_t task = job->next.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks) return;
    RunTask(job, items[task / heads], static_cast<int>(task % heads));
  }
}

// Below some 20 us of work, waking other threads costs more than they save.
bool WorthThreads(const AttnParams& p) {
  constexpr int64_t kMinProducts = 1 << 17;
  const PlanItem* items = ItemsOf(p.plan);
  int64_t products = 0;  // q k products, in elements
  for (int i = 0; i < HeaderOf(p.plan).num_items && products < kMinProducts; ++i) {
    products += int64_t{items[i].num_tokens} * (items[i].kv_end - items[i].kv_begin) *
                p.num_q_heads * p.kv.head_dim;
  }
  return products >= kMinProducts;
}

}  // namespace

void AttnPaged(const AttnParams& params, const Workers& workers) {
  AttnPagedWith(ActiveCpuKernels(), params, workers);
}

void AttnPagedWith(const CpuKernels& kernels, const AttnParams& params, const Workers& workers) {
  static thread_local Scratch partials, counters;
  const PlanHeader& header = HeaderOf(params.plan);
  const int64_t num_tasks = int64_t{header.num_items} * params.kv.num_kv_heads;
  if (num_tasks == 0) return;
  const int64_t num_counters = int64_t{header.num_groups} * params.kv.num_kv_heads;
  static_assert(sizeof(std::atomic<int32_t>) == sizeof(float));
  auto* finished = reinterpret_cast<std::atomic<int32_t>*>(counters.Get(num_counters));
  for (int64_t i = 0; i < num_counters; ++i) new (finished + i) std::atomic<int32_t>(0);
  Job job{
      params, kernels,
      partials.Get(int64_t{header.partial_tokens} * params.num_q_heads * (params.kv.head_dim + 2)),
      finished};
  const int n = static_cast<int>(std::min<int64_t>(workers.num_threads, num_tasks));
  if (n <= 1 || !WorthThreads(params)) {
    RunWorker(&job, 0);
  } else {
    workers.run(n, RunWorker, &job);
  }
}

}  // namespace cachedattn
