#include "csrc/io/block_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <set>

#include "csrc/io/direct_file.h"

namespace cachedattn {
namespace {

constexpr char kFileName[] = "blocks";
constexpr char kLockName[] = "LOCK";

// The descriptors that hold locks. A forked child closes its copies at once: it would keep the
// store locked when this process has closed it, or is dead.
struct HeldLocks {
  std::mutex mutex;
  std::set<int> fds;

  static HeldLocks& Get() {
    static HeldLocks* const held = [] {
      ::pthread_atfork([] { Get().mutex.lock(); }, [] { Get().mutex.unlock(); },
                       [] {
                         for (int fd : Get().fds) ::close(fd);
                         Get().fds.clear();
                         Get().mutex.unlock();
                       });
      return new HeldLocks;  // for ever: forks happen until the very end
    }();
    return *held;
  }
};

class PosixBlockFile final : public BlockFile {
 public:
  ~PosixBlockFile() override { Unlock(); }
  Status Open(const std::string& directory, bool read_only);

  uint64_t size() const override { return size_; }
  Status Resize(uint64_t bytes) override;
  Result<std::unique_ptr<IoEngine>> OpenEngine(const IoOptions& options) override {
    return OpenIoEngine(file_.fd.get(), options);
  }
  const std::string& path() const override { return path_; }
  bool direct() const override { return file_.direct; }

 private:
  Status Lock();
  void Unlock();
  Status Reserve(uint64_t bytes);

  std::string folder_, path_;
  UniqueFd directory_;
  UniqueFd lock_;  // held while the file is open for writing
  DirectFile file_;
  uint64_t size_ = 0;
};

Status PosixBlockFile::Open(const std::string& directory, bool read_only) {
  folder_ = directory;
  while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  if (folder_.empty()) return Status(Code::kInvalidArgument, "the SSD tier's path is empty");
  path_ = folder_ + "/" + kFileName;
  if (!read_only && ::mkdir(folder_.c_str(), 0700) != 0 && errno != EEXIST) {
    return ErrnoStatus("cannot make the store's directory " + folder_, errno);
  }
  directory_ = UniqueFd(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_.ok()) return ErrnoStatus("cannot open the store's directory " + folder_, errno);
  if (!read_only) {
    if (Status status = CheckOwn(directory_.get(), folder_); !status.ok()) return status;
    if (Status status = Lock(); !status.ok()) return status;
  }
  auto opened =
      OpenDirect(directory_.get(), kFileName, read_only ? O_RDONLY : O_RDWR | O_CREAT, path_);
  if (!opened.ok()) return opened.status();
  file_ = std::move(opened.value());
  struct stat info;
  if (::fstat(file_.fd.get(), &info) != 0) return ErrnoStatus("cannot stat " + path_, errno);
  size_ = static_cast<uint64_t>(info.st_size);
  return Status();
}

// flock, not a POSIX lock: it also keeps this same process from opening the store twice.
Status PosixBlockFile::Lock() {
  const std::string name = folder_ + "/" + kLockName;
  HeldLocks& held = HeldLocks::Get();
  const std::lock_guard guard(held.mutex);
  auto opened = OpenPrivate(directory_.get(), kLockName, O_RDWR | O_CREAT, name);
  if (!opened.ok()) return opened.status();
  lock_ = std::move(opened.value());
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) == 0) {
    held.fds.insert(lock_.get());
    return Status();
  }
  if (errno == EWOULDBLOCK) {
    return Status(Code::kBusy, "the store " + folder_ + " is open in another process or engine");
  }
  return ErrnoStatus("cannot lock " + name, errno);
}

void PosixBlockFile::Unlock() {
  HeldLocks& held = HeldLocks::Get();
  const std::lock_guard guard(held.mutex);
  held.fds.erase(lock_.get());
  lock_ = UniqueFd();
}

Status PosixBlockFile::Resize(uint64_t bytes) {
  if (bytes < size_ && ::ftruncate(file_.fd.get(), static_cast<off_t>(bytes)) != 0) {
    return ErrnoStatus("cannot shorten " + path_, errno);
  }
  if (bytes > 0) {
    if (Status status = Reserve(bytes); !status.ok()) return status;
  }
  size_ = bytes;
  return Status();
}

Status PosixBlockFile::Reserve(uint64_t bytes) {
  const int fd = file_.fd.get();
  int result;
  do {
    result = ::fallocate(fd, 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno == EOPNOTSUPP) result = ::ftruncate(fd, static_cast<off_t>(bytes));
  if (result == 0) return Status();
  const int error = errno;
  // Give back what was taken before the disk was full.
  if (size_ < bytes) (void)!::ftruncate(fd, static_cast<off_t>(size_));
  struct statvfs volume = {};
  (void)::fstatvfs(fd, &volume);
  const uint64_t free_bytes = volume.f_bavail * volume.f_frsize;
  return ErrnoStatus("cannot reserve " + std::to_string(bytes) + " bytes for " + path_ + " (" +
                         std::to_string(free_bytes) + " bytes are free there)",
                     error);
}

}  // namespace

Result<std::unique_ptr<BlockFile>> OpenStoreFile(const std::string& directory, bool read_only) {
  auto file = std::make_unique<PosixBlockFile>();
  if (Status status = file->Open(directory, read_only); !status.ok()) return status;
  return std::unique_ptr<BlockFile>(std::move(file));
}

}  // namespace cachedattn
