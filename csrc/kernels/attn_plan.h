// The plan of one attn_paged call: which worker item attends which rows to which keys.
//
// An item is a q tile (up to QueryTile query tokens of one sequence, all heads) against one split
// of the keys. Boundaries depend on the sequence's own q_len and kv_len only, so a sequence's
// output is the same whatever its batch mates and however many threads run.
#pragma once

#include <cstdint>

#include "csrc/kernels/params.h"

namespace cachedattn {

// Query tokens in a q tile of G rows each. 64 tokens: with a GQA group of 3 or 4 about 200 rows
// share one rotated K tile, so the rotation costs 2-3 % of the products; without a group 128
// tokens, the rows of a tensor core tile.
constexpr int QueryTile(int group) { return group == 1 ? 128 : 64; }

// Keys in a split per q tile of the sequence, at most kMaxSplitTiles times: a decode step over
// 1,500 tokens has 6 items a KV head to balance over threads; merging costs under 2 % of a split.
constexpr int kSplitTokens = 256;
constexpr int kMaxSplitTiles = 8;
// And at most so many splits of a sequence's q tiles together. 8 KV heads x 32 splits are two
// blocks for each multiprocessor of a large GPU, and bound the partial states of a long context.
constexpr int kMaxDecodeSplits = 32;  // up to kFewTokens query tokens
constexpr int kMaxExtendSplits = 16;
constexpr int kFewTokens = 16;

struct PlanHeader {
  static constexpr int32_t kMagic = 0x43415031;
  int32_t magic;
  int32_t checksum;  // over everything after it and the lengths the plan was made for
  int32_t num_items;
  int32_t num_groups;      // q tiles with more than one split; each is merged once
  int32_t partial_tokens;  // rows / num_q_heads of partial state that the splits write
};

// An item of zeros has no rows. On CUDA such may follow the others: a graph's plan keeps its size.
struct PlanItem {
  int32_t seq;
  int32_t row_begin, num_tokens;  // rows of the sequence
  int32_t kv_begin, kv_end;       // keys; empty when the rows attend to nothing
  int32_t split, num_splits;      // of this q tile
  int32_t group;                  // index among the groups; -1: a single split
  int32_t partial_token;          // where the group's partial state begins
};

constexpr int64_t kPlanHeaderWords = sizeof(PlanHeader) / sizeof(int32_t);
constexpr int64_t kPlanItemWords = sizeof(PlanItem) / sizeof(int32_t);

// What PlanHeader::partial_tokens cannot exceed, for callers that cannot read the plan.
constexpr int64_t MaxPartialTokens(int64_t num_rows, int64_t num_seqs, int group) {
  const int64_t by_rows = num_rows * kMaxDecodeSplits;
  const int64_t by_seqs = num_seqs * QueryTile(group) * kMaxExtendSplits;
  return by_rows < by_seqs ? by_rows : by_seqs;
}

inline const PlanHeader& HeaderOf(const int32_t* plan) {
  return *reinterpret_cast<const PlanHeader*>(plan);
}
inline const PlanItem* ItemsOf(const int32_t* plan) {
  return reinterpret_cast<const PlanItem*>(plan + sizeof(PlanHeader) / sizeof(int32_t));
}

}  // namespace cachedattn
