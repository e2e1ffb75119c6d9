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

// kIo unless `fd` is this user's alone to write: nobody else owns it, or is let by its mode. `path`
// is the name for messages.
Status CheckOwn(int fd, const std::string& path);

// Opens `name` in the directory `directory_fd` with O_CLOEXEC | O_NOFOLLOW. A file made here
// (O_CREAT in `flags`) gets mode 0600. kIo with the errno text. What somebody may have put in the
// file's place is refused: a link, anything but a regular file and, unless O_RDONLY, a file that
// fails CheckOwn.
Result<UniqueFd> OpenPrivate(int directory_fd, const std::string& name, int flags,
                             const std::string& path);

// The same, with O_DIRECT where the file system does not refuse it.
Result<DirectFile> OpenDirect(int directory_fd, const std::string& name, int flags,
                              const std::string& path);

}  // namespace cachedattn
