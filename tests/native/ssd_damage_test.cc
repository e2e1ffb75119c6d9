// Damage behind the store's back: whatever the file holds, no wrong byte is taken for a block.
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

using SlotBytes = std::array<uint8_t, 16384>;

class SsdDamageTest : public ::testing::Test {
 protected:
  // Three blocks in slots 0 to 2, cleanly closed.
  void SetUp() override {
    ASSERT_EQ(SmallLayout().host_slot_bytes(), sizeof(SlotBytes));
    auto tier = MustOpen(options_);
    std::vector<ScannedBlock> blocks;
    for (uint32_t slot = 0; slot < 3; ++slot) {
      ASSERT_TRUE(WriteBlock(tier.get(), slot, slot).ok());
      blocks.push_back({slot, HeaderOfBlock(slot)});
    }
    ASSERT_TRUE(tier->Sync({}, blocks).ok());
  }
  Status Read(uint32_t slot, uint64_t generation = 1) {
    return ReadBlock(MustOpen(options_).get(), slot, slot, generation);
  }
  std::vector<SlotId> ScanSlots() {
    const Result<std::vector<ScannedBlock>> blocks = MustOpen(options_)->ScanHeaders({});
    std::vector<SlotId> slots;
    for (const ScannedBlock& block : blocks.value()) slots.push_back(block.slot);
    return slots;
  }

  TempDir dir_;
  const SsdOptions options_ = SmallStore(dir_ / "kv");
  const std::string file_ = BlocksFile(dir_ / "kv");
};

TEST(SsdFormat, AnyFlippedBitOfAHeaderIsFound) {
  const Uuid uuid = {1, 2, 3};
  HostSlot host;
  host.Fill(SmallLayout(), 1);
  SealSlices(uuid, SmallLayout(), HeaderOfBlock(1).key, host.data());
  SealHeader(uuid, SmallLayout(), 5, HeaderOfBlock(1), host.data());
  auto& page = *reinterpret_cast<BlockPage*>(host.data());
  ASSERT_TRUE(CheckBlockPage(uuid, SmallLayout(), 5, page).ok());
  EXPECT_TRUE(HeaderOf(page) == HeaderOfBlock(1));
  for (uint64_t byte = 0; byte < kPage; ++byte) {
    host.data()[byte] ^= std::byte{0x10};
    EXPECT_EQ(CheckBlockPage(uuid, SmallLayout(), 5, page).code(), Code::kCorrupt) << byte;
    host.data()[byte] ^= std::byte{0x10};
  }
  EXPECT_FALSE(CheckBlockPage({9}, SmallLayout(), 5, page).ok()) << "a header of another store";
  const Status astray = CheckBlockPage(uuid, SmallLayout(), 6, page);
  EXPECT_NE(astray.message().find("belongs into slot 5"), std::string::npos) << astray.message();
}

TEST(SsdFormat, AnyFlippedBitOfASuperblockIsFound) {
  Superblock superblock;
  Seal(&superblock);
  ASSERT_TRUE(IsSealed(superblock));
  auto* bytes = reinterpret_cast<uint8_t*>(&superblock);
  for (uint64_t byte = 0; byte < kPage; ++byte) {
    bytes[byte] ^= 0x10;
    EXPECT_FALSE(IsSealed(superblock)) << byte;
    bytes[byte] ^= 0x10;
  }
}

TEST(SsdFormat, SealsDependOnSumStoreKeyAndLayer) {
  const BlockKey key = HeaderOfBlock(1).key;
  const SliceSeal seal = SealOf({1}, key, 0, {5});
  EXPECT_EQ(seal, SealOf({1}, key, 0, {5}));
  EXPECT_NE(seal, SealOf({1}, key, 0, {6}));
  EXPECT_NE(seal, SealOf({2}, key, 0, {5}));
  EXPECT_NE(seal, SealOf({1}, HeaderOfBlock(2).key, 0, {5}));
  EXPECT_NE(seal, SealOf({1}, key, 1, {5}));
}

