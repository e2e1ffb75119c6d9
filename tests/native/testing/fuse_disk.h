// A file system that answers when its process runs: a folder seen through FUSE, whose daemon a test
// may stop. For a child with mounts of its own (child.h).
#pragma once

#define FUSE_USE_VERSION 31
#include <fcntl.h>
#include <fuse.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "tests/native/testing/child.h"

namespace cachedattn {

class FuseDisk {
 public:
  explicit FuseDisk(const std::string& folder) : mount_(folder + "/fuse") {
    Behind() = folder + "/behind";
  }
  ~FuseDisk() {
    if (daemon_ <= 0) return;
    ::kill(daemon_, SIGCONT);
    (void)::umount2(mount_.c_str(), MNT_DETACH);
    ::kill(daemon_, SIGTERM);
    ::waitpid(daemon_, nullptr, 0);
  }
  FuseDisk(const FuseDisk&) = delete;
  FuseDisk& operator=(const FuseDisk&) = delete;

  // "", "skip: <reason>" or an error.
  std::string Make() {
    std::string error = OwnMounts();
    if (!error.empty()) return error;
    if (::access("/dev/fuse", R_OK | W_OK) != 0) return "skip: no /dev/fuse";
    ::mkdir(mount_.c_str(), 0700);
    ::mkdir(Behind().c_str(), 0700);
    struct stat before, now;
    if (::stat(mount_.c_str(), &before) != 0) return "no mount point";
    daemon_ = ::fork();
    if (daemon_ == 0) ::_exit(Serve());
    for (int tries = 0; tries < 5000; ++tries) {
      if (::stat(mount_.c_str(), &now) == 0 && now.st_dev != before.st_dev) return "";
      ::usleep(1000);
    }
    return "the FUSE daemon does not mount";
  }

  // From here to Continue nothing is answered.
  void Stop() const {
    ::kill(daemon_, SIGSTOP);
    int status;
    ::waitpid(daemon_, &status, WUNTRACED);  // until it stands
  }
  void Continue() const { ::kill(daemon_, SIGCONT); }

  const std::string& path() const { return mount_; }

 private:
  static std::string& Behind() {
    static std::string folder;
    return folder;
  }
  static std::string At(const char* path) { return Behind() + path; }
  static int Errno(int result) { return result < 0 ? -errno : result; }

  static int OpenAt(const char* path, int flags, mode_t mode, fuse_file_info* file) {
    const int fd = ::open(At(path).c_str(), flags & ~O_DIRECT, mode);
    if (fd < 0) return -errno;
    file->fh = static_cast<uint64_t>(fd);
    file->direct_io = 1;
    return 0;
  }

  int Serve() const {
    fuse_operations operations = {};
    operations.getattr = [](const char* path, struct stat* out, fuse_file_info*) {
      return Errno(::lstat(At(path).c_str(), out));
    };
    operations.mkdir = [](const char* path, mode_t mode) {
      return Errno(::mkdir(At(path).c_str(), mode));
    };
    operations.unlink = [](const char* path) { return Errno(::unlink(At(path).c_str())); };
    operations.truncate = [](const char* path, off_t size, fuse_file_info*) {
      return Errno(::truncate(At(path).c_str(), size));
    };
    operations.create = [](const char* path, mode_t mode, fuse_file_info* file) {
      return OpenAt(path, file->flags | O_CREAT, mode, file);
    };
    operations.open = [](const char* path, fuse_file_info* file) {
      return OpenAt(path, file->flags, 0, file);
    };
    operations.read = [](const char*, char* data, size_t size, off_t offset, fuse_file_info* file) {
      return Errno(static_cast<int>(::pread(static_cast<int>(file->fh), data, size, offset)));
    };
    operations.write = [](const char*, const char* data, size_t size, off_t offset,
                          fuse_file_info* file) {
      return Errno(static_cast<int>(::pwrite(static_cast<int>(file->fh), data, size, offset)));
    };
    operations.fsync = [](const char*, int, fuse_file_info* file) {
      return Errno(::fdatasync(static_cast<int>(file->fh)));
    };
    operations.release = [](const char*, fuse_file_info* file) {
      return Errno(::close(static_cast<int>(file->fh)));
    };
    std::string arguments[] = {"fuse_disk", "-f", "-s", mount_};
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    return fuse_main(static_cast<int>(argv.size()), argv.data(), &operations, nullptr);
  }

  const std::string mount_;
  pid_t daemon_ = 0;
};

}  // namespace cachedattn
