// Stores of every released format, kept as files in golden/. Those of this format are read, and
// written again byte for byte; others are refused.
//   vN_new.gz   an empty store, as it is made (its uuid is random, and all sums depend on it)
//   vN.gz       the same one after `WriteAll`
//   vN_encrypted.gz, vN_encrypted.tenants   an encrypted one, which is read only: no two are alike
// golden_test --make and --make-encrypted write those of this format: only together with a new
// kSsdVersion, before a format's first release, or when the KV of testing/player.h, which is in
// them, has changed.
#include <filesystem>
#include <iterator>

#include "tests/native/testing/ledger.h"
#include "tests/native/testing/master_key.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

const std::string kFolder = CACHEDATTN_GOLDEN;
const std::string kVersion = "v" + std::to_string(kSsdVersion);
const std::string kEncrypted = kVersion + "_encrypted";
constexpr uint32_t kSlots = 16;

StoreOptions Options(const std::string& path) {
  StoreOptions options = TinyOptions({24, 1, 0}, path);
  options.layout = {2, 1, 8, kBlock, DType::kBFloat16};
  options.dram_bytes = 24 * options.layout.host_slot_bytes();
  options.ssd_bytes = SsdFileBytes(options.layout, kSlots);
  return options;
}

// Of the encrypted store `dir`/kv.
StoreOptions EncryptedOptions(const TempDir& dir) {
  StoreOptions options = Options(dir / "kv");
  options.master_key_file = dir / "key";
  WriteMasterKey(options.master_key_file);
  return options;
}

std::string Bytes(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  EXPECT_TRUE(in.good()) << file;
  return {std::istreambuf_iterator<char>(in), {}};
}

// Puts a golden file in place as the store `path`.
void Unpack(const std::string& name, const std::string& path) {
  fs::create_directory(path);
  const std::string command =
      "gzip -dc '" + kFolder + "/" + name + ".gz' > '" + BlocksFile(path) + "'";
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
}

struct Conversation {
  Tokens tokens;
  Truncation truncation;
};
// One with a part-filled tail, a branch of it, and one that overflows.
std::vector<Conversation> Conversations() {
  return {{MakeTokens(2 * kBlock, 1) + MakeTokens(kBlock + 5, 2), {}},
          {MakeTokens(2 * kBlock, 1) + MakeTokens(kBlock, 3), {}},
          {MakeTokens(6 * kBlock, 4), {4 * kBlock, 0.5, 4}}};
}

// What the golden store holds: written in this order, on a store that is empty.
void WriteAll(const StoreOptions& options) {
  auto store = MustOpenStore(options);
  for (const Conversation& conversation : Conversations()) {
    EXPECT_EQ(PlayThrough(store.get(), conversation.tokens, conversation.truncation) % kBlock, 0u);
    store->Flush();
  }
  EXPECT_EQ(store->stats().failed_saves, 0u);
  ASSERT_TRUE(store->Close().ok());
}

void ReadAll(const StoreOptions& options) {
  EXPECT_TRUE(ReadSsdInfo(options.path).value().clean);
  auto store = MustOpenStore(options);
  for (const Conversation& conversation : Conversations()) {
    const Tokens longer = conversation.tokens + MakeTokens(1, 9);
    EXPECT_EQ(PlayThrough(store.get(), longer, conversation.truncation),
              conversation.tokens.size());
  }
  EXPECT_GT(store->stats().tokens_from[2], 0u);
  EXPECT_EQ(store->stats().checksum_failures, 0u);
}

TEST(Golden, IsReadRight) {
  TempDir dir;
  Unpack(kVersion, dir / "kv");
  ReadAll(Options(dir / "kv"));
}

