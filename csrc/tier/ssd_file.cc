#include "csrc/tier/ssd_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace cachedattn {
namespace {

constexpr char kFileName[] = "blocks";
constexpr char kLockName[] = "LOCK";

// Reads up to `size` bytes; a short count means the end of the file. -errno on failure.
int64_t ReadAt(int fd, std::byte* data, size_t size, uint64_t offset) {
  ssize_t moved;
  do {
    moved = ::pread(fd, data, size, static_cast<off_t>(offset));
  } while (moved < 0 && errno == EINTR);
  return moved < 0 ? -errno : moved;
}

Result<uint32_t> SlotsWithin(uint64_t max_bytes, uint64_t slot_bytes) {
  if (max_bytes < kFirstSlot + slot_bytes) {
    return Status(Code::kInvalidArgument, "the SSD tier's cap of " + std::to_string(max_bytes) +
                                              " bytes holds no block; one block needs " +
                                              std::to_string(kFirstSlot + slot_bytes) + " bytes");
  }
  const uint64_t slots = (max_bytes - kFirstSlot) / slot_bytes;
  return static_cast<uint32_t>(std::min<uint64_t>(slots, kNoSlot - 1));
}

void SetCounters(const StoreCounters& counters, Superblock* superblock) {
  superblock->turns = counters.turns;
  superblock->tokens_requested = counters.tokens_requested;
  superblock->tokens_from = {counters.tokens_from_device, counters.tokens_from_dram,
                             counters.tokens_from_ssd};
}

}  // namespace

AlignedBytes AllocateAligned(size_t size, size_t alignment) {
  void* data = std::aligned_alloc(alignment, size);
  CA_CHECK(data != nullptr);
  std::memset(data, 0, size);
  return AlignedBytes(static_cast<std::byte*>(data));
}

Result<std::unique_ptr<SsdFile>> SsdFile::Open(const SsdOptions& options) {
  Status status = options.layout.Validate();
  if (status.ok()) status = options.io.Validate();
  if (!status.ok()) return status;
  if (options.read_only) {
    Result<std::unique_ptr<SsdFile>> opened = OpenReadOnly(options.directory);
    if (!opened.ok()) return opened;
    status = opened.value()->CheckMatch(options);
    if (!status.ok()) return status;
    return opened;
  }
  Result<uint32_t> num_slots = SlotsWithin(options.max_bytes, options.layout.host_slot_bytes());
  if (!num_slots.ok()) return num_slots.status();
  std::unique_ptr<SsdFile> file(new SsdFile);
  status = file->OpenDirectory(options.directory, true);
  if (status.ok()) status = file->Lock();
  if (status.ok()) status = file->ReadOrCreate(options, num_slots.value());
  if (!status.ok()) return status;
  return file;
}

Result<std::unique_ptr<SsdFile>> SsdFile::OpenReadOnly(const std::string& directory) {
  std::unique_ptr<SsdFile> file(new SsdFile);
  Status status = file->OpenDirectory(directory, false);
  if (!status.ok()) return status;
  Result<DirectFile> opened =
      OpenDirect(file->directory_.get(), kFileName, O_RDONLY, file->path_ + "/" + kFileName);
  if (!opened.ok()) return opened.status();
  file->file_ = std::move(opened.value());
  status = file->Load();
  if (!status.ok()) return status;
  return file;
}

Status SsdFile::OpenDirectory(const std::string& directory, bool create) {
  path_ = directory;
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  if (path_.empty()) return Status(Code::kInvalidArgument, "the SSD tier's path is empty");
  if (create && ::mkdir(path_.c_str(), 0700) != 0 && errno != EEXIST) {
    return ErrnoStatus("cannot make the store's directory " + path_, errno);
  }
  directory_ = UniqueFd(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_.ok()) return ErrnoStatus("cannot open the store's directory " + path_, errno);
  return Status();
}

// flock, not a POSIX lock: it also keeps this same process from opening the store twice.
Status SsdFile::Lock() {
  const std::string name = path_ + "/" + kLockName;
  lock_ = UniqueFd(::openat(directory_.get(), kLockName,
                            O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600));
  if (!lock_.ok()) return ErrnoStatus("cannot open " + name, errno);
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) == 0) return Status();
  if (errno == EWOULDBLOCK) {
    return Status(Code::kBusy, "the store " + path_ + " is open in another process or engine");
  }
  return ErrnoStatus("cannot lock " + name, errno);
}

