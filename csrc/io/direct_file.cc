#include "csrc/io/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace cachedattn {

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) ::close(fd_);
}

Status ErrnoStatus(const std::string& what, int error) {
  return Status(Code::kIo, what + ": " + std::generic_category().message(error));
}

Result<DirectFile> OpenDirect(int directory_fd, const std::string& name, int flags,
                              const std::string& path) {
  // O_NONBLOCK: a fifo in the file's place must be refused below, not waited for.
  const int all = flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  DirectFile file;
  file.fd = UniqueFd(::openat(directory_fd, name.c_str(), all | O_DIRECT, 0600));
  file.direct = file.fd.ok();
  if (!file.fd.ok() && errno == EINVAL) {
    file.fd = UniqueFd(::openat(directory_fd, name.c_str(), all, 0600));
  }
  if (!file.fd.ok()) {
    if (errno == ELOOP) {
      return Status(Code::kIo, path + " is a symbolic link; it must be a regular file");
    }
    return ErrnoStatus("cannot open " + path, errno);
  }
  struct stat info;
  if (::fstat(file.fd.get(), &info) != 0) return ErrnoStatus("cannot stat " + path, errno);
  if (!S_ISREG(info.st_mode)) return Status(Code::kIo, path + " is not a regular file");
  return file;
}

}  // namespace cachedattn
