#include <algorithm>
#include <sstream>

#include "csrc/replay/replay.h"

namespace cachedattn {

Status SetPolicy(const std::string& name, PolicyOptions* policy, bool* tell_over) {
  constexpr std::pair<const char*, PolicyKind> kKinds[] = {{"lookahead", PolicyKind::kLookahead},
                                                           {"hazard", PolicyKind::kHazard},
                                                           {"lru", PolicyKind::kLru},
                                                           {"fifo", PolicyKind::kFifo}};
  const std::pair<const char*, bool*> extras[] = {{"ended", tell_over},
                                                  {"in-service", &policy->drop_in_service},
                                                  {"whole", &policy->whole_conversation},
                                                  {"per-token", &policy->per_token}};
  std::stringstream words(name);
  std::string word;
  std::getline(words, word, '+');
  const auto kind = std::ranges::find(kKinds, word, [](const auto& k) { return k.first; });
  if (kind == std::end(kKinds)) {
    return Status(Code::kInvalidArgument,
                  "policy: '" + word + "' is none of lookahead, hazard, lru, fifo");
  }
  policy->kind = kind->second;
  while (std::getline(words, word, '+')) {
    const auto extra = std::ranges::find(extras, word, [](const auto& e) { return e.first; });
    if (extra == std::end(extras)) {
      return Status(Code::kInvalidArgument,
                    "policy: '+" + word + "' is none of +ended, +in-service, +whole, +per-token");
    }
    *extra->second = true;
  }
  return Status();
}

}  // namespace cachedattn
