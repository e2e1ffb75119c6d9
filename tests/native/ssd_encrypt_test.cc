// An encrypted SSD tier against who can read and write its files: no plain byte, no byte that was
// not written there, and nothing after an erase.
#include <algorithm>
#include <bit>
#include <filesystem>
#include <random>

#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/master_key.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

const KvLayout kLayout = SmallLayout();
using SlotBytes = std::array<uint8_t, 16384>;

bool Has(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

class SsdEncryptTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(kLayout.host_slot_bytes(), sizeof(SlotBytes));
    WriteMasterKey(dir_ / "key");
  }
  SsdOptions Options(uint32_t num_slots = 8) {
    SsdOptions options = SmallStore(dir_ / "kv", num_slots);
    options.keys = MustLoad(dir_ / "key");
    return options;
  }
  std::unique_ptr<SsdTier> Open(uint32_t num_slots = 8) {
    auto tier = MustOpen(Options(num_slots));
    for (const char* name : {"alice", "bob"}) (void)tier->keys()->RootOf({}, name);
    return tier;
  }
  static BlockHeader Header(SsdTier* tier, uint32_t number, const std::string& tenant = "alice") {
    BlockHeader header = HeaderOfBlock(number);
    header.tenant = tier->keys()->IdOf(tenant);
    return header;
  }
  static Status Write(SsdTier* tier, SlotId slot, const BlockHeader& header) {
    HostSlot host, before;
    host.Fill(kLayout, header.depth);
    before.Fill(kLayout, header.depth);
    tier->StartWrite(slot, header, false, host.data(), 1);
    EXPECT_EQ(std::memcmp(host.data(), before.data(), host.size()), 0) << "DRAM stays plain";
    return Drain(tier).at(0).status;
  }
  // The status; when it is ok the bytes are those of the block.
  static Status Read(SsdTier* tier, SlotId slot, const BlockHeader& header) {
    HostSlot host, expected;
    expected.Fill(kLayout, header.depth);
    tier->StartRead(slot, header, 0, kLayout.num_layers, host.data(), 2);
    Status status = Drain(tier).at(0).status;
    if (status.ok()) {
      EXPECT_TRUE(host.SamePayload(expected));
    }
    return status;
  }

  Uuid uuid() { return ReadRaw<Superblock>(file_, 0).uuid; }
  SlotBytes Slot(SlotId slot) { return ReadRaw<SlotBytes>(file_, SlotOffset(slot)); }
  // As an attacker would: with a header page that is whole, and says what a reader wants to see.
  void Plant(SlotId slot, SlotBytes bytes, const BlockHeader& header) {
    auto& page = *reinterpret_cast<BlockPage*>(bytes.data());
    const BlockPage wanted = PageOf(kLayout, slot, header);
    page.key = wanted.key;
    page.parent = wanted.parent;
    page.tenant = wanted.tenant;
    page.num_tokens = wanted.num_tokens;
    page.depth = wanted.depth;
    page.generation = wanted.generation;
    page.slot = slot;
    Seal(uuid(), &page);
    WriteRaw(file_, SlotOffset(slot), bytes);
  }

  TempDir dir_;
  const std::string file_ = BlocksFile(dir_ / "kv");
};

TEST_F(SsdEncryptTest, BlocksComeBackAlsoAfterARestart) {
  {
    auto tier = Open();
    for (uint32_t n = 0; n < 8; ++n) {
      ASSERT_TRUE(Write(tier.get(), n, Header(tier.get(), n, n % 2 ? "alice" : "bob")).ok());
    }
  }
  auto tier = Open();
  EXPECT_EQ(tier->Scan({}).value().size(), 8u);
  for (uint32_t n = 0; n < 8; ++n) {
    EXPECT_TRUE(Read(tier.get(), n, Header(tier.get(), n, n % 2 ? "alice" : "bob")).ok());
  }
  EXPECT_EQ(tier->checksum_failures(), 0u);
}

TEST_F(SsdEncryptTest, LayersComeBackInPieces) {
  auto tier = Open();
  const BlockHeader header = Header(tier.get(), 4);
  ASSERT_TRUE(Write(tier.get(), 4, header).ok());
  HostSlot host, expected;
  expected.Fill(kLayout, header.depth);
  for (uint32_t layer = 0; layer < kLayout.num_layers; ++layer) {
    tier->StartRead(4, header, layer, 1, host.data(), layer);
  }
  for (const SsdCompletion& done : Drain(tier.get())) {
    EXPECT_TRUE(done.status.ok()) << done.status.message();
  }
  EXPECT_TRUE(host.SamePayload(expected));
}

