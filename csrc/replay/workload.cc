#include "csrc/replay/workload.h"

#include <cmath>
#include <string>

namespace cachedattn {

namespace {

constexpr uint32_t kMaxTokens = 1u << 28;  // of one request, so that sums fit
constexpr double kMaxSeconds = 1e9;        // nanoseconds fit 64 bits

// What is wrong with `request`, the one at `index`; nullptr: nothing.
const char* Fault(const Workload& workload, size_t index) {
  const Request& request = workload[index];
  const auto before = [&](int32_t other) {
    return other == kNoRequest || (other >= 0 && static_cast<size_t>(other) < index);
  };
  if (request.prompt == 0 || request.prompt > kMaxTokens) return "prompt";
  if (request.answer > kMaxTokens) return "answer";
  if (!before(request.parent)) return "parent";
  if (!before(request.previous)) return "previous";
  if (request.session >= workload.size()) return "session";
  const uint32_t most = request.parent == kNoRequest
                            ? 0
                            : workload[request.parent].prompt + workload[request.parent].answer;
  if (request.shared > request.prompt || request.shared > most) return "shared";
  for (const double seconds : {request.arrival_s, request.think_s}) {
    if (!(seconds >= 0 && seconds <= kMaxSeconds)) return "arrival_s or think_s";
  }
  return std::isfinite(request.service_s) && request.service_s <= kMaxSeconds ? nullptr
                                                                              : "service_s";
}

}  // namespace

Status Validate(const Workload& workload) {
  if (workload.empty()) return Status(Code::kInvalidArgument, "workload: no requests");
  if (workload.size() > INT32_MAX) return Status(Code::kInvalidArgument, "workload: too long");
  for (size_t i = 0; i < workload.size(); ++i) {
    if (const char* field = Fault(workload, i)) {
      return Status(Code::kInvalidArgument,
                    "request " + std::to_string(i) + ": " + field + " is out of range");
    }
  }
  return Status();
}

}  // namespace cachedattn
