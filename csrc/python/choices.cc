#include "csrc/python/choices.h"

#include <pybind11/pybind11.h>

namespace cachedattn {

namespace {

[[noreturn]] void RaiseChoice(const char* argument, const std::string& value, const char* choices) {
  throw pybind11::value_error(std::string(argument) + " must be one of " + choices + ", not '" +
                              value + "'");
}

}  // namespace

DType ParseDType(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (name == Name(dtype)) return dtype;
  }
  RaiseChoice("dtype", name, "'float32', 'bfloat16', 'float16'");
}

PolicyKind ParsePolicy(const std::string& name) {
  if (name == "lookahead") return PolicyKind::kLookahead;
  if (name == "lru") return PolicyKind::kLru;
  if (name == "fifo") return PolicyKind::kFifo;
  if (name == "hazard") return PolicyKind::kHazard;
  RaiseChoice("policy", name, "'lookahead', 'hazard', 'lru', 'fifo'");
}

Advice ParseAdvice(const std::string& name) {
  if (name == "over") return Advice::kOver;
  if (name == "ttl") return Advice::kTimeToLive;
  if (name == "lease") return Advice::kLease;
  if (name == "return") return Advice::kReturn;
  RaiseChoice("advice", name, "'over', 'ttl', 'lease', 'return'");
}

Finish ParseFinish(const std::string& name) {
  if (name == "stop") return Finish::kEndOfTurn;
  if (name == "tool_call") return Finish::kToolCall;
  return Finish::kOther;
}

IoKind ParseIo(const std::string& name) {
  if (name == "auto") return IoKind::kAuto;
  if (name == "uring") return IoKind::kUring;
  if (name == "threads") return IoKind::kThreads;
  if (name == "inline") return IoKind::kInline;
  RaiseChoice("io", name, "'auto', 'uring', 'threads', 'inline'");
}

Tier ParseTier(const std::string& name) {
  for (uint32_t i = 0; i < kNumTiers; ++i) {
    if (name == kTierNames[i]) return static_cast<Tier>(i);
  }
  RaiseChoice("tier", name, "'device', 'dram', 'ssd'");
}

}  // namespace cachedattn
