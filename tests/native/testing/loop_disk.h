// A disk that a test may break: ext4 on a loop device whose file lies in a tmpfs of its own.
//
// For a child with mounts of its own (child.h). Nothing is left behind, however the child ends: the
// mounts go with their namespace, and the loop device clears itself with its last user.
#pragma once

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "csrc/io/direct_file.h"
#include "tests/native/testing/child.h"

namespace cachedattn {

// What stops a test that this machine should be able to run: in CI that is a failure.
inline std::string CannotRun(const std::string& reason) {
  const char* ci = std::getenv("CI");
  return ci != nullptr && std::string(ci) == "true" ? reason : "skip: " + reason;
}

class LoopDisk {
 public:
  explicit LoopDisk(const std::string& folder, uint64_t bytes = 64 << 20)
      : folder_(folder), bytes_(bytes) {}
  ~LoopDisk() {
    (void)::umount2(path().c_str(), MNT_DETACH);
    (void)::umount2(back().c_str(), MNT_DETACH);
  }
  LoopDisk(const LoopDisk&) = delete;
  LoopDisk& operator=(const LoopDisk&) = delete;

  // Makes and mounts it. "", "skip: <reason>" or an error.
  std::string Make() {
    std::string error = OwnMounts();
    if (!error.empty()) return error;
    ::mkdir(path().c_str(), 0700);
    ::mkdir(back().c_str(), 0700);
    const std::string size = "size=" + std::to_string(2 * bytes_);
    if (::mount("none", back().c_str(), "tmpfs", 0, size.c_str()) != 0) return Failed("tmpfs");
    file_ = UniqueFd(::open(image().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (!file_.ok() || ::ftruncate(file_.get(), static_cast<off_t>(bytes_)) != 0) {
      return Failed("loop file");
    }
    error = Attach();
    if (!error.empty()) return error;
    const std::string command = "PATH=\"$PATH:/usr/sbin:/sbin\" mkfs.ext4 -q -F -m 0 -J size=4 " +
                                ("-E lazy_itable_init=0,nodiscard '" + device_name_ + "'");
    if (std::system(command.c_str()) != 0) return CannotRun("mkfs.ext4 does not work");
    return Mount();
  }

  std::string Mount() {
    if (::mount(device_name_.c_str(), path().c_str(), "ext4", 0, nullptr) == 0) return "";
    return Failed("ext4");
  }

  // A killed process may hold its files a moment longer.
  std::string Unmount() {
    for (int tries = 0; tries < 5000; ++tries) {
      if (::umount2(path().c_str(), 0) == 0) return "";
      if (errno != EBUSY) break;
      ::usleep(1000);
    }
    return Failed("umount");
  }

  // Nothing reaches the disk from here on, the journal neither; all that is asked of the file
  // system fails. True when it did so.
  bool CutPower() {
    const UniqueFd root(::open(path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    uint32_t without_log_flush = 2;
    if (!root.ok() || ::ioctl(root.get(), _IOR('X', 125, uint32_t), &without_log_flush) != 0) {
      return false;
    }
    const UniqueFd file(::open((path() + "/x").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    return !file.ok() && errno == EIO;
  }

  // After CutPower: mounts what was on the disk at that moment.
  std::string PowerOn() {
    // A copy, since the unmount writes metadata that the journal has not seen.
    const std::string copy = back() + "/copy";
    UniqueFd file(::open(copy.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!file.ok() || !CopyData(file.get())) return Failed("copying the disk");
    std::string error = Unmount();
    if (!error.empty()) return error;
    device_ = UniqueFd();  // the last user: it clears itself
    file_ = std::move(file);
    if (::rename(copy.c_str(), image().c_str()) != 0) return Failed("rename");
    error = Attach();
    return error.empty() ? Mount() : error;
  }

  // The memory behind the disk is used up, or there again: what the disk has not written before,
  // it cannot write.
  bool FillMemory() const { return ResizeMemory(UsedMemory() + kPage); }
  bool FreeMemory() const { return ResizeMemory(2 * bytes_); }

  // Makes the file system meet an error of its own, after which nobody may write to it.
  bool MakeReadOnly() const {
    const std::string name = device_name_.substr(device_name_.rfind('/') + 1);
    if (::mount("none", path().c_str(), nullptr, MS_REMOUNT, "errors=remount-ro") != 0)
      return false;
    const UniqueFd trigger(
        ::open(("/sys/fs/ext4/" + name + "/trigger_fs_error").c_str(), O_WRONLY | O_CLOEXEC));
    if (!trigger.ok() || ::write(trigger.get(), "test", 4) != 4) return false;
    const UniqueFd file(::open((path() + "/x").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    return !file.ok() && errno == EROFS;
  }

  std::string path() const { return folder_ + "/disk"; }
  const std::string& device_name() const { return device_name_; }
  int loop_file() const { return file_.get(); }

 private:
  std::string back() const { return folder_ + "/back"; }
  std::string image() const { return back() + "/image"; }

  static std::string Failed(const std::string& what) {
    const std::string reason = what + ": " + std::strerror(errno);
    const bool forbidden = errno == EPERM || errno == EACCES || errno == ENODEV;
    return forbidden ? "skip: " + reason : reason;
  }

  uint64_t UsedMemory() const {
    struct statvfs info = {};
    (void)::statvfs(back().c_str(), &info);
    return (info.f_blocks - info.f_bfree) * info.f_frsize;
  }
  bool ResizeMemory(uint64_t bytes) const {
    const std::string size = "size=" + std::to_string(bytes);
    return ::mount("none", back().c_str(), nullptr, MS_REMOUNT, size.c_str()) == 0;
  }

  // The disk's bytes into the empty file `to`.
  bool CopyData(int to) const {
    off_t begin = 0;
    while ((begin = ::lseek(file_.get(), begin, SEEK_DATA)) >= 0) {
      const off_t end = ::lseek(file_.get(), begin, SEEK_HOLE);
      off_t place = begin;
      while (begin < end) {
        const auto left = static_cast<size_t>(end - begin);
        if (::copy_file_range(file_.get(), &begin, to, &place, left, 0) <= 0) return false;
      }
    }
    return errno == ENXIO && ::ftruncate(to, static_cast<off_t>(bytes_)) == 0;
  }

  std::string Attach() {
    const UniqueFd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    if (!control.ok()) return std::string("skip: /dev/loop-control: ") + std::strerror(errno);
    loop_config config = {};
    config.fd = static_cast<uint32_t>(file_.get());
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
    for (int tries = 0; tries < 100; ++tries) {  // others may take the free one first
      const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
      if (number < 0) return Failed("no free loop device");
      device_name_ = "/dev/loop" + std::to_string(number);
      device_ = UniqueFd(::open(device_name_.c_str(), O_RDWR | O_CLOEXEC));
      if (!device_.ok()) return Failed(device_name_);
      if (::ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0) return "";
      if (errno != EBUSY) break;
    }
    return Failed(device_name_);
  }

  const std::string folder_;
  const uint64_t bytes_;
  UniqueFd file_;    // of the loop device
  UniqueFd device_;  // keeps it from clearing between two mounts
  std::string device_name_;
};

}  // namespace cachedattn
