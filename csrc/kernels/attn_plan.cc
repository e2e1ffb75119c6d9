#include "csrc/kernels/attn_plan.h"

#include <algorithm>
#include <cstring>

namespace cachedattn {
namespace {

// FNV-1a over words: catches a plan used with other lengths, not an adversary.
uint32_t Hash(uint32_t seed, const int32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    seed = (seed ^ static_cast<uint32_t>(words[i])) * 16777619u;
  }
  return seed;
}

int32_t Checksum(const int32_t* plan, int64_t plan_size, const int32_t* cu_q,
                 const int32_t* kv_lens, int num_seqs) {
  uint32_t hash = Hash(2166136261u, plan + 2, plan_size - 2);
  hash = Hash(hash, cu_q, num_seqs + 1);
  return static_cast<int32_t>(Hash(hash, kv_lens, num_seqs));
}

// Keys in one split of a sequence's q tiles, a multiple of the kernels' key tile.
int SplitTokens(int q_len, int kv_len, int num_tiles) {
  constexpr int kKeyTile = 64;
  const int most = q_len <= kFewTokens ? kMaxDecodeSplits : kMaxExtendSplits;
  const int splits = std::max(1, most / num_tiles);
  const int least = (kv_len + splits - 1) / splits;
  return std::max(kSplitTokens * std::min(num_tiles, kMaxSplitTiles),
                  (least + kKeyTile - 1) / kKeyTile * kKeyTile);
}

// Appends the items of one sequence.
void PlanSequence(int seq, int q_len, int kv_len, int tile, PlanHeader* header,
                  std::vector<PlanItem>* items) {
  if (q_len == 0) return;
  const int split_tokens = SplitTokens(q_len, kv_len, (q_len + tile - 1) / tile);
  for (int row = 0; row < q_len; row += tile) {
    const int num_tokens = std::min(tile, q_len - row);
    // Causal: the tile's last row sees keys up to its own position.
    const int kv_end = std::max(0, kv_len - q_len + row + num_tokens);
    const int num_splits = std::max(1, (kv_end + split_tokens - 1) / split_tokens);
    int group = -1, partial_token = 0;
    if (num_splits > 1) {
      group = header->num_groups++;
      partial_token = header->partial_tokens;
      header->partial_tokens += num_splits * num_tokens;
    }
    for (int split = 0; split < num_splits; ++split) {
      const int begin = split * split_tokens;
      items->push_back({seq, row, num_tokens, begin, std::min(kv_end, begin + split_tokens), split,
                        num_splits, group, partial_token});
    }
  }
}

}  // namespace

std::vector<int32_t> MakeAttnPlan(const int32_t* cu_q, const int32_t* kv_lens, int num_seqs,
                                  int group, int workers) {
  PlanHeader header{PlanHeader::kMagic, 0, 0, 0, 0};
  std::vector<PlanItem> items;
  for (int seq = 0; seq < num_seqs; ++seq) {
    PlanSequence(seq, cu_q[seq + 1] - cu_q[seq], kv_lens[seq], QueryTile(group), &header, &items);
  }
  if (workers > 1) {  // the most work first, so that no worker ends long after the others
    std::stable_sort(items.begin(), items.end(), [](const PlanItem& a, const PlanItem& b) {
      return int64_t{a.num_tokens} * (a.kv_end - a.kv_begin) >
             int64_t{b.num_tokens} * (b.kv_end - b.kv_begin);
    });
  }
  header.num_items = static_cast<int32_t>(items.size());
  std::vector<int32_t> plan(kPlanHeaderWords + items.size() * kPlanItemWords);
  std::memcpy(plan.data(), &header, sizeof(header));
  if (!items.empty()) {
    std::memcpy(plan.data() + kPlanHeaderWords, items.data(), items.size() * sizeof(PlanItem));
  }
  plan[1] = Checksum(plan.data(), static_cast<int64_t>(plan.size()), cu_q, kv_lens, num_seqs);
  return plan;
}

bool AttnPlanMatches(const int32_t* plan, int64_t plan_size, const int32_t* cu_q,
                     const int32_t* kv_lens, int num_seqs) {
  if (plan_size < kPlanHeaderWords) return false;
  const PlanHeader& header = HeaderOf(plan);
  return header.magic == PlanHeader::kMagic &&
         plan_size == kPlanHeaderWords + header.num_items * kPlanItemWords &&
         header.checksum == Checksum(plan, plan_size, cu_q, kv_lens, num_seqs);
}

}  // namespace cachedattn
