// Status and Result: operating errors are values (csrc/README.md, "Errors").
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "csrc/base/check.h"
#include "csrc/base/types.h"

namespace cachedattn {

enum class Code : uint8_t {
  kOk = 0,
  kInvalidArgument,  // the caller's values; becomes ValueError
  kMismatch,         // a store file of another version, model, layout or tenant
  kCorrupt,          // bytes that fail their checksum or parse
  kExhausted,        // no slot, no room; try again later or with less
  kIo,               // the disk said no; the message holds the errno text
  kBusy,             // another process holds the store
  kClosed,           // the store is closed
};

CA_API const char* Name(Code code);

class [[nodiscard]] Status {
 public:
  Status() = default;  // ok
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

// A value, or the status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}  // NOLINT: implicit on purpose
  Result(Status status) : status_(std::move(status)) { CA_CHECK(!status_.ok()); }  // NOLINT

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  T& value() {
    CA_CHECK(ok());
    return *value_;
  }
  const T& value() const {
    CA_CHECK(ok());
    return *value_;
  }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace cachedattn
