#include "csrc/replay/token_tree.h"

namespace cachedattn {

TokenTree::TokenTree(const Workload& workload, uint32_t granularity, uint32_t window)
    : workload_(workload),
      granularity_(granularity),
      truncation_{.window = window / granularity, .ratio = 0.5, .keep_first = 0},
      cuts_(TenantId(), BlockKey(), kBlockSize, truncation_) {
  spans_.reserve(workload.size());
  uint64_t next_id = 0;
  for (const Request& request : workload) {
    Span span;
    if (request.parent != kNoRequest) {
      const Request& parent = workload[request.parent];
      const uint32_t most = spans_[request.parent].total;
      // What ends with the parent's answer does so after rounding too.
      span.shared = request.shared == parent.prompt + parent.answer
                        ? most
                        : std::min(request.shared / granularity, most);
    }
    span.prompt = PromptTokens(request.prompt, span.shared, granularity);
    span.total = TotalTokens(request.prompt + request.answer, span.prompt, granularity);
    span.first_id = next_id;
    next_id += span.total - span.shared;
    const uint32_t held = truncation_.window == 0 ? span.total : truncation_.window;
    max_context_ = std::max(max_context_, std::min(span.total, held));
    spans_.push_back(span);
  }
}

uint32_t TokenTree::NumDropped(uint32_t num_tokens) const {
  if (truncation_.window == 0 || num_tokens <= truncation_.window) return 0;
  return cuts_.ContextBlocks(num_tokens).front() * kBlockSize;  // no head is kept
}

std::vector<TokenId> TokenTree::Tokens(size_t r, uint32_t first, uint32_t last) const {
  std::vector<TokenId> tokens(last - first);
  for (auto node = static_cast<int32_t>(r); last > first; node = workload_[node].parent) {
    const Span& span = spans_[node];
    const uint32_t own = std::max(span.shared, first);
    for (uint32_t i = own; i < last; ++i) {
      tokens[i - first] = static_cast<TokenId>((span.first_id + i - span.shared) & INT32_MAX);
    }
    last = std::min(last, own);
  }
  return tokens;
}

}  // namespace cachedattn
