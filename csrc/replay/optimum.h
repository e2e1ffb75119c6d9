// What no policy can do better: an unlimited store, and one of a given size that knows the future.
#pragma once

#include "csrc/replay/schedule.h"
#include "csrc/replay/token_tree.h"

namespace cachedattn {

// Tokens of the context that an unlimited store would find for each request: what requests that
// have completed by its start share with it.
CA_API std::vector<uint32_t> IdealTokens(const TokenTree& tree, const Schedule& schedule);

// Tokens that each request finds in a store of `capacity` tokens in which always what is used
// again last goes, token by token, and what is not used again is never stored. A prefix is used
// again no later than what follows it, so a leading run is resident of every context, and the sum
// is the most that can be found (Belady).
CA_API std::vector<uint32_t> OptimalTokens(const TokenTree& tree, const Schedule& schedule,
                                           uint64_t capacity);

}  // namespace cachedattn
