// `cachedattn check` on plain and on encrypted stores: every damage that is planted is found, and
// said where it is.
#include "csrc/tier/check_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>

#include "tests/native/testing/master_key.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

using SlotBytes = std::array<std::byte, 16384>;

constexpr uint32_t kBlocks = 6;  // in slots 0 to 5; two more slots are free
constexpr uint64_t kSector = 512;

class CheckStoreTest : public ::testing::TestWithParam<bool> {  // encrypted?
 protected:
  void SetUp() override {
    ASSERT_EQ(SmallLayout().host_slot_bytes(), sizeof(SlotBytes));
    WriteMasterKey(key_);
    auto tier = Open();
    std::vector<ScannedBlock> blocks;
    for (uint32_t i = 0; i < kBlocks; ++i) {
      Put(tier.get(), i, i, i + 1);
      blocks.push_back({i, Header(tier.get(), i, i + 1)});
    }
    ASSERT_TRUE(tier->Sync({}, blocks).ok());
    tier.reset();
    fd_ = ::open(BlocksFile(directory_).c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(fd_, 0);
  }
  void TearDown() override { ::close(fd_); }

  // A process that is killed while it holds what this returns leaves no index.
  std::unique_ptr<SsdTier> Open() {
    SsdOptions options = SmallStore(directory_);
    if (GetParam()) options.keys = MustLoad(key_);
    auto tier = MustOpen(options);
    for (const char* name : {"alice", "bob"}) {
      if (tier->keys() != nullptr) (void)tier->keys()->RootOf({}, name);
    }
    return tier;
  }
  static BlockHeader Header(SsdTier* tier, uint32_t number, uint64_t generation) {
    BlockHeader header = HeaderOfBlock(number, generation);
    if (tier->keys() != nullptr) header.tenant = tier->keys()->IdOf(number % 2 ? "alice" : "bob");
    return header;
  }
  static void Put(SsdTier* tier, SlotId slot, uint32_t number, uint64_t generation) {
    HostSlot host;
    host.Fill(SmallLayout(), number);
    tier->StartWrite(slot, Header(tier, number, generation), false, host.data(), 1);
    ASSERT_TRUE(Drain(tier).at(0).status.ok());
  }

  CheckOptions Options(bool deep = true) {
    CheckOptions options;
    options.directory = directory_;
    options.deep = deep;
    if (GetParam() && deep) options.keys = MustLoad(key_);
    return options;
  }
  Result<CheckReport> Try(bool deep = true) { return CheckStore(Options(deep)); }
  CheckReport Check(bool deep = true) {
    Result<CheckReport> report = Try(deep);
    EXPECT_TRUE(report.ok()) << report.status().message();
    return report.ok() ? report.value() : CheckReport();
  }
  // The only damage: a block's, or of what is no slot.
  std::string OnlyDamage(SlotId slot) {
    const CheckReport report = Check();
    EXPECT_EQ(report.damage.size(), 1u);
    if (report.damage.size() != 1) return "";
    const Damage& damage = report.damage[0];
    EXPECT_EQ(damage.slot, slot);
    if (slot < kBlocks) {
      EXPECT_TRUE(damage.key == HeaderOfBlock(slot).key);
    }
    return damage.what;
  }
  // Each of the blocks is found damaged, and says `part`.
  void ExpectAllDamaged(const CheckReport& report, const std::vector<std::string>& parts) {
    ASSERT_EQ(report.damage.size(), kBlocks);
    for (uint32_t i = 0; i < kBlocks; ++i) {
      EXPECT_EQ(report.damage[i].slot, i);
      EXPECT_TRUE(report.damage[i].key == HeaderOfBlock(i).key);
      EXPECT_NE(report.damage[i].what.find(parts[i]), std::string::npos) << report.damage[i].what;
    }
  }

  template <typename T>
  T Read(uint64_t offset) {
    T value{};
    EXPECT_EQ(::pread(fd_, &value, sizeof(T), static_cast<off_t>(offset)), ssize_t{sizeof(T)});
    return value;
  }
  template <typename T>
  void Write(uint64_t offset, const T& value) {
    EXPECT_EQ(::pwrite(fd_, &value, sizeof(T), static_cast<off_t>(offset)), ssize_t{sizeof(T)});
  }
  void Flip(uint64_t offset) { Write<uint8_t>(offset, Read<uint8_t>(offset) ^ 0x10); }

  static bool Contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }

  TempDir dir_;
  const std::string directory_ = dir_ / "kv", key_ = dir_ / "key";
  const uint64_t index_offset_ = IndexOffset(SmallLayout(), 8);
  const uint64_t file_bytes_ = SsdFileBytes(SmallLayout(), 8);
  int fd_ = -1;
};

