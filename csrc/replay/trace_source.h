// TraceSource: the requests of a trace by its schedule, results by request.
#pragma once

#include "csrc/replay/source.h"
#include "csrc/replay/token_tree.h"

namespace cachedattn {

class TraceSource final : public Source {
 public:
  // Both outlive the source.
  TraceSource(const TokenTree& tree, const Schedule& schedule);

  double next_s() const override;
  Event Next() override;
  Turn turn(uint32_t r) const override;
  std::vector<TokenId> Tokens(uint32_t r, uint32_t first, uint32_t last) const override {
    return tree_.Tokens(r, first, last);
  }
  void End(uint32_t r, const TurnResult& result) override { results_[r] = result; }
  uint32_t granularity() const override { return tree_.granularity(); }
  Truncation truncation() const override { return tree_.truncation(); }
  uint32_t max_context() const override { return tree_.max_context(); }
  uint32_t max_running() const override;

  // By request.
  const std::vector<TurnResult>& results() const { return results_; }

 private:
  // The requests in the order of their events of one kind.
  struct Line {
    const std::vector<uint32_t>* order = nullptr;
    const std::vector<double>* times = nullptr;
    size_t next = 0;
    double next_s() const { return next < order->size() ? (*times)[(*order)[next]] : kNoTime; }
  };

  const TokenTree& tree_;
  const Schedule& schedule_;
  Line lines_[3];               // by EventKind
  std::vector<uint32_t> last_;  // request of each session
  std::vector<TurnResult> results_;
};

}  // namespace cachedattn