TEST_F(SsdDamageTest, AFlippedHeaderByteDropsTheBlock) {
  for (uint64_t byte :
       {uint64_t{0}, offsetof(BlockPage, version), offsetof(BlockPage, key),
        offsetof(BlockPage, parent), offsetof(BlockPage, num_tokens), offsetof(BlockPage, depth),
        offsetof(BlockPage, generation), offsetof(BlockPage, tenant), offsetof(BlockPage, slot),
        offsetof(BlockPage, seals), offsetof(BlockPage, rest), kPage - 1}) {
    FlipByte(file_, SlotOffset(1) + byte);
    auto tier = MustOpen(options_);
    EXPECT_EQ(tier->ScanHeaders({}).value().size(), 2u) << byte;
    EXPECT_EQ(SlotsOf(tier->damaged()), (std::vector<SlotId>{1})) << byte;
    tier.reset();
    EXPECT_EQ(Read(1).code(), Code::kCorrupt) << byte;
    FlipByte(file_, SlotOffset(1) + byte);
  }
  EXPECT_TRUE(Read(1).ok());
}

TEST_F(SsdDamageTest, AFlippedPayloadByteIsFoundInItsLayer) {
  const KvLayout layout = SmallLayout();
  for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
    for (uint64_t byte : {uint64_t{0}, layout.slice_bytes() / 2, layout.slice_bytes() - 1}) {
      const uint64_t offset = SlotOffset(1) + layout.host_slice_offset(layer) + byte;
      FlipByte(file_, offset);
      const Status status = Read(1);
      EXPECT_EQ(status.code(), Code::kCorrupt);
      EXPECT_NE(status.message().find("layer " + std::to_string(layer)), std::string::npos);
      EXPECT_TRUE(Read(0).ok() && Read(2).ok());
      FlipByte(file_, offset);
    }
  }
  EXPECT_TRUE(Read(1).ok());
}

TEST_F(SsdDamageTest, DamageFailsTheGroupThatHoldsIt) {
  FlipByte(file_, SlotOffset(1) + SmallLayout().host_slice_offset(2));
  auto tier = MustOpen(options_);
  HostSlot host;
  for (uint32_t layer = 0; layer < 3; ++layer) {
    tier->StartRead(1, HeaderOfBlock(1), layer, 1, host.data(), layer);
  }
  for (const SsdCompletion& completion : Drain(tier.get())) {
    EXPECT_EQ(completion.status.code(), completion.tag == 2 ? Code::kCorrupt : Code::kOk);
  }
}

TEST_F(SsdDamageTest, SwappedAndOldSlotsAreFound) {
  const auto one = ReadRaw<SlotBytes>(file_, SlotOffset(1));
  WriteRaw(file_, SlotOffset(1), ReadRaw<SlotBytes>(file_, SlotOffset(2)));
  WriteRaw(file_, SlotOffset(2), one);
  EXPECT_EQ(Read(1).code(), Code::kCorrupt);
  EXPECT_EQ(Read(2).code(), Code::kCorrupt);

  const auto old_slot = ReadRaw<SlotBytes>(file_, SlotOffset(0));
  ASSERT_TRUE(WriteBlock(MustOpen(options_).get(), 0, 0, 2).ok());
  EXPECT_TRUE(Read(0, 2).ok());
  WriteRaw(file_, SlotOffset(0), old_slot);
  EXPECT_EQ(Read(0, 2).code(), Code::kCorrupt);
}

TEST_F(SsdDamageTest, AHalfOverwrittenSlotIsFound) {
  auto slot = ReadRaw<SlotBytes>(file_, SlotOffset(1));
  const auto other = ReadRaw<SlotBytes>(file_, SlotOffset(2));
  std::copy(other.begin(), other.begin() + 2 * kPage, slot.begin());
  WriteRaw(file_, SlotOffset(1), slot);  // block 2's header and first layer, block 1's rest
  EXPECT_EQ(ReadBlock(MustOpen(options_).get(), 1, 2).code(), Code::kCorrupt);
}

TEST_F(SsdDamageTest, ZeroedAndSetPagesAreFound) {
  for (uint8_t fill : {0x00, 0xff}) {
    const auto saved = ReadRaw<SlotBytes>(file_, SlotOffset(1));
    for (uint64_t page = 0; page < sizeof(SlotBytes) / kPage; ++page) {
      std::array<uint8_t, kPage> bytes;
      bytes.fill(fill);
      WriteRaw(file_, SlotOffset(1) + page * kPage, bytes);
      EXPECT_EQ(Read(1).code(), Code::kCorrupt) << page;
      WriteRaw(file_, SlotOffset(1), saved);
    }
  }
}

