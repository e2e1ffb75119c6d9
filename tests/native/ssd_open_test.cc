// Opening a store: who may, with what message it is refused, and the cap on its size.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "tests/native/testing/child.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

bool Has(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

TEST(SsdOpen, MakesAPrivateDirectoryAndFile) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  auto tier = MustOpen(options);
  EXPECT_TRUE(tier->Scan({}).value().empty());
  EXPECT_EQ(fs::status(dir / "kv").permissions(), fs::perms::owner_all);
  const fs::perms read_write = fs::perms::owner_read | fs::perms::owner_write;
  EXPECT_EQ(fs::status(dir / "kv/blocks").permissions(), read_write);
  EXPECT_EQ(fs::status(dir / "kv/LOCK").permissions(), read_write);
  EXPECT_EQ(fs::file_size(dir / "kv/blocks"), options.max_bytes);
  struct stat info;
  ASSERT_EQ(::stat((dir / "kv/blocks").c_str(), &info), 0);
  EXPECT_GE(static_cast<uint64_t>(info.st_blocks) * 512, options.max_bytes) << "not reserved";
}

TEST(SsdOpen, RefusesAStoreOfAnotherModel) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  MustOpen(options).reset();
  const auto refuse = [&](auto change, const std::string& text) {
    SsdOptions other = options;
    other.model_name = "other";
    change(&other);
    for (bool read_only : {false, true}) {
      other.read_only = read_only;
      const Status status = SsdTier::Open(other).status();
      EXPECT_EQ(status.code(), Code::kMismatch);
      EXPECT_TRUE(Has(status, "made by model \"tiny\", this is \"other\"")) << status.message();
      EXPECT_TRUE(Has(status, text)) << status.message();
    }
  };
  refuse([](SsdOptions* o) { o->layout.num_layers = 4; }, "num_layers is 3 there and 4 here");
  refuse([](SsdOptions* o) { o->layout.num_kv_heads = 2; }, "num_kv_heads is 1 there and 2 here");
  refuse([](SsdOptions* o) { o->layout.head_dim = 64; }, "head_dim is 40 there and 64 here");
  refuse([](SsdOptions* o) { o->layout.block_size = 8; }, "block_size is 16 there and 8 here");
  refuse([](SsdOptions* o) { o->layout.dtype = DType::kFloat16; },
         "dtype is bfloat16 there and float16 here");
  refuse([](SsdOptions* o) { o->identity.bytes[31] = 1; }, "identity");
  EXPECT_TRUE(SsdTier::Open(options).ok()) << "a refusal changes nothing";
}

TEST(SsdOpen, RefusesAnotherFormatVersion) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  MustOpen(options).reset();
  auto pages = ReadRaw<std::array<Superblock, 2>>(BlocksFile(options.directory), 0);
  for (Superblock& superblock : pages) {
    superblock.version = kSsdVersion + 1;
    Seal(&superblock);
  }
  WriteRaw(BlocksFile(options.directory), 0, pages);
  const Status status = SsdTier::Open(options).status();
  EXPECT_EQ(status.code(), Code::kMismatch);
  EXPECT_TRUE(Has(status, "format version " + std::to_string(kSsdVersion + 1) +
                              ", this build reads version " + std::to_string(kSsdVersion)))
      << status.message();
}

TEST(SsdOpen, RefusesAFileThatIsNoStore) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  fs::create_directory(options.directory);
  std::ofstream(BlocksFile(options.directory)) << "something else";
  const Status status = SsdTier::Open(options).status();
  EXPECT_EQ(status.code(), Code::kCorrupt);
  EXPECT_TRUE(Has(status, "is not a store")) << status.message();
  EXPECT_EQ(fs::file_size(BlocksFile(options.directory)), 14u) << "left as it was";
}

TEST(SsdOpen, ASecondOpenerIsTurnedAway) {
  TempDir dir;
  SsdOptions options = SmallStore(dir / "kv");
  auto tier = MustOpen(options);
  const Status status = SsdTier::Open(options).status();
  EXPECT_EQ(status.code(), Code::kBusy);
  EXPECT_TRUE(Has(status, options.directory)) << status.message();
  options.read_only = true;
  EXPECT_TRUE(SsdTier::Open(options).ok()) << "inspect works beside a running store";
  options.read_only = false;
  tier.reset();
  EXPECT_TRUE(SsdTier::Open(options).ok());
}

