// A store on disks that are full, fail, vanish, hang or crawl: service goes on from DRAM with right
// bytes, no turn waits much longer than the I/O deadline, and the SSD tier comes back by itself.
// Many times over: disk_trouble_test --gtest_repeat=200
#include <sys/statvfs.h>
#include <sys/sysmacros.h>

#include <filesystem>
#include <fstream>

#include "tests/native/testing/loop_disk.h"
#include "tests/native/testing/temp_dir.h"
#include "tests/native/testing/trouble.h"
#ifdef CACHEDATTN_HAVE_FUSE
#include "tests/native/testing/fuse_disk.h"
#endif

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;

// One deadline for a turn's first look at the disk, one more for what it began before it was told;
// and the time that others may take from this process.
constexpr int64_t kPatienceMs = 2 * Service::kDeadlineUs / 1000 + 300;

// Writes until the disk is full. True when it said so.
bool Fill(const std::string& folder) {
  const UniqueFd file(::open((folder + "/filler").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  const std::vector<char> bytes(kMiB / 4);
  while (::write(file.get(), bytes.data(), bytes.size()) > 0) {
  }
  return errno == ENOSPC;
}

std::string UseAFullDisk(const std::string& folder) {
  Service service(folder);
  EXPECT_TRUE(service.Open().ok());
  EXPECT_TRUE(Fill(folder));
  service.ExpectServiceFromSsd();  // its space has been there since it was opened
  EXPECT_EQ(service.stats().io_errors, 0u);
  EXPECT_TRUE(service.Close().ok());

  const uint64_t length = fs::file_size(folder + "/kv/blocks");
  service.options().ssd_bytes += 8 * kMiB;
  const Status grown = service.Open();
  EXPECT_EQ(grown.code(), Code::kIo);
  EXPECT_NE(grown.message().find("cannot reserve"), std::string::npos) << grown.message();
  EXPECT_NE(grown.message().find("No space left on device"), std::string::npos) << grown.message();
  EXPECT_EQ(fs::file_size(folder + "/kv/blocks"), length) << "the old store stays";
  fs::remove(folder + "/filler");
  EXPECT_TRUE(service.Open().ok()) << "there is room again";
  EXPECT_GT(service.Serve(20), 0u);
  EXPECT_TRUE(service.Close().ok());
  return Service::Verdict();
}

TEST(DiskTrouble, FullExt4) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path(), 32 * kMiB);
    const std::string error = disk.Make();
    return error.empty() ? UseAFullDisk(disk.path()) : error;
  });
}

TEST(DiskTrouble, FullTmpfs) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    const std::string error = MountPrivately("tmpfs", dir.path(), "size=12m");
    return error.empty() ? UseAFullDisk(dir.path()) : error;
  });
}

// The disk under the file system has no room for what was promised: EIO.
TEST(DiskTrouble, FailingWrites) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path(), 1024);
    EXPECT_TRUE(service.Open().ok());
    EXPECT_TRUE(disk.FillMemory());
    EXPECT_TRUE(service.ServeUntil("off", 2000));
    EXPECT_GE(service.stats().io_errors, 5u);
    EXPECT_GE(service.stats().failed_saves, 1u);
    service.ExpectServiceFromDram();
    EXPECT_FALSE(service.ComesBack(300)) << "still full";
    EXPECT_TRUE(disk.FreeMemory());
    EXPECT_TRUE(service.ComesBack());
    EXPECT_EQ(service.stats().outages, 1u);
    service.ExpectServiceFromSsd();
    EXPECT_TRUE(service.Close().ok());
    return Service::Verdict();
  });
}

TEST(DiskTrouble, VanishedDisk) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    service.store()->DropTier(Tier::kDram);
    EXPECT_EQ(::ftruncate(disk.loop_file(), 0), 0);
    EXPECT_TRUE(service.ServeUntil("off"));
    EXPECT_GE(service.stats().io_errors, 5u);
    EXPECT_GE(service.stats().failed_loads, 1u);
    service.ExpectServiceFromDram();
    // Another one in its place, of the same size and with nothing on it.
    EXPECT_EQ(::ftruncate(disk.loop_file(), 64 * kMiB), 0);
    EXPECT_TRUE(service.ComesBack());
    service.ExpectServiceFromSsd();
    EXPECT_EQ(service.stats().outages, 1u);
    return Service::Verdict();
  });
}

// The file system has shut down: nothing on it works until it is mounted again.
TEST(DiskTrouble, ShutDownFileSystem) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    EXPECT_TRUE(disk.CutPower());
    EXPECT_TRUE(service.ServeUntil("off"));
    service.ExpectServiceFromDram();
    EXPECT_FALSE(service.ComesBack(300));
    service.ExpectServiceFromDram();
    EXPECT_EQ(service.Close().code(), Code::kIo);
    error = disk.PowerOn();
    if (!error.empty()) return error;
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    EXPECT_TRUE(service.Close().ok());
    return Service::Verdict();
  });
}

// After an error of its own the file system lets nobody write.
TEST(DiskTrouble, ReadOnlyFileSystem) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    EXPECT_TRUE(disk.MakeReadOnly());
    EXPECT_TRUE(service.ServeUntil("off"));
    EXPECT_NE(service.stats().ssd_report.find("Read-only file system"), std::string::npos)
        << service.stats().ssd_report;
    service.ExpectServiceFromDram();
    EXPECT_FALSE(service.ComesBack(300));
    EXPECT_EQ(service.Close().code(), Code::kIo);
    EXPECT_EQ(service.Open().code(), Code::kIo);
    error = disk.Unmount();
    if (error.empty()) error = disk.Mount();
    if (!error.empty()) return error;
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    return Service::Verdict();
  });
}