TEST_F(SsdDamageTest, OneSuperblockCopyIsEnough) {
  const uint64_t newer =
      ReadRaw<Superblock>(file_, 0).generation > ReadRaw<Superblock>(file_, kPage).generation
          ? 0
          : kPage;
  ASSERT_TRUE(ReadSsdInfo(options_.directory).value().clean);
  FlipByte(file_, newer + 50);
  Result<SsdInfo> info = ReadSsdInfo(options_.directory);
  ASSERT_TRUE(info.ok()) << info.status().message();
  EXPECT_FALSE(info.value().clean) << "the older copy is from the open";
  EXPECT_TRUE(Read(1).ok());  // opens for writing, so writes a new copy
  FlipByte(file_, 50);
  FlipByte(file_, kPage + 50);
  Result<std::unique_ptr<SsdTier>> tier = SsdTier::Open(options_);
  ASSERT_FALSE(tier.ok());
  EXPECT_EQ(tier.status().code(), Code::kCorrupt);
  EXPECT_NE(tier.status().message().find("both copies"), std::string::npos);
  EXPECT_EQ(ReadSsdInfo(options_.directory).status().code(), Code::kCorrupt);
}

TEST_F(SsdDamageTest, HostileSuperblocksAreRefused) {
  const auto refuse = [&](auto change) {
    const auto saved = ReadRaw<std::array<Superblock, 2>>(file_, 0);
    auto pages = saved;
    for (Superblock& superblock : pages) {
      change(&superblock);
      Seal(&superblock);
    }
    WriteRaw(file_, 0, pages);
    Result<SsdInfo> info = ReadSsdInfo(options_.directory);
    EXPECT_EQ(info.status().code(), Code::kCorrupt);
    EXPECT_EQ(SsdTier::Open(options_).status().code(), Code::kCorrupt);
    WriteRaw(file_, 0, saved);
  };
  refuse([](Superblock* s) { s->num_layers = 0; });
  refuse([](Superblock* s) { s->num_layers = 100'000; });
  refuse([](Superblock* s) { s->head_dim = UINT32_MAX; });
  refuse([](Superblock* s) { s->dtype = 77; });
  refuse([](Superblock* s) { s->dtype = 256 + static_cast<uint32_t>(DType::kBFloat16); });
  refuse([](Superblock* s) { s->slot_bytes = 0; });
  refuse([](Superblock* s) { s->slot_bytes *= 2; });
  // More slots than the file has room for: only those that are there count.
  auto pages = ReadRaw<std::array<Superblock, 2>>(file_, 0);
  for (Superblock& superblock : pages) {
    superblock.num_slots = UINT32_MAX;
    superblock.model_name.fill('x');  // no terminating zero
    Seal(&superblock);
  }
  WriteRaw(file_, 0, pages);
  Result<SsdInfo> info = ReadSsdInfo(options_.directory);
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info.value().num_slots, 8u);
  EXPECT_EQ(info.value().model_name, std::string(256, 'x'));
}

TEST_F(SsdDamageTest, ATruncatedFileLosesOnlyWhatWasCut) {
  std::filesystem::resize_file(file_, SlotOffset(2) + 2 * kPage + 512);
  EXPECT_EQ(ReadSsdInfo(options_.directory).value().num_slots, 2u);
  EXPECT_EQ(ScanSlots(), (std::vector<SlotId>{0, 1}));
  EXPECT_EQ(Read(2).code(), Code::kCorrupt);
  EXPECT_TRUE(Read(0).ok() && Read(1).ok());
  std::filesystem::resize_file(file_, SlotOffset(1) + 512);
  EXPECT_EQ(ScanSlots(), (std::vector<SlotId>{0}));
  std::filesystem::resize_file(file_, 2 * kPage);
  EXPECT_EQ(ReadSsdInfo(options_.directory).value().num_slots, 0u);
  EXPECT_EQ(ScanSlots(), (std::vector<SlotId>{}));
  std::filesystem::resize_file(file_, 1000);
  EXPECT_EQ(SsdTier::Open(options_).status().code(), Code::kCorrupt);
}

// The file is cut while it is open: reads end short, nothing crashes.
TEST_F(SsdDamageTest, AFileThatShrinksWhileOpenIsAResult) {
  auto tier = MustOpen(options_);
  std::filesystem::resize_file(file_, SlotOffset(1));
  EXPECT_TRUE(ReadBlock(tier.get(), 0, 0).ok());
  const Status status = ReadBlock(tier.get(), 1, 1);
  EXPECT_EQ(status.code(), Code::kIo);
  EXPECT_NE(status.message().find("moved 0 of"), std::string::npos) << status.message();
  EXPECT_EQ(tier->ScanHeaders({}).value().size(), 1u);
}

}  // namespace
}  // namespace cachedattn
