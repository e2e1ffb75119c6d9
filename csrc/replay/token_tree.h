// TokenTree: a workload's tokens in the units of a replay.
//
// One token of the replayed store stands for `granularity` tokens of the model, so that a history
// has some hundred blocks however long it is. Requests form a tree by the prefixes that they share;
// each token belongs to the first request that had it, and has an id of its own.
#pragma once

#include <algorithm>
#include <vector>

#include "csrc/base/types.h"
#include "csrc/replay/workload.h"
#include "csrc/store/chain.h"

namespace cachedattn {

class CA_API TokenTree {
 public:
  static constexpr uint32_t kBlockSize = 16;

  // `workload` outlives the tree. `window`: tokens of the model, the oldest half is dropped when
  // they are full; 0: none. REQUIRES: Validate(workload) and, with a window, room for two blocks.
  TokenTree(const Workload& workload, uint32_t granularity, uint32_t window);

  // A request's tokens of the store from those of the model: of its prompt, and with the answer.
  static uint32_t PromptTokens(uint32_t prompt, uint32_t shared, uint32_t granularity) {
    return std::max(prompt / granularity, shared + 1);  // the store leaves one to compute
  }
  static uint32_t TotalTokens(uint32_t total, uint32_t prompt, uint32_t granularity) {
    return std::max(total / granularity, prompt);
  }

  const Workload& workload() const { return workload_; }
  size_t size() const { return spans_.size(); }
  uint32_t granularity() const { return granularity_; }
  const Truncation& truncation() const { return truncation_; }

  // Of request `r`: the tokens that are its parent's, those of its prompt and of all; how many are
  // dropped by the time that there are `num_tokens`.
  uint32_t shared(size_t r) const { return spans_[r].shared; }
  uint32_t prompt(size_t r) const { return spans_[r].prompt; }
  uint32_t total(size_t r) const { return spans_[r].total; }
  uint32_t NumDropped(uint32_t num_tokens) const;
  uint32_t max_context() const { return max_context_; }

  // Ids of tokens [first, last) of request `r`.
  std::vector<TokenId> Tokens(size_t r, uint32_t first, uint32_t last) const;

 private:
  struct Span {
    uint32_t shared = 0, prompt = 0, total = 0;
    uint64_t first_id = 0;  // of its own tokens
  };

  const Workload& workload_;
  const uint32_t granularity_;
  const Truncation truncation_;
  const Chain cuts_;  // without tokens: it knows where the cuts are
  std::vector<Span> spans_;
  uint32_t max_context_ = 0;
};

}  // namespace cachedattn