Status SsdFile::ReadOrCreate(const SsdOptions& options, uint32_t num_slots) {
  Result<DirectFile> opened =
      OpenDirect(directory_.get(), kFileName, O_RDWR | O_CREAT, path_ + "/" + kFileName);
  if (!opened.ok()) return opened.status();
  file_ = std::move(opened.value());
  struct stat info;
  if (::fstat(fd(), &info) != 0) return ErrnoStatus("cannot stat " + path_, errno);
  if (info.st_size == 0) {
    Status status = Create(options, num_slots);
    if (status.ok()) status = Resize(num_slots);
    // Else the next try would find half a file.
    if (!status.ok()) ::unlinkat(directory_.get(), kFileName, 0);
    return status;
  }
  Status status = Load();
  if (status.ok()) status = CheckMatch(options);
  if (status.ok()) status = Resize(num_slots);
  return status;
}

// Takes the newest valid superblock copy.
Status SsdFile::Load() {
  const std::string name = path_ + "/" + kFileName;
  struct stat info;
  if (::fstat(fd(), &info) != 0) return ErrnoStatus("cannot stat " + name, errno);
  file_bytes_ = static_cast<uint64_t>(info.st_size);
  AlignedBytes pages = AllocateAligned(2 * kPage, kPage);
  const Superblock* best = nullptr;
  uint32_t other_version = 0;
  int error = 0;
  for (uint64_t i = 0; i < 2; ++i) {
    // One by one: a bad sector under one copy must not hide the other.
    const int64_t moved = ReadAt(fd(), pages.get() + i * kPage, kPage, i * kPage);
    if (moved < 0) error = static_cast<int>(-moved);
    const auto* copy = reinterpret_cast<const Superblock*>(pages.get() + i * kPage);
    if (copy->magic == kSuperblockMagic && copy->version != kSsdVersion) {
      other_version = copy->version;
    }
    if (!IsSealed(*copy) || copy->version != kSsdVersion) continue;
    if (best == nullptr || copy->generation > best->generation) best = copy;
  }
  if (best == nullptr && other_version != 0) {
    return Status(Code::kMismatch, name + " has format version " + std::to_string(other_version) +
                                       ", this build reads version " + std::to_string(kSsdVersion));
  }
  if (best == nullptr && error != 0) return ErrnoStatus("cannot read " + name, error);
  if (best == nullptr) {
    return Status(Code::kCorrupt, name +
                                      " is not a store, or both copies of its superblock are "
                                      "damaged; remove it to start with an empty store");
  }
  superblock_ = *best;
  const KvLayout layout = LayoutOf(superblock_);
  if (!layout.Validate().ok() || superblock_.slot_bytes != layout.host_slot_bytes()) {
    return Status(Code::kCorrupt, name + " has a superblock with sizes out of range");
  }
  const uint64_t room = file_bytes_ < kFirstSlot ? 0 : file_bytes_ - kFirstSlot;
  num_slots_ = static_cast<uint32_t>(
      std::min<uint64_t>(superblock_.num_slots, room / superblock_.slot_bytes));
  return Status();
}

Status SsdFile::Create(const SsdOptions& options, uint32_t num_slots) {
  superblock_ = Superblock();
  if (::getrandom(superblock_.uuid.data(), superblock_.uuid.size(), 0) !=
      static_cast<ssize_t>(superblock_.uuid.size())) {
    return ErrnoStatus("cannot get random bytes", errno);
  }
  superblock_.identity = options.identity.bytes;
  superblock_.num_layers = options.layout.num_layers;
  superblock_.num_kv_heads = options.layout.num_kv_heads;
  superblock_.head_dim = options.layout.head_dim;
  superblock_.block_size = options.layout.block_size;
  superblock_.dtype = static_cast<uint32_t>(options.layout.dtype);
  superblock_.num_slots = num_slots;
  superblock_.slot_bytes = options.layout.host_slot_bytes();
  const size_t length = std::min(options.model_name.size(), superblock_.model_name.size() - 1);
  std::memcpy(superblock_.model_name.data(), options.model_name.data(), length);
  file_bytes_ = 0;
  // Both copies exist before the file grows, so that a crash leaves a store or an empty file.
  Status status = WriteSuperblock();
  if (status.ok()) status = WriteSuperblock();
  return status;
}