TEST_F(SsdEncryptTest, TwoWritesOfOneBlockShareNoByte) {
  auto tier = Open();
  const BlockHeader header = Header(tier.get(), 1);
  ASSERT_TRUE(Write(tier.get(), 0, header).ok());
  ASSERT_TRUE(Write(tier.get(), 1, header).ok());
  const SlotBytes a = Slot(0), b = Slot(1);
  const uint64_t from = kLayout.host_slice_offset(0);
  uint32_t equal = 0;
  for (uint64_t i = 0; i < kLayout.slice_bytes(); ++i) equal += a[from + i] == b[from + i];
  EXPECT_LT(equal, kLayout.slice_bytes() / 64) << "a fresh key each time";
}

TEST_F(SsdEncryptTest, NoPlainByteRunIsInAnyFile) {
  auto tier = Open();
  HostSlot host;
  const std::string marker = "a-marker-of-plain-bytes-in-every-place-of-a-slice";
  for (uint64_t i = kPage; i < host.size(); ++i) {
    host.data()[i] = static_cast<std::byte>(marker[i % marker.size()]);
  }
  tier->StartWrite(0, Header(tier.get(), 0), false, host.data(), 1);
  ASSERT_TRUE(Drain(tier.get()).at(0).status.ok());
  tier.reset();
  uint32_t files = 0;
  for (const auto& entry : fs::directory_iterator(dir_ / "kv")) {
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), {});
    for (size_t i = 0; i + 8 <= marker.size(); ++i) {
      EXPECT_EQ(bytes.find(marker.substr(i, 8)), std::string::npos) << entry.path();
    }
    ++files;
  }
  EXPECT_EQ(files, 3u);  // LOCK, blocks, tenants
  // The padding of the host slot was not zero; that on the disk is.
  const SlotBytes bytes = Slot(0);
  for (uint32_t layer = 0; layer < kLayout.num_layers; ++layer) {
    const uint64_t end = kLayout.host_slice_offset(layer) + kLayout.slice_bytes();
    EXPECT_TRUE(std::all_of(bytes.begin() + end,
                            bytes.begin() + kLayout.host_slice_offset(layer + 1),
                            [](uint8_t b) { return b == 0; }));
  }
}

TEST_F(SsdEncryptTest, AnyFlippedByteOfAPayloadIsFound) {
  auto tier = Open();
  const BlockHeader header = Header(tier.get(), 2);
  ASSERT_TRUE(Write(tier.get(), 0, header).ok());
  uint32_t found = 0;
  for (uint32_t layer = 0; layer < kLayout.num_layers; ++layer) {
    for (uint64_t i = 0; i < kLayout.slice_bytes(); i += 7) {
      const uint64_t at = SlotOffset(0) + kLayout.host_slice_offset(layer) + i;
      FlipByte(file_, at);
      const Status status = Read(tier.get(), 0, header);
      EXPECT_EQ(status.code(), Code::kCorrupt);
      EXPECT_TRUE(Has(status, "the tag of layer " + std::to_string(layer))) << status.message();
      FlipByte(file_, at);
      ++found;
    }
  }
  EXPECT_GT(found, 1000u);
  EXPECT_TRUE(Read(tier.get(), 0, header).ok());
}

TEST_F(SsdEncryptTest, AnyFlippedByteOfAHeaderIsFoundAlsoBelowAChecksumThatFits) {
  auto tier = Open();
  const BlockHeader header = Header(tier.get(), 2);
  ASSERT_TRUE(Write(tier.get(), 0, header).ok());
  const auto good = ReadRaw<BlockPage>(file_, SlotOffset(0));
  const auto used = offsetof(BlockPage, seals) + kLayout.num_layers * sizeof(SliceSeal);
  uint32_t resealed = 0;
  for (uint64_t i = 0; i < kPage; ++i) {
    auto bytes = std::bit_cast<std::array<uint8_t, kPage>>(good);
    bytes[i] ^= 0x04;
    WriteRaw(file_, SlotOffset(0), bytes);
    EXPECT_EQ(Read(tier.get(), 0, header).code(), Code::kCorrupt) << i;
    if (i >= offsetof(BlockPage, checksum)) continue;
    auto page = std::bit_cast<BlockPage>(bytes);
    Seal(uuid(), &page);
    WriteRaw(file_, SlotOffset(0), page);
    const Status status = Read(tier.get(), 0, header);
    const bool meant =
        i < used && !(i >= offsetof(BlockPage, zero) && i < offsetof(BlockPage, seals));
    if (meant) {
      EXPECT_EQ(status.code(), Code::kCorrupt) << i;
      ++resealed;
    }
  }
  EXPECT_GT(resealed, 170u);
}

