// Choices by name, as Python gives them. Each raises ValueError with the list of what there is.
#pragma once

#include <string>

#include "csrc/store/attention_store.h"

namespace cachedattn {

constexpr const char* kTierNames[kNumTiers] = {"device", "dram", "ssd"};

DType ParseDType(const std::string& name);
PolicyKind ParsePolicy(const std::string& name);
Advice ParseAdvice(const std::string& name);
IoKind ParseIo(const std::string& name);
Tier ParseTier(const std::string& name);
Finish ParseFinish(const std::string& name);  // kOther for any other text

}  // namespace cachedattn
