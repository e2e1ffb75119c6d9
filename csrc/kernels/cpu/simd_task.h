// What the attention algorithms share: a task's view of the params, scratch, prefetching.
// Included after a Simd.
#pragma once

// What both algorithms need to know of a task.
template <typename T>
struct TaskView {
  const AttnParams& p;
  const AttnTask& task;
  int group, dim, rows;
  int64_t first_position;  // of the task's first token
  const T* kv;
  float q_scale, cap;  // see SoftCap

  TaskView(const AttnParams& params, const AttnTask& attn_task)
      : p(params),
        task(attn_task),
        group(p.num_q_heads / p.kv.num_kv_heads),
        dim(p.kv.head_dim),
        rows(task.num_tokens * group),
        first_position(int64_t{p.kv_lens[task.seq]} - (p.cu_q[task.seq + 1] - p.cu_q[task.seq]) +
                       task.row_begin),
        kv(static_cast<const T*>(p.kv.data)) {
    constexpr float kLog2E = 1.44269504088896340736f;
    cap = p.softcap * kLog2E;
    q_scale = p.softcap > 0.f ? 2.f * kLog2E * p.sm_scale / p.softcap : kLog2E * p.sm_scale;
  }

  const T* Query(int row) const {
    const int64_t token = p.cu_q[task.seq] + task.row_begin + row / group;
    return static_cast<const T*>(p.q) + token * p.q_token_stride +
           int64_t{task.kv_head * group + row % group} * dim;
  }
  int64_t Position(int row) const { return first_position + row / group; }

  // Keys of the tile at `base` that row `row` attends to: [begin, end) within the tile.
  void Limits(int row, int64_t base, int* begin, int* end) const {
    const int64_t position = Position(row);
    const int64_t last = position + 1 < task.kv_end ? position + 1 : task.kv_end;
    const int64_t first = p.window > 0 ? position - p.window + 1 : 0;
    *end = last - base > kKeyTile ? kKeyTile : static_cast<int>(last - base);
    *begin = first - base > 0
                 ? (first - base > kKeyTile ? kKeyTile : static_cast<int>(first - base))
                 : 0;
  }

  // First tile that some row attends to.
  int64_t FirstBase() const {
    const int64_t first = p.window > 0 ? first_position - p.window + 1 : 0;
    const int64_t aligned = first > 0 ? first / kKeyTile * kKeyTile : 0;
    return aligned > task.kv_begin ? aligned : task.kv_begin;
  }

  // Pointers to the kKeyTile K rows of the tile at `base`; V lies kv_stride on. Returns how many
  // there are, the last of which stands for those that are missing too.
  int KeyRows(int64_t base, const T** rows_out) const {
    const int64_t end = base + kKeyTile < task.kv_end ? base + kKeyTile : task.kv_end;
    if (end <= base) return 0;
    const int32_t* table = p.block_table + task.seq * p.max_blocks;
    for (int64_t j = base; j < end;) {
      const int64_t block = j / p.kv.block_size, block_end = (block + 1) * p.kv.block_size;
      const T* row = kv + table[block] * p.kv.slot_stride + task.kv_head * p.kv.head_stride +
                     (j % p.kv.block_size) * p.kv.token_stride;
      for (; j < end && j < block_end; ++j, row += p.kv.token_stride) rows_out[j - base] = row;
    }
    for (int64_t j = end; j < base + kKeyTile; ++j) rows_out[j - base] = rows_out[end - base - 1];
    return static_cast<int>(end - base);
  }
};

// Cuts the scratch into arrays; each starts on a cache line.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}
  float* Floats(int64_t n) {
    float* result = next_;
    next_ += (n + 15) / 16 * 16;
    return result;
  }

 private:
  float* next_;
};

// Asks for the cache lines of n elements at x, into the second-level cache: K and V of a tile would
// take most of the first one, and they are needed a phase later.
template <typename T>
inline void Prefetch(const T* x, int n) {
  for (int i = 0; i < n; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
}
