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

Status CheckOwn(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) return ErrnoStatus("cannot stat " + path, errno);
  if (info.st_uid != ::geteuid()) {
    return Status(Code::kIo, path + " belongs to user " + std::to_string(info.st_uid) +
                                 ", this process runs as user " + std::to_string(::geteuid()));
  }
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) == 0) return Status();
  return Status(Code::kIo, path + " can be written to by other users: chmod go-w " + path);
}

namespace {

Status CheckRegular(int fd, int flags, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) return ErrnoStatus("cannot stat " + path, errno);
  if (!S_ISREG(info.st_mode)) return Status(Code::kIo, path + " is not a regular file");
  if (info.st_nlink > 1) return Status(Code::kIo, path + " has another name (a hard link)");
  return (flags & O_ACCMODE) == O_RDONLY ? Status() : CheckOwn(fd, path);
}

}  // namespace

Result<UniqueFd> OpenPrivate(int directory_fd, const std::string& name, int flags,
                             const std::string& path) {
  // O_NONBLOCK: a fifo in the file's place must be refused below, not waited for.
  const int all = flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  UniqueFd fd(::openat(directory_fd, name.c_str(), all, 0600));
  // The file system refuses O_DIRECT; it made the file all the same.
  if (!fd.ok() && errno == EINVAL && (flags & O_DIRECT) != 0) {
    return OpenPrivate(directory_fd, name, flags & ~O_DIRECT, path);
  }
  if (!fd.ok() && errno == ELOOP) {
    return Status(Code::kIo, path + " is a symbolic link; it must be a regular file");
  }
  if (!fd.ok()) return ErrnoStatus("cannot open " + path, errno);
  if (Status status = CheckRegular(fd.get(), flags, path); !status.ok()) return status;
  return fd;
}

Result<DirectFile> OpenDirect(int directory_fd, const std::string& name, int flags,
                              const std::string& path) {
  auto fd = OpenPrivate(directory_fd, name, flags | O_DIRECT, path);
  if (!fd.ok()) return fd.status();
  DirectFile file;
  file.fd = std::move(fd.value());
  file.direct = (::fcntl(file.fd.get(), F_GETFL) & O_DIRECT) != 0;
  return file;
}

}  // namespace cachedattn
