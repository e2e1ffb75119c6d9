// Load a turn's history, compute it again, or both at a time: what is sooner (design D7).
//
// A split computes blocks again from the first one that is not there, which needs nothing that is
// loaded, while the blocks after them are loaded; the new tokens then attend to all.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "csrc/base/status.h"

namespace cachedattn {

// What computing takes, as its caller has measured it: steps of at most `step_tokens` tokens, each
// of `step_s` seconds, `token_s` for each token, and `pair_s` for each of the tokens before that
// one.
struct CA_API ComputeCost {
  uint32_t step_tokens = 0;  // 0: not known
  double step_s = 0, token_s = 0, pair_s = 0;

  Status Validate() const;  // kInvalidArgument

  // Of `tokens` tokens after `context` others, where a context holds at most `window` tokens.
  double Seconds(uint32_t context, uint32_t tokens, uint32_t window) const;
};

struct BlockLoad {
  bool ready = false;  // where compute reads it
  double seconds = 0;  // that its load adds; 0 while another one is under way
};

// A turn as it begins.
struct TurnLoad {
  uint32_t block_size = 0;
  uint32_t window = UINT32_MAX;  // tokens that a context holds
  uint32_t history = 0;          // tokens that need not be computed, dropped ones included
  uint32_t context = 0;          // of these, in the context; less than `history` after a cut
  uint32_t new_tokens = 0;
  double wait_s = 0;                   // until the loads that are under way have ended
  std::vector<BlockLoad> blocks = {};  // of the context; only the last may be part-filled
};

struct BlockRange {
  uint32_t first = 0, last = 0;  // without the last
  uint32_t size() const { return last - first; }
};

// The blocks of the context that are best computed again; none is best where times are equal. Those
// before them are ready, those after them are loaded. After a cut it is all of them or none, and
// all means all tokens of the history.
BlockRange BlocksToRecompute(const TurnLoad& turn, const ComputeCost& cost);

}  // namespace cachedattn
