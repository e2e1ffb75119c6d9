// `cachedattn check` on an encrypted store: every planted damage is found below its tags, said
// where it is, and without the key as far as that reaches.
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <random>

#include "csrc/tier/check_store.h"
#include "tests/native/testing/master_key.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

constexpr uint32_t kBlocks = 6;  // in slots 0 to 5; two more slots are free
using SlotBytes = std::array<uint8_t, 16384>;

class CheckEncryptedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(SmallLayout().host_slot_bytes(), sizeof(SlotBytes));
    WriteMasterKey(dir_ / "key");
    auto tier = Open();
    for (uint32_t i = 0; i < kBlocks; ++i) Put(tier.get(), i, 1);
    ASSERT_TRUE(tier->Sync({}, blocks_).ok());
  }
  std::unique_ptr<SsdTier> Open() {
    SsdOptions options = SmallStore(dir_ / "kv");
    options.keys = MustLoad(dir_ / "key");
    auto tier = MustOpen(options);
    for (const char* name : {"alice", "bob"}) (void)tier->keys()->RootOf({}, name);
    return tier;
  }
  void Put(SsdTier* tier, SlotId slot, uint64_t generation) {
    BlockHeader header = HeaderOfBlock(slot, generation);
    header.tenant = tier->keys()->IdOf(slot % 2 ? "alice" : "bob");
    HostSlot host;
    host.Fill(SmallLayout(), slot);
    tier->StartWrite(slot, header, host.data(), 1);
    ASSERT_TRUE(Drain(tier).at(0).status.ok());
    if (slot >= blocks_.size()) blocks_.resize(slot + 1);
    blocks_[slot] = {slot, header};
  }
  CheckReport Check(bool deep = true) {
    CheckOptions options;
    options.directory = dir_ / "kv";
    options.deep = deep;
    if (deep) options.keys = MustLoad(dir_ / "key");
    auto report = CheckStore(options);
    EXPECT_TRUE(report.ok()) << report.status().message();
    return report.ok() ? report.value() : CheckReport();
  }
  // Each block is found damaged, and says its part.
  static void ExpectAllDamaged(const CheckReport& report, const std::vector<std::string>& parts) {
    ASSERT_EQ(report.damage.size(), kBlocks);
    for (uint32_t i = 0; i < kBlocks; ++i) {
      EXPECT_EQ(report.damage[i].slot, i);
      EXPECT_TRUE(report.damage[i].key == HeaderOfBlock(i).key);
      EXPECT_NE(report.damage[i].what.find(parts[i]), std::string::npos) << report.damage[i].what;
    }
  }
  SlotBytes Slot(SlotId slot) { return ReadRaw<SlotBytes>(file_, SlotOffset(slot)); }

  TempDir dir_;
  const std::string file_ = BlocksFile(dir_ / "kv");
  std::vector<ScannedBlock> blocks_;
};

TEST_F(CheckEncryptedTest, ASoundStoreIsSoundAndDeepNeedsItsKey) {
  EXPECT_TRUE(Check(false).damage.empty());
  const CheckReport report = Check();
  EXPECT_TRUE(report.damage.empty());
  EXPECT_EQ(report.num_blocks, kBlocks);
  CheckOptions options;
  options.directory = dir_ / "kv";
  options.deep = true;
  EXPECT_EQ(CheckStore(options).status().code(), Code::kMismatch);
  WriteMasterKey(dir_ / "other", 'o');
  options.keys = MustLoad(dir_ / "other");
  EXPECT_EQ(CheckStore(options).status().code(), Code::kMismatch);
}

TEST_F(CheckEncryptedTest, EachByteOfEveryHeader) {
  const std::vector<std::string> any(kBlocks);
  for (uint64_t byte = 0; byte < kPage; ++byte) {
    for (uint32_t i = 0; i < kBlocks; ++i) FlipByte(file_, SlotOffset(i) + byte);
    ExpectAllDamaged(Check(false), any);
    for (uint32_t i = 0; i < kBlocks; ++i) FlipByte(file_, SlotOffset(i) + byte);
    ASSERT_FALSE(HasFailure()) << "byte " << byte;
  }
  EXPECT_TRUE(Check().damage.empty());
}

TEST_F(CheckEncryptedTest, TenThousandFlipsInPayloads) {
  const KvLayout layout = SmallLayout();
  std::mt19937_64 random(5);
  for (int flips = 0; flips < 10'000; flips += kBlocks) {
    std::vector<std::string> parts;
    std::vector<uint64_t> planted;
    for (uint32_t i = 0; i < kBlocks; ++i) {
      const uint64_t byte = random() % layout.payload_bytes();
      const uint64_t layer = byte / layout.slice_stride();
      const bool padding = byte % layout.slice_stride() >= layout.slice_bytes();
      parts.push_back((padding ? "padding after layer " : "bytes of layer ") +
                      std::to_string(layer));
      planted.push_back(SlotOffset(i) + KvLayout::kHeaderBytes + byte);
      FlipByte(file_, planted.back());
    }
    ExpectAllDamaged(Check(), parts);
    for (const uint64_t offset : planted) FlipByte(file_, offset);
    ASSERT_FALSE(HasFailure()) << flips << " flips";
  }
  EXPECT_TRUE(Check().damage.empty());
}

TEST_F(CheckEncryptedTest, SwappedStaleAndCut) {
  const SlotBytes one = Slot(1), two = Slot(2);
  WriteRaw(file_, SlotOffset(1), two);
  WriteRaw(file_, SlotOffset(2), one);
  CheckReport report = Check();
  ASSERT_EQ(report.damage.size(), 2u);
  EXPECT_NE(report.damage[0].what.find("slot 2"), std::string::npos) << report.damage[0].what;
  WriteRaw(file_, SlotOffset(1), one);
  WriteRaw(file_, SlotOffset(2), two);
  EXPECT_TRUE(Check().damage.empty());
  {
    auto tier = Open();
    ASSERT_TRUE(tier->Scan({}).ok());
    Put(tier.get(), 1, 9);
    ASSERT_TRUE(tier->Sync({}, blocks_).ok());
  }
  EXPECT_TRUE(Check().damage.empty());
  WriteRaw(file_, SlotOffset(1), one);  // whole, and once right
  report = Check();
  ASSERT_EQ(report.damage.size(), 1u);
  EXPECT_EQ(report.damage[0].slot, 1u);
  EXPECT_NE(report.damage[0].what.find("an old copy"), std::string::npos) << report.damage[0].what;

  std::filesystem::resize_file(file_, SlotOffset(4));
  bool said = false;
  for (const Damage& damage : Check().damage) {
    said |= damage.what.find("was cut") != std::string::npos;
  }
  EXPECT_TRUE(said);
}

TEST_F(CheckEncryptedTest, BlocksOfAnErasedTenantAreCountedNotDamaged) {
  ASSERT_TRUE(EraseTenant(dir_ / "kv", dir_ / "key", "alice").value());
  const CheckReport report = Check();
  EXPECT_TRUE(report.damage.empty());
  EXPECT_EQ(report.num_erased, kBlocks / 2);
}

}  // namespace
}  // namespace cachedattn