Status SsdFile::CheckMatch(const SsdOptions& options) const {
  struct Field {
    const char* name;
    uint64_t stored, expected;
  };
  const KvLayout stored = LayoutOf(superblock_);
  const KvLayout& layout = options.layout;
  const Field fields[] = {
      {"num_layers", stored.num_layers, layout.num_layers},
      {"num_kv_heads", stored.num_kv_heads, layout.num_kv_heads},
      {"head_dim", stored.head_dim, layout.head_dim},
      {"block_size", stored.block_size, layout.block_size},
  };
  const std::string begin = "the store " + path_ + " was made by model \"" + NameOf(superblock_) +
                            "\", this is \"" + options.model_name + "\": ";
  const auto differ = [&](const std::string& name, const std::string& a, const std::string& b) {
    return Status(Code::kMismatch,
                  begin + name + " is " + a + " there and " + b + " here; use another path");
  };
  for (const Field& field : fields) {
    if (field.stored != field.expected) {
      return differ(field.name, std::to_string(field.stored), std::to_string(field.expected));
    }
  }
  if (stored.dtype != layout.dtype) return differ("dtype", Name(stored.dtype), Name(layout.dtype));
  const Digest identity{superblock_.identity};
  if (identity != options.identity) {
    return differ("the identity (weights, RoPE, KV format)", identity.Hex().substr(0, 16),
                  options.identity.Hex().substr(0, 16));
  }
  return Status();
}

// Brings the file to `num_slots` slots; marks the store as not cleanly closed.
Status SsdFile::Resize(uint32_t num_slots) {
  const uint64_t bytes = kFirstSlot + num_slots * superblock_.slot_bytes;
  if (bytes < file_bytes_ && ::ftruncate(fd(), static_cast<off_t>(bytes)) != 0) {
    return ErrnoStatus("cannot shorten " + path_ + "/" + kFileName, errno);
  }
  Status status = Reserve(bytes);
  if (!status.ok()) return status;
  file_bytes_ = bytes;
  superblock_.clean = 0;
  superblock_.num_slots = num_slots_ = num_slots;
  status = WriteSuperblock();
  if (status.ok() && ::fdatasync(fd()) != 0) {
    status = ErrnoStatus("cannot sync " + path_ + "/" + kFileName, errno);
  }
  return status;
}

// Reserves space for the whole file, so that no later write finds the disk full.
Status SsdFile::Reserve(uint64_t bytes) {
  int result;
  do {
    result = ::fallocate(fd(), 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno == EOPNOTSUPP) {
    result = ::ftruncate(fd(), static_cast<off_t>(bytes));
  }
  if (result == 0) return Status();
  const int error = errno;
  // Give back what was taken before the disk was full.
  if (file_bytes_ < bytes) (void)!::ftruncate(fd(), static_cast<off_t>(file_bytes_));
  struct statvfs volume = {};
  (void)::fstatvfs(fd(), &volume);
  const uint64_t free_bytes = volume.f_bavail * volume.f_frsize;
  return ErrnoStatus("cannot reserve " + std::to_string(bytes) + " bytes for " + path_ + "/" +
                         kFileName + " (" + std::to_string(free_bytes) + " bytes are free there)",
                     error);
}

Status SsdFile::WriteSuperblock() {
  ++superblock_.generation;
  Seal(&superblock_);
  AlignedBytes page = AllocateAligned(kPage, kPage);
  std::memcpy(page.get(), &superblock_, kPage);
  // The copies take turns: a torn write leaves the other one, which is older and whole.
  const off_t offset = static_cast<off_t>(superblock_.generation % 2 * kPage);
  ssize_t moved;
  do {
    moved = ::pwrite(fd(), page.get(), kPage, offset);
  } while (moved < 0 && errno == EINTR);
  if (moved == static_cast<ssize_t>(kPage)) return Status();
  return ErrnoStatus("cannot write the superblock of " + path_ + "/" + kFileName,
                     moved < 0 ? errno : ENOSPC);
}

Status SsdFile::Sync(const StoreCounters& counters) {
  if (::fdatasync(fd()) != 0) return ErrnoStatus("cannot sync " + path_, errno);
  superblock_.clean = 1;
  SetCounters(counters, &superblock_);
  Status status = WriteSuperblock();
  if (status.ok() && ::fdatasync(fd()) != 0) status = ErrnoStatus("cannot sync " + path_, errno);
  return status;
}

}  // namespace cachedattn