TEST_F(SsdEncryptTest, SwapsAndReplaysFail) {
  auto tier = Open();
  std::vector<BlockHeader> headers;
  std::vector<SlotBytes> good;
  for (uint32_t n = 0; n < 8; ++n) {
    headers.push_back(Header(tier.get(), n, n < 6 ? "alice" : "bob"));
    ASSERT_TRUE(Write(tier.get(), n, headers[n]).ok());
    good.push_back(Slot(n));
  }
  std::mt19937 random(20261122);
  uint32_t fired[6] = {};
  for (uint32_t round = 0; round < 1000; ++round) {
    const uint32_t kind = round % 6;
    const uint32_t a = random() % 6, b = (a + 1 + random() % 5) % 6;  // of one tenant
    const uint32_t i = random() % 3, j = (i + 1 + random() % 2) % 3;  // layers
    BlockHeader header = headers[a];
    SlotBytes bytes = good[a];
    const auto take_slice = [&](uint32_t block, uint32_t from, uint32_t to) {
      auto& page = *reinterpret_cast<BlockPage*>(bytes.data());
      page.seals[to] = reinterpret_cast<const BlockPage*>(good[block].data())->seals[from];
      std::copy_n(good[block].begin() + kLayout.host_slice_offset(from), kLayout.slice_bytes(),
                  bytes.begin() + kLayout.host_slice_offset(to));
    };
    if (kind == 0) {  // two layers of one block change places
      take_slice(a, j, i);
      take_slice(a, i, j);
    } else if (kind == 1) {  // a layer of another block of the same tenant
      take_slice(b, i, i);
    } else if (kind == 2) {  // the whole of another block, under this one's name
      bytes = good[b];
    } else if (kind == 3) {  // an older generation as the newest
      header.generation += 1 + random() % 100;
    } else if (kind == 4) {  // a block of another tenant
      bytes = good[6 + random() % 2];
    } else {  // this block as another tenant's
      header.tenant = headers[6].tenant;
    }
    Plant(a, bytes, header);
    const Status status = Read(tier.get(), a, header);
    EXPECT_EQ(status.code(), Code::kCorrupt) << "kind " << kind;
    EXPECT_TRUE(Has(status, "the tag of layer")) << status.message();
    fired[kind] += !status.ok();
    WriteRaw(file_, SlotOffset(a), good[a]);
    ASSERT_TRUE(Read(tier.get(), a, headers[a]).ok()) << "put back";
  }
  for (uint32_t count : fired) EXPECT_GE(count, 166u);
}

TEST_F(SsdEncryptTest, ABadSliceIsWipedAndAFlipOnTheWayIsReadAgain) {
  FaultPlan plan;
  SsdOptions options = Options();
  options.io.wrap = plan.Wrap();
  auto tier = MustOpen(options);
  (void)tier->keys()->RootOf({}, "alice");
  const BlockHeader header = Header(tier.get(), 3);
  ASSERT_TRUE(Write(tier.get(), 0, header).ok());
  plan.Add({.op = IoOp::kRead, .kind = FaultKind::kFlip, .flip_byte = kPage + 9});
  EXPECT_TRUE(Read(tier.get(), 0, header).ok());
  EXPECT_EQ(plan.fired(), 1u);
  EXPECT_EQ(tier->checksum_failures(), 1u);

  FlipByte(file_, SlotOffset(0) + kLayout.host_slice_offset(1));
  HostSlot host;
  tier->StartRead(0, header, 0, 3, host.data(), 2);
  EXPECT_EQ(Drain(tier.get()).at(0).status.code(), Code::kCorrupt);
  const std::byte* slice = host.data() + kLayout.host_slice_offset(1);
  EXPECT_TRUE(std::all_of(slice, slice + kLayout.slice_bytes(),
                          [](std::byte b) { return b == std::byte{0}; }));
}

