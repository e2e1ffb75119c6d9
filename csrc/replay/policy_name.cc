#include <algorithm>
#include <charconv>
#include <sstream>

#include "csrc/replay/replay.h"

namespace cachedattn {

Status SetPolicy(const std::string& name, PolicyOptions* policy, SessionHints* hints) {
  constexpr std::pair<const char*, PolicyKind> kKinds[] = {{"lookahead", PolicyKind::kLookahead},
                                                           {"hazard", PolicyKind::kHazard},
                                                           {"lru", PolicyKind::kLru},
                                                           {"fifo", PolicyKind::kFifo}};
  const std::pair<const char*, bool*> extras[] = {{"ended", &hints->over},
                                                  {"in-service", &policy->drop_in_service},
                                                  {"whole", &policy->whole_conversation},
                                                  {"per-token", &policy->per_token}};
  const auto bad = [](const std::string& word, const char* choices) {
    return Status(Code::kInvalidArgument, "policy: '" + word + "' is none of " + choices);
  };
  std::stringstream words(name);
  std::string word;
  std::getline(words, word, '+');
  const auto kind = std::ranges::find(kKinds, word, [](const auto& k) { return k.first; });
  if (kind == std::end(kKinds)) return bad(word, "lookahead, hazard, lru, fifo");
  policy->kind = kind->second;
  while (std::getline(words, word, '+')) {
    if (word.starts_with("ttl=")) {
      uint32_t seconds = 0;
      const auto [end, error] =
          std::from_chars(word.data() + 4, word.data() + word.size(), seconds);
      if (error != std::errc() || end != word.data() + word.size() || seconds == 0) {
        return Status(Code::kInvalidArgument, "policy: '+" + word + "' is no number of seconds");
      }
      hints->time_to_live_ns = int64_t{seconds} * 1'000'000'000;
      continue;
    }
    const auto extra = std::ranges::find(extras, word, [](const auto& e) { return e.first; });
    if (extra == std::end(extras)) {
      return bad("+" + word, "+ended, +ttl=SECONDS, +in-service, +whole, +per-token");
    }
    *extra->second = true;
  }
  return Status();
}

}  // namespace cachedattn