TEST(Golden, TheEncryptedOneIsReadRight) {
  TempDir dir;
  Unpack(kEncrypted, dir / "kv");
  const std::string tenants = dir / "kv/tenants";
  fs::copy_file(kFolder + "/" + kEncrypted + ".tenants", tenants);
  fs::permissions(tenants, fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_TRUE(ReadSsdInfo(dir / "kv").value().encrypted);
  EXPECT_EQ(AttentionStore::Open(Options(dir / "kv")).status().code(), Code::kMismatch);
  ReadAll(EncryptedOptions(dir));
}

TEST(Golden, ThisBuildWritesTheSameBytes) {
  TempDir dir;
  Unpack(kVersion + "_new", dir / "kv");
  Unpack(kVersion, dir / "golden");
  WriteAll(Options(dir / "kv"));
  const std::string written = Bytes(BlocksFile(dir / "kv"));
  const std::string golden = Bytes(BlocksFile(dir / "golden"));
  ASSERT_EQ(written.size(), golden.size());
  const auto differ = std::mismatch(written.begin(), written.end(), golden.begin());
  EXPECT_TRUE(differ.first == written.end())
      << "the format has changed at byte " << differ.first - written.begin()
      << " of the file: raise kSsdVersion, and add its golden files (golden_test --make)";
}

TEST(Golden, ThisBuildMakesTheSameStore) {
  TempDir dir;
  Unpack(kVersion + "_new", dir / "golden");
  MustOpenStore(Options(dir / "kv")).reset();
  const std::string made = Bytes(BlocksFile(dir / "kv"));
  const std::string golden = Bytes(BlocksFile(dir / "golden"));
  ASSERT_EQ(made.size(), golden.size());
  for (uint64_t i = 0; i < made.size(); ++i) {
    const uint64_t in_page = i % kPage;
    const bool uuid = i < 2 * kPage && in_page >= offsetof(Superblock, uuid) &&
                      in_page < offsetof(Superblock, uuid) + sizeof(Uuid);
    // Every page ends with a sum, of the uuid too.
    if (uuid || in_page >= offsetof(Superblock, checksum)) continue;
    ASSERT_EQ(made[i], golden[i]) << "byte " << i << " of a new store's file";
  }
}

TEST(Golden, OtherFormatsAreRefused) {
  uint32_t others = 0;
  for (const auto& entry : fs::directory_iterator(kFolder)) {
    const std::string name = entry.path().stem();
    if (name.starts_with(kVersion) || entry.path().extension() != ".gz") continue;
    ++others;
    SCOPED_TRACE(name);
    TempDir dir;
    Unpack(name, dir / "kv");
    const std::string before = Bytes(BlocksFile(dir / "kv"));
    const Status status = AttentionStore::Open(Options(dir / "kv")).status();
    EXPECT_EQ(status.code(), Code::kMismatch);
    EXPECT_NE(status.message().find("this build reads version"), std::string::npos);
    EXPECT_TRUE(Bytes(BlocksFile(dir / "kv")) == before);
  }
  EXPECT_GT(others, 0u);
}

bool Pack(const std::string& path, const std::string& name) {
  const std::string command =
      "gzip -9nc '" + BlocksFile(path) + "' > '" + kFolder + "/" + name + ".gz'";
  return std::system(command.c_str()) == 0;
}

int Make() {
  TempDir dir;
  MustOpenStore(Options(dir / "kv")).reset();
  if (!Pack(dir / "kv", kVersion + "_new")) return 1;
  WriteAll(Options(dir / "kv"));
  return Pack(dir / "kv", kVersion) ? 0 : 1;
}

int MakeEncrypted() {
  TempDir dir;
  WriteAll(EncryptedOptions(dir));
  fs::copy_file(dir / "kv/tenants", kFolder + "/" + kEncrypted + ".tenants",
                fs::copy_options::overwrite_existing);
  return Pack(dir / "kv", kEncrypted) ? 0 : 1;
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const std::string argument = argc == 2 ? argv[1] : "";
  if (argument == "--make") return cachedattn::Make();
  if (argument == "--make-encrypted") return cachedattn::MakeEncrypted();
  return RUN_ALL_TESTS();
}
