#include "csrc/io/private_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace cachedattn {
namespace {

Status WriteAll(int fd, std::span<const uint8_t> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t moved = ::write(fd, bytes.data(), bytes.size());
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) return ErrnoStatus("cannot write " + path, errno);
    bytes = bytes.subspan(static_cast<size_t>(moved));
  }
  return Status();
}

}  // namespace

Result<PrivateFile> OpenPrivate(int directory_fd, const std::string& name,
                                const std::string& path) {
  // O_NONBLOCK: a fifo in the file's place must be refused below, not waited for.
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  PrivateFile file;
  file.fd = UniqueFd(::openat(directory_fd, name.c_str(), kFlags));
  if (!file.fd.ok()) {
    if (errno == ENOENT) return file;
    if (errno == ELOOP) {
      return Status(Code::kIo, path + " is a symbolic link; it must be a regular file");
    }
    return ErrnoStatus("cannot open " + path, errno);
  }
  struct stat info;
  if (::fstat(file.fd.get(), &info) != 0) return ErrnoStatus("cannot stat " + path, errno);
  if (!S_ISREG(info.st_mode)) return Status(Code::kIo, path + " is not a regular file");
  if (info.st_uid != ::geteuid() && info.st_uid != 0) {
    return Status(Code::kIo, path + " belongs to another user");
  }
  if ((info.st_mode & 077) != 0) {
    char mode[8];
    std::snprintf(mode, sizeof(mode), "%04o", static_cast<unsigned>(info.st_mode & 07777));
    return Status(Code::kIo, path + " has mode " + mode +
                                 ": others may use it; it holds keys and must have mode 0600");
  }
  file.size = static_cast<uint64_t>(info.st_size);
  return file;
}

Status ReadPrivate(const PrivateFile& file, std::span<uint8_t> bytes, const std::string& path) {
  for (uint64_t done = 0; done < bytes.size();) {
    const ssize_t moved =
        ::pread(file.fd.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) return ErrnoStatus("cannot read " + path, errno);
    if (moved == 0) return Status(Code::kIo, path + " became shorter while it was read");
    done += static_cast<uint64_t>(moved);
  }
  return Status();
}

Status ReplacePrivate(int directory_fd, const std::string& name, std::span<const uint8_t> bytes,
                      const std::string& path) {
  const std::string temporary = name + ".new";
  if (::unlinkat(directory_fd, temporary.c_str(), 0) != 0 && errno != ENOENT) {
    return ErrnoStatus("cannot remove " + path + ".new", errno);
  }
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
  const UniqueFd fd(::openat(directory_fd, temporary.c_str(), kFlags, 0600));
  if (!fd.ok()) return ErrnoStatus("cannot make " + path + ".new", errno);
  Status status = WriteAll(fd.get(), bytes, path + ".new");
  if (status.ok() && ::fsync(fd.get()) != 0) status = ErrnoStatus("cannot sync " + path, errno);
  if (status.ok() && ::renameat(directory_fd, temporary.c_str(), directory_fd, name.c_str()) != 0) {
    status = ErrnoStatus("cannot replace " + path, errno);
  }
  if (status.ok() && ::fsync(directory_fd) != 0) {
    status = ErrnoStatus("cannot sync the directory of " + path, errno);
  }
  return status;
}

}  // namespace cachedattn
