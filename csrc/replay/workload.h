// Workload: the requests of a trace, in the order in which it lists them. All lengths are tokens of
// the model.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/base/status.h"
#include "csrc/policy/policy.h"

namespace cachedattn {

constexpr int32_t kNoRequest = -1;

struct Request {
  // The earlier request whose prompt and answer this prompt begins like, and for how many tokens.
  int32_t parent = kNoRequest;
  uint32_t shared = 0;
  uint32_t prompt = 0;  // history included
  uint32_t answer = 0;
  uint32_t session = 0;           // sessions are numbered from 0
  int32_t previous = kNoRequest;  // the session's turn before this one
  Finish finish = Finish::kOther;
  double arrival_s = 0;   // of a session's first turn
  double think_s = 0;     // from the answer of the turn before; of later turns
  double service_s = -1;  // recorded; negative: not recorded
};
using Workload = std::vector<Request>;

// kInvalidArgument names the request and the field that is out of range.
CA_API Status Validate(const Workload& workload);

}  // namespace cachedattn
