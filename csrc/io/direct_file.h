// DirectFile: a file opened past the page cache where the file system allows it (design D11).
#pragma once

#include <string>
#include <utility>

#include "csrc/base/status.h"

namespace cachedattn {

// Owns a file descriptor.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd();

  int get() const { return fd_; }
  bool ok() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// kIo: "<what>: <text of errno>".
Status ErrnoStatus(const std::string& what, int error);

struct DirectFile {
  UniqueFd fd;
  bool direct = false;  // false: the file system refuses O_DIRECT, the page cache is in use
};

// Opens `name` in the directory `directory_fd` with O_CLOEXEC | O_NOFOLLOW and, where it is not
// refused, O_DIRECT. A file made here (O_CREAT in `flags`) gets mode 0600. `path` is the name for
// messages. kIo with the errno text; a symbolic link in the file's place and anything but a
// regular file are refused.
Result<DirectFile> OpenDirect(int directory_fd, const std::string& name, int flags,
                              const std::string& path);

}  // namespace cachedattn