TEST_P(CheckStoreTest, ASoundStoreIsSound) {
  CheckReport report = Check();
  EXPECT_TRUE(report.damage.empty());
  EXPECT_EQ(report.num_blocks, kBlocks);
  EXPECT_TRUE(report.indexed);
  report = Check(false);
  EXPECT_TRUE(report.damage.empty());
  Open();
  report = Check();
  EXPECT_TRUE(report.damage.empty() && !report.indexed);
  EXPECT_EQ(report.num_blocks, kBlocks);
}

TEST_P(CheckStoreTest, EachByteOfEveryHeader) {
  const std::vector<std::string> any(kBlocks);
  for (uint64_t byte = 0; byte < kPage; ++byte) {
    for (uint32_t i = 0; i < kBlocks; ++i) Flip(SlotOffset(i) + byte);
    ExpectAllDamaged(Check(false), any);
    for (uint32_t i = 0; i < kBlocks; ++i) Flip(SlotOffset(i) + byte);
    ASSERT_FALSE(HasFailure()) << "byte " << byte;
  }
  EXPECT_TRUE(Check().damage.empty());
}

TEST_P(CheckStoreTest, EachByteOfTheSuperblocksAndOfTheIndex) {
  const std::pair<uint64_t, std::string> pages[] = {
      {0, "superblock copy 0"}, {kPage, "superblock copy 1"}, {index_offset_, "index page 0"}};
  for (const auto& [offset, name] : pages) {
    for (uint64_t byte = 0; byte < kPage; ++byte) {
      Flip(offset + byte);
      const CheckReport report = Check(false);
      ASSERT_EQ(report.damage.size(), 1u) << name << ", byte " << byte;
      EXPECT_EQ(report.damage[0].slot, kNoSlot);
      EXPECT_TRUE(Contains(report.damage[0].what, name)) << report.damage[0].what;
      Flip(offset + byte);
    }
  }
  EXPECT_TRUE(Check().damage.empty());
}

TEST_P(CheckStoreTest, TenThousandFlipsInPayloads) {
  const KvLayout layout = SmallLayout();
  std::mt19937_64 random(4);
  for (int flips = 0; flips < 10'000; flips += kBlocks) {
    std::vector<std::string> parts;
    std::vector<std::pair<uint64_t, uint8_t>> planted;
    for (uint32_t i = 0; i < kBlocks; ++i) {
      const uint64_t byte = random() % layout.payload_bytes();
      const uint64_t layer = byte / layout.slice_stride();
      const bool padding = byte % layout.slice_stride() >= layout.slice_bytes();
      parts.push_back((padding ? "padding after layer " : "bytes of layer ") +
                      std::to_string(layer));
      const uint64_t offset = SlotOffset(i) + KvLayout::kHeaderBytes + byte;
      planted.emplace_back(offset, Read<uint8_t>(offset));
      Write<uint8_t>(offset, planted.back().second ^ (1 << random() % 8));
    }
    ExpectAllDamaged(Check(), parts);
    for (const auto& [offset, value] : planted) Write(offset, value);
    ASSERT_FALSE(HasFailure()) << flips << " flips";
  }
  EXPECT_TRUE(Check().damage.empty());
}

TEST_P(CheckStoreTest, EverySectorZeroedAndSetToOnes) {
  using Sector = std::array<uint8_t, kSector>;
  int found = 0;
  std::vector<uint64_t> sectors;
  for (uint64_t at = 0; at < 2 * kPage; at += kSector) sectors.push_back(at);
  for (uint64_t at = SlotOffset(0); at < SlotOffset(kBlocks); at += kSector) sectors.push_back(at);
  for (uint64_t at = index_offset_; at < file_bytes_; at += kSector) sectors.push_back(at);
  for (const uint64_t at : sectors) {
    const auto before = Read<Sector>(at);
    for (const uint8_t value : {uint8_t{0}, uint8_t{0xFF}}) {
      Sector planted;
      planted.fill(value);
      if (planted == before) continue;  // padding
      Write(at, planted);
      const CheckReport report = Check();
      ASSERT_EQ(report.damage.size(), 1u) << "sector at " << at;
      const bool in_slot = at >= kFirstSlot && at < index_offset_;
      EXPECT_EQ(report.damage[0].slot,
                in_slot ? (at - kFirstSlot) / sizeof(SlotBytes) : SlotId{kNoSlot});
      ++found;
    }
    Write(at, before);
  }
  EXPECT_GT(found, 300);
  EXPECT_TRUE(Check().damage.empty());
}