TEST(DiskTrouble, HungWrites) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    {
      const Frozen frozen(disk.path());
      EXPECT_TRUE(frozen.ok());
      service.ForgetTimes();
      EXPECT_TRUE(service.ServeUntil("off", 5000));
      EXPECT_GE(service.stats().late_ios, 1u);
      EXPECT_GE(service.stats().quarantined_slots, 1u);
      service.ExpectServiceFromDram();
      EXPECT_LT(service.longest_ms(), kPatienceMs);
    }
    EXPECT_TRUE(service.ComesBack());
    EXPECT_TRUE(service.HasNothingLate());
    service.ExpectServiceFromSsd();
    EXPECT_EQ(service.stats().checksum_failures, 0u);
    EXPECT_TRUE(service.Close().ok());
    return Service::Verdict();
  });
}

TEST(DiskTrouble, CloseDoesNotWaitForAHungDisk) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    {
      const Frozen frozen(disk.path());
      EXPECT_TRUE(frozen.ok());
      service.Serve(3);
      service.ForgetTimes();
      EXPECT_EQ(service.Close().code(), Code::kIo);
      EXPECT_LT(service.longest_ms(), 2 * kPatienceMs);
      EXPECT_EQ(FreeParkedStores(), 1u);  // and nobody opens it: that would wait for the disk
    }
    for (int i = 0; i < 5000 && FreeParkedStores() > 0; ++i) ::usleep(1000);
    EXPECT_EQ(FreeParkedStores(), 0u);
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    return Service::Verdict();
  });
}

#ifdef CACHEDATTN_HAVE_FUSE
TEST(DiskTrouble, HungReads) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    FuseDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    EXPECT_EQ(service.store()->io_report().rfind("threads: ", 0), 0u);
    service.ExpectServiceFromSsd();
    service.store()->DropTier(Tier::kDram);
    service.ForgetTimes();
    disk.Stop();
    EXPECT_TRUE(service.ServeUntil("off", 5000));
    EXPECT_GE(service.stats().late_ios, 1u);
    EXPECT_GE(service.stats().failed_loads, 1u);
    service.ExpectServiceFromDram();
    EXPECT_LT(service.longest_ms(), kPatienceMs);
    disk.Continue();
    EXPECT_TRUE(service.ComesBack());
    EXPECT_TRUE(service.HasNothingLate());
    service.ExpectServiceFromSsd();
    EXPECT_EQ(service.stats().checksum_failures, 0u);
    EXPECT_TRUE(service.Close().ok());
    return Service::Verdict();
  });
}
#else
TEST(DiskTrouble, HungReads) { GTEST_SKIP() << "skip: built without libfuse3"; }
#endif

// A share of the block I/O of this process's cgroup, of its own.
class Throttle {
 public:
  static constexpr const char* kRoot = "/sys/fs/cgroup/blkio";

  explicit Throttle(const std::string& device) {
    struct stat info;
    if (::stat(device.c_str(), &info) != 0) return;
    number_ = std::to_string(major(info.st_rdev)) + ":" + std::to_string(minor(info.st_rdev));
    ok_ = ::mkdir(folder_.c_str(), 0755) == 0 && Put(folder_ + "/cgroup.procs", "0");
  }
  ~Throttle() {
    (void)Put(std::string(kRoot) + "/cgroup.procs", "0");
    (void)::rmdir(folder_.c_str());
  }
  bool ok() const { return ok_; }
  bool SetBytesPerSecond(uint64_t bytes) const {
    return Put(folder_ + "/blkio.throttle.read_bps_device", number_ + " " + std::to_string(bytes));
  }

 private:
  static bool Put(const std::string& file, const std::string& text) {
    std::ofstream out(file);
    out << text << std::flush;
    return out.good();
  }

  const std::string folder_ = std::string(kRoot) + "/cachedattn." + std::to_string(::getpid());
  std::string number_;
  bool ok_ = false;
};

TEST(DiskTrouble, SlowReads) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    LoopDisk disk(dir.path());
    std::string error = disk.Make();
    if (!error.empty()) return error;
    const Throttle throttle(disk.device_name());
    if (!throttle.ok()) return "skip: no blkio cgroup of version 1";
    Service service(disk.path());
    EXPECT_TRUE(service.Open().ok());
    service.ExpectServiceFromSsd();
    service.store()->DropTier(Tier::kDram);
    service.ForgetTimes();
    EXPECT_TRUE(throttle.SetBytesPerSecond(16 * 1024));  // more than a second for a block
    EXPECT_TRUE(service.ServeUntil("off", 5000));
    EXPECT_GE(service.stats().late_ios, 1u);
    service.ExpectServiceFromDram();
    EXPECT_LT(service.longest_ms(), kPatienceMs);
    EXPECT_TRUE(throttle.SetBytesPerSecond(0));  // no limit
    EXPECT_TRUE(service.ComesBack());
    service.ExpectServiceFromSsd();
    EXPECT_EQ(service.stats().checksum_failures, 0u);
    EXPECT_TRUE(service.Close().ok());
    return Service::Verdict();
  });
}

}  // namespace
}  // namespace cachedattn