TEST_F(SsdEncryptTest, WithoutTheRightKeyTheStoreIsRefused) {
  {
    auto tier = Open();
    ASSERT_TRUE(Write(tier.get(), 0, Header(tier.get(), 0)).ok());
  }
  SsdOptions options = SmallStore(dir_ / "kv");
  Status status = SsdTier::Open(options).status();
  EXPECT_EQ(status.code(), Code::kMismatch);
  EXPECT_TRUE(Has(status, "cipher is AES-256-GCM")) << status.message();

  WriteMasterKey(dir_ / "other", 'o');
  for (const bool read_only : {false, true}) {
    options.keys = MustLoad(dir_ / "other");
    options.read_only = read_only;
    status = SsdTier::Open(options).status();
    EXPECT_EQ(status.code(), Code::kMismatch);
    EXPECT_TRUE(Has(status, "key_check")) << status.message();
  }
  MustOpen(SmallStore(dir_ / "plain")).reset();
  options = SmallStore(dir_ / "plain");
  options.keys = MustLoad(dir_ / "key");
  status = SsdTier::Open(options).status();
  EXPECT_EQ(status.code(), Code::kMismatch);
  EXPECT_TRUE(Has(status, "cipher is none")) << status.message();
  EXPECT_FALSE(fs::exists(dir_ / "plain/tenants"));

  // Headers are plain, so that `inspect` and `check` can count them; bytes are not.
  options = SmallStore(dir_ / "kv");
  options.read_only = true;
  auto reader = MustOpen(options);
  const auto blocks = reader->Scan({}).value();
  ASSERT_EQ(blocks.size(), 1u);
  EXPECT_TRUE(Has(Read(reader.get(), 0, blocks[0].header), "there is no master key"));
  EXPECT_TRUE(ReadSsdInfo(dir_ / "kv").value().encrypted);
  EXPECT_FALSE(ReadSsdInfo(dir_ / "plain").value().encrypted);
}

TEST_F(SsdEncryptTest, AnUnknownCipherIsRefused) {
  Open().reset();
  auto pages = ReadRaw<std::array<Superblock, 2>>(file_, 0);
  for (Superblock& superblock : pages) {
    superblock.cipher = 7;
    Seal(&superblock);
  }
  WriteRaw(file_, 0, pages);
  const Status status = SsdTier::Open(Options()).status();
  EXPECT_EQ(status.code(), Code::kMismatch);
  EXPECT_TRUE(Has(status, "cipher is 7")) << status.message();
}

TEST_F(SsdEncryptTest, ErasedBlocksAreGone) {
  {
    auto tier = Open();
    ASSERT_TRUE(Write(tier.get(), 0, Header(tier.get(), 0, "alice")).ok());
    ASSERT_TRUE(Write(tier.get(), 1, Header(tier.get(), 1, "bob")).ok());
    const auto busy = EraseTenant(dir_ / "kv", dir_ / "key", "alice");
    EXPECT_EQ(busy.status().code(), Code::kBusy);
    EXPECT_TRUE(Read(tier.get(), 0, Header(tier.get(), 0, "alice")).ok());
  }
  WriteMasterKey(dir_ / "other", 'o');
  EXPECT_EQ(EraseTenant(dir_ / "kv", dir_ / "other", "alice").status().code(), Code::kMismatch);
  EXPECT_EQ(EraseTenant(dir_ / "none", dir_ / "key", "alice").status().code(), Code::kIo);
  EXPECT_FALSE(fs::exists(dir_ / "none"));
  EXPECT_FALSE(EraseTenant(dir_ / "kv", dir_ / "key", "carol").value());
  EXPECT_TRUE(EraseTenant(dir_ / "kv", dir_ / "key", "alice").value());
  EXPECT_FALSE(EraseTenant(dir_ / "kv", dir_ / "key", "alice").value());

  auto tier = MustOpen(Options());
  EXPECT_FALSE(tier->keys()->Has(tier->keys()->IdOf("alice")));
  EXPECT_EQ(Read(tier.get(), 0, Header(tier.get(), 0, "alice")).code(), Code::kCorrupt);
  EXPECT_TRUE(Read(tier.get(), 1, Header(tier.get(), 1, "bob")).ok());
  (void)tier->keys()->RootOf({}, "alice");  // a new key opens no old block
  EXPECT_EQ(Read(tier.get(), 0, Header(tier.get(), 0, "alice")).code(), Code::kCorrupt);
}

}  // namespace
}  // namespace cachedattn
