// Small files that hold keys: the owner's alone, read whole and replaced whole.
#pragma once

#include <span>
#include <string>

#include "csrc/io/direct_file.h"

namespace cachedattn {

struct PrivateFile {
  UniqueFd fd;  // not ok(): there is no such file
  uint64_t size = 0;
};

// Opens `name` in the directory `directory_fd` (or AT_FDCWD) for reading. kIo with the errno text;
// refused are a symbolic link, anything but a regular file, another owner than this user or root,
// and a file that the group or others may read. `path` is the name for messages.
Result<PrivateFile> OpenPrivate(int directory_fd, const std::string& name, const std::string& path);

// Reads the first `bytes.size()` bytes.
Status ReadPrivate(const PrivateFile& file, std::span<uint8_t> bytes, const std::string& path);

// Puts a file with mode 0600 and these bytes in the place of `name`, durably: a crash leaves the
// old one or the new one.
Status ReplacePrivate(int directory_fd, const std::string& name, std::span<const uint8_t> bytes,
                      const std::string& path);

}  // namespace cachedattn