TEST(SsdOpen, ReadOnlyChangesNothing) {
  TempDir dir;
  SsdOptions options = SmallStore(dir / "kv");
  auto tier = MustOpen(options);
  ASSERT_TRUE(WriteBlock(tier.get(), 3, 1).ok());
  StoreCounters counters;
  counters.turns = 9;
  ASSERT_TRUE(tier->Sync(counters, std::vector<ScannedBlock>{{3, HeaderOfBlock(1)}}).ok());
  tier.reset();
  const auto before = fs::last_write_time(BlocksFile(options.directory));
  fs::remove(dir / "kv/LOCK");

  Result<SsdInfo> info = ReadSsdInfo(options.directory);
  ASSERT_TRUE(info.ok()) << info.status().message();
  EXPECT_TRUE(info.value().layout == options.layout);
  EXPECT_TRUE(info.value().identity == options.identity);
  EXPECT_EQ(info.value().model_name, "tiny");
  EXPECT_EQ(info.value().num_slots, 8u);
  EXPECT_TRUE(info.value().clean);
  EXPECT_EQ(info.value().counters.turns, 9u);

  SsdOptions reader;  // what `cachedattn check` can know
  reader.directory = options.directory;
  reader.layout = info.value().layout;
  reader.identity = info.value().identity;
  reader.read_only = true;
  auto read_tier = MustOpen(reader);
  EXPECT_EQ(read_tier->Scan({}).value().size(), 1u);
  EXPECT_TRUE(ReadBlock(read_tier.get(), 3, 1).ok());
  read_tier.reset();
  EXPECT_EQ(fs::last_write_time(BlocksFile(options.directory)), before);
  EXPECT_FALSE(fs::exists(dir / "kv/LOCK"));
}

TEST(SsdOpen, ReadOnlyMakesNoStore) {
  TempDir dir;
  SsdOptions options = SmallStore(dir / "kv");
  options.read_only = true;
  EXPECT_EQ(SsdTier::Open(options).status().code(), Code::kIo);
  EXPECT_TRUE(Has(ReadSsdInfo(dir / "kv").status(), "No such file"));
  EXPECT_FALSE(fs::exists(dir / "kv"));
  EXPECT_TRUE(Has(ReadSsdInfo(dir.path()).status(), "blocks: No such file"));
  EXPECT_EQ(ReadSsdInfo("").status().code(), Code::kInvalidArgument);
}

TEST(SsdOpen, CleanMeansSyncWasTheLastWord) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  const auto clean = [&] { return ReadSsdInfo(options.directory).value().clean; };
  auto tier = MustOpen(options);
  EXPECT_FALSE(clean());
  tier.reset();
  EXPECT_FALSE(clean());
  ASSERT_TRUE(MustOpen(options)->Sync({}, {}).ok());
  EXPECT_TRUE(clean());
  tier = MustOpen(options);
  EXPECT_FALSE(clean());
}

TEST(SsdOpen, TheCapHoldsWhenItChanges) {
  TempDir dir;
  SsdOptions options = SmallStore(dir / "kv", 4);
  {
    auto tier = MustOpen(options);
    for (uint32_t slot = 0; slot < 4; ++slot) ASSERT_TRUE(WriteBlock(tier.get(), slot, slot).ok());
  }
  options.max_bytes =
      SsdFileBytes(options.layout, 6) + 100;  // grows to six slots, the rest is not enough
  {
    auto tier = MustOpen(options);
    EXPECT_EQ(tier->num_slots(), 6u);
    EXPECT_EQ(tier->Scan({}).value().size(), 4u);
    EXPECT_TRUE(WriteBlock(tier.get(), 5, 5).ok());
  }
  EXPECT_EQ(fs::file_size(BlocksFile(options.directory)), SsdFileBytes(options.layout, 6));
  options.max_bytes = SsdFileBytes(options.layout, 2);
  {
    auto tier = MustOpen(options);
    EXPECT_EQ(tier->num_slots(), 2u);
    EXPECT_EQ(tier->Scan({}).value().size(), 2u);
    EXPECT_TRUE(ReadBlock(tier.get(), 1, 1).ok());
  }
  EXPECT_EQ(fs::file_size(BlocksFile(options.directory)), SsdFileBytes(options.layout, 2));
  options.max_bytes = SsdFileBytes(options.layout, 1) - 1;
  const Status status = SsdTier::Open(options).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_TRUE(Has(status, std::to_string(options.max_bytes + 1))) << status.message();
  EXPECT_EQ(fs::file_size(BlocksFile(options.directory)), SsdFileBytes(options.layout, 2));
}