TEST_P(CheckStoreTest, SwappedSlots) {
  const auto one = Read<SlotBytes>(SlotOffset(1)), two = Read<SlotBytes>(SlotOffset(2));
  Write(SlotOffset(1), two);
  Write(SlotOffset(2), one);
  for (const bool crashed : {false, true}) {
    if (crashed) Open();
    const CheckReport report = Check(false);
    ASSERT_EQ(report.damage.size(), 2u);
    EXPECT_TRUE(Contains(report.damage[0].what, "slot 2")) << report.damage[0].what;
    EXPECT_TRUE(Contains(report.damage[1].what, "slot 1")) << report.damage[1].what;
  }
}

TEST_P(CheckStoreTest, AnOldCopyPutBack) {
  const auto old = Read<SlotBytes>(SlotOffset(3));
  {
    auto tier = Open();
    auto blocks = tier->Scan({});
    ASSERT_TRUE(blocks.ok());
    Put(tier.get(), 3, 3, 9);
    blocks.value()[3].header.generation = 9;
    ASSERT_TRUE(tier->Sync({}, blocks.value()).ok());
  }
  EXPECT_TRUE(Check().damage.empty());
  Write(SlotOffset(3), old);  // whole, and once right
  const std::string what = OnlyDamage(3);
  EXPECT_TRUE(Contains(what, "an old copy") && Contains(what, "9")) << what;
}

TEST_P(CheckStoreTest, AnotherBlockInTheSlotAndNoneAtAll) {
  {
    auto tier = Open();
    auto blocks = tier->Scan({});
    Put(tier.get(), 4, 20, 11);
    ASSERT_TRUE(tier->Sync({}, blocks.value()).ok());  // knows nothing of it
  }
  EXPECT_TRUE(Contains(OnlyDamage(4), "instead"));
  Write(SlotOffset(4), SlotBytes());
  EXPECT_TRUE(Contains(OnlyDamage(4), "zero"));
}

TEST_P(CheckStoreTest, OneBlockInTwoSlots) {
  for (const uint64_t generation : {uint64_t{1}, uint64_t{2}}) {
    auto tier = Open();  // and no clean close
    Put(tier.get(), 7, 1, generation);
    tier.reset();
    // An older copy is what eviction leaves; two of the same write are not.
    if (generation == 1) {
      EXPECT_TRUE(Check().damage.empty());
    } else {
      const CheckReport report = Check();
      ASSERT_EQ(report.damage.size(), 1u);
      EXPECT_EQ(report.damage[0].slot, 7u);
      EXPECT_TRUE(Contains(report.damage[0].what, "slot 1")) << report.damage[0].what;
    }
  }
}

TEST_P(CheckStoreTest, CutAtEachSector) {
  int found = 0;
  for (uint64_t size = file_bytes_ - kSector; size > 0; size -= kSector) {
    if (size == kFirstSlot - kSector) size = 3 * kPage;  // nothing lies between
    ASSERT_EQ(::ftruncate(fd_, static_cast<off_t>(size)), 0);
    const Result<CheckReport> report = Try(false);
    if (size < kPage) {
      EXPECT_EQ(report.status().code(), Code::kCorrupt);
    } else {
      ASSERT_TRUE(report.ok()) << report.status().message();
      bool said = false;
      for (const Damage& damage : report.value().damage) said |= Contains(damage.what, "was cut");
      EXPECT_TRUE(said) << size;
    }
    ++found;
  }
  EXPECT_GT(found, 250);
}

TEST_P(CheckStoreTest, ACallbackMayEndIt) {
  CheckOptions options = Options();
  int calls = 0;
  options.progress = [&](uint64_t, uint64_t total) {
    EXPECT_EQ(total, kBlocks);
    if (++calls == 2) throw 7;
  };
  EXPECT_THROW((void)CheckStore(options), int);
  EXPECT_EQ(calls, 2);
}

TEST_P(CheckStoreTest, DeepNeedsTheMasterKey) {
  CheckOptions options = Options();
  options.keys = nullptr;
  EXPECT_EQ(CheckStore(options).ok(), !GetParam());
  if (!GetParam()) return;
  EXPECT_EQ(CheckStore(options).status().code(), Code::kMismatch);
  WriteMasterKey(key_, 'o');
  EXPECT_EQ(Try().status().code(), Code::kMismatch);
}

TEST_P(CheckStoreTest, BlocksOfAnErasedTenantAreCountedNotDamaged) {
  if (GetParam()) {
    ASSERT_TRUE(EraseTenant(directory_, key_, "alice").value());
  }
  const CheckReport report = Check();
  EXPECT_TRUE(report.damage.empty());
  EXPECT_EQ(report.num_erased, GetParam() ? kBlocks / 2 : 0);
}

INSTANTIATE_TEST_SUITE_P(Stores, CheckStoreTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Encrypted" : "Plain"; });

}  // namespace
}  // namespace cachedattn
