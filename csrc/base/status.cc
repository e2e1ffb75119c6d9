#include "csrc/base/status.h"

namespace cachedattn {

const char* Name(Code code) {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kInvalidArgument:
      return "invalid_argument";
    case Code::kMismatch:
      return "mismatch";
    case Code::kCorrupt:
      return "corrupt";
    case Code::kExhausted:
      return "exhausted";
    case Code::kIo:
      return "io";
    case Code::kBusy:
      return "busy";
    case Code::kClosed:
      return "closed";
  }
  return "unknown";
}

}  // namespace cachedattn