TEST(SsdOpen, BadArgumentsAreRefusedBeforeAnythingIsMade) {
  TempDir dir;
  SsdOptions options = SmallStore(dir / "kv");
  options.layout.head_dim = 0;
  EXPECT_EQ(SsdTier::Open(options).status().code(), Code::kInvalidArgument);
  options = SmallStore(dir / "kv");
  options.max_bytes = 0;
  EXPECT_EQ(SsdTier::Open(options).status().code(), Code::kInvalidArgument);
  options = SmallStore(dir / "kv");
  options.io.depth = 0;
  EXPECT_EQ(SsdTier::Open(options).status().code(), Code::kInvalidArgument);
  EXPECT_FALSE(fs::exists(dir / "kv"));
  EXPECT_EQ(SsdTier::Open(SmallStore("")).status().code(), Code::kInvalidArgument);
}

TEST(SsdOpen, BadPathsAreNamed) {
  TempDir dir;
  const auto refuse = [](const std::string& path, const std::string& text) {
    const Status status = SsdTier::Open(SmallStore(path)).status();
    EXPECT_EQ(status.code(), Code::kIo);
    EXPECT_TRUE(Has(status, path) && Has(status, text)) << status.message();
  };
  refuse(dir / "absent/kv", "No such file or directory");
  std::ofstream(dir / "file") << "x";
  refuse(dir / "file", "Not a directory");
  fs::create_directory(dir / "links");
  fs::create_symlink(dir / "file", dir / "links/blocks");
  refuse(dir / "links", "symbolic link");
  fs::create_directories(dir / "folder/blocks");
  refuse(dir / "folder", "Is a directory");
  EXPECT_EQ(ReadRaw<char>(dir / "file", 0), 'x');
}

TEST(SsdOpen, APathWithoutPermissionIsNamed) {
  TempDir dir;
  fs::create_directory(dir / "closed");
  fs::permissions(dir / "closed", fs::perms::owner_read | fs::perms::owner_exec |
                                      fs::perms::others_read | fs::perms::others_exec);
  fs::permissions(dir.path(), fs::perms::owner_all | fs::perms::others_exec);
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown((dir / "closed").c_str(), 65534, 65534), 0);
  }
  EXPECT_CHILD_OK([&]() -> std::string {
    DropRoot();
    for (const std::string path : {dir / "closed", dir / "closed/kv"}) {
      const Status status = SsdTier::Open(SmallStore(path)).status();
      if (status.code() != Code::kIo || !Has(status, "Permission denied") || !Has(status, path)) {
        return "unexpected: " + status.message();
      }
    }
    return "";
  });
}

TEST(SsdOpen, AFullDiskIsToldAndLeavesNothing) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    std::string error = MountPrivately("tmpfs", dir.path(), "size=3m");
    if (!error.empty()) return error;
    SsdOptions options = SmallStore(dir / "kv");
    const Status fits = SsdTier::Open(options).status();
    if (!fits.ok()) return "a store that fits: " + fits.message();
    options.max_bytes = 8 << 20;  // grows past the disk: refused, the old store stays
    const Status grown = SsdTier::Open(options).status();
    if (grown.code() != Code::kIo || !Has(grown, "No space left on device") ||
        !Has(grown, "cannot reserve 8") || !Has(grown, dir / "kv/blocks")) {
      return "unexpected: " + grown.message();
    }
    if (fs::file_size(dir / "kv/blocks") != SsdFileBytes(SmallLayout(), 8))
      return "the old file was changed";
    options.directory = dir / "new";
    const Status made = SsdTier::Open(options).status();
    if (made.code() != Code::kIo) return "unexpected: " + made.message();
    if (fs::file_size(dir / "new/blocks") != 0) return "half a file was left";
    return "";
  });
}

TEST(SsdOpen, WorksWhereODirectIsRefused) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    std::string error = MountPrivately("ramfs", dir.path(), "");
    if (!error.empty()) return error;
    Result<std::unique_ptr<SsdTier>> tier = SsdTier::Open(SmallStore(dir / "kv"));
    if (!tier.ok()) return tier.status().message();
    const std::string why = tier.value()->io_why();
    if (why.find("refuses O_DIRECT") == std::string::npos) return "not reported: " + why;
    Status status = WriteBlock(tier.value().get(), 2, 5);
    if (status.ok()) status = ReadBlock(tier.value().get(), 2, 5);
    if (status.ok()) status = tier.value()->Sync({}, {});
    return status.ok() ? "" : status.message();
  });
}

}  // namespace
}  // namespace cachedattn
