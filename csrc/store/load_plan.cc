#include "csrc/store/load_plan.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace cachedattn {

Status ComputeCost::Validate() const {
  for (const double seconds : {step_s, token_s, pair_s}) {
    if (seconds >= 0 && std::isfinite(seconds)) continue;
    return Status(Code::kInvalidArgument,
                  "cost: seconds must be finite and not negative, got " + std::to_string(seconds));
  }
  return Status();
}

double ComputeCost::Seconds(uint32_t context, uint32_t tokens, uint32_t window) const {
  const uint32_t steps = tokens / step_tokens + (tokens % step_tokens != 0);
  const double grows = std::min(tokens, window - context);
  const double pairs = grows * context + grows * (grows - 1) / 2 + (tokens - grows) * window;
  return steps * step_s + tokens * token_s + pairs * pair_s;
}

BlockRange BlocksToRecompute(const TurnLoad& turn, const ComputeCost& cost) {
  const auto num_blocks = static_cast<uint32_t>(turn.blocks.size());
  const bool cut = turn.context < turn.history;
  uint32_t first = 0;
  while (!cut && first < num_blocks && turn.blocks[first].ready) ++first;
  if (first == num_blocks || cost.step_tokens == 0) return {};

  const uint32_t there = first * turn.block_size;
  const auto seconds = [&](uint32_t context, uint32_t tokens) {
    return cost.Seconds(context, tokens, turn.window);
  };
  // Loads end under the first step with new tokens at the latest; later steps need all of them.
  const uint32_t early = std::min(turn.new_tokens, cost.step_tokens);
  const double early_s = seconds(turn.context, early);
  const double later_s =
      seconds(std::min(turn.context + early, turn.window), turn.new_tokens - early);

  uint32_t best = num_blocks;
  double best_s = seconds(there, turn.history - there + turn.new_tokens);
  double load_s = 0;
  bool all_ready = true;
  for (uint32_t last = num_blocks; last-- > first;) {
    load_s += turn.blocks[last].seconds;
    all_ready = all_ready && turn.blocks[last].ready;
    if (cut && last > first) continue;
    const double loaded_s = all_ready ? 0 : turn.wait_s + load_s;
    const double again_s = seconds(there, (last - first) * turn.block_size);
    const double total_s = std::max(again_s + early_s, loaded_s) + later_s;
    if (total_s > best_s) continue;
    best_s = total_s;
    best = last;
  }
  return {first, best};
}

}  // namespace cachedattn
