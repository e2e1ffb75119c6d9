// The master key's file and the list of tenants: who may open them, what damage does, what a
// restart and an erase leave.
#include "csrc/tier/key_ring.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

constexpr std::array<uint8_t, 16> kUuid = {1, 2, 3};
constexpr int64_t kDeadlineUs = 10'000'000;

bool Has(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

class KeyRingTest : public ::testing::Test {
 protected:
  void Write(const std::string& name, const std::string& text, mode_t mode = 0600) {
    std::ofstream(dir_ / name, std::ios::binary) << text;
    ASSERT_EQ(::chmod((dir_ / name).c_str(), mode), 0);
  }
  std::string Read(const std::string& name) {
    std::ifstream in(dir_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  Status OpenStatus(const std::string& name) { return KeyRing::Open(dir_ / name).status(); }

  std::unique_ptr<KeyRing> Master(const std::string& name = "master") {
    if (!fs::exists(dir_ / name)) Write(name, std::string(32, 'k'));
    auto ring = KeyRing::Open(dir_ / name);
    EXPECT_TRUE(ring.ok()) << ring.status().message();
    return std::move(ring.value());
  }
  std::unique_ptr<KeyRing> Bound() {
    auto ring = Master();
    const Status status = ring->Bind(dir_.path(), kUuid, kDeadlineUs);
    EXPECT_TRUE(status.ok()) << status.message();
    return ring;
  }
  Status BindStatus() { return Master()->Bind(dir_.path(), kUuid, kDeadlineUs); }

  TempDir dir_;
};

TEST_F(KeyRingTest, TheMasterKeyIs32BytesOr64Digits) {
  std::string hex;
  for (int i = 0; i < 32; ++i) hex += "6b";  // 'k'
  Write("hex", hex);
  Write("upper", "6B" + hex.substr(2) + "\n");
  Write("raw", std::string(32, 'k'));
  const auto check = KeyRing::Open(dir_ / "hex").value()->CheckOf(kUuid);
  EXPECT_EQ(KeyRing::Open(dir_ / "upper").value()->CheckOf(kUuid), check);
  EXPECT_EQ(KeyRing::Open(dir_ / "raw").value()->CheckOf(kUuid), check);
  EXPECT_NE(KeyRing::Open(dir_ / "raw").value()->CheckOf({}), check) << "of another store";

  for (const std::string& text :
       {std::string(), std::string(31, 'k'), std::string(33, 'k'), hex.substr(1), hex + "6",
        hex.substr(1) + "g", hex + " ", std::string(100'000, '6')}) {
    Write("bad", text);
    const Status status = OpenStatus("bad");
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << text.size();
    EXPECT_TRUE(Has(status, dir_ / "bad")) << status.message();
    EXPECT_TRUE(Has(status, "32 bytes or 64 hexadecimal digits")) << status.message();
    EXPECT_TRUE(Has(status, "has " + std::to_string(text.size()) + " bytes")) << status.message();
  }
}

TEST_F(KeyRingTest, AMasterKeyThatOthersMayReadIsRefused) {
  Write("key", std::string(32, 'k'), 0400);
  EXPECT_TRUE(OpenStatus("key").ok());
  for (const mode_t mode : {0640, 0604, 0620, 0610, 0666}) {
    Write("key", std::string(32, 'k'), mode);
    const Status status = OpenStatus("key");
    EXPECT_EQ(status.code(), Code::kIo);
    EXPECT_TRUE(Has(status, "must have mode 0600")) << status.message();
  }
}

TEST_F(KeyRingTest, WhatIsNoRegularFileIsRefused) {
  EXPECT_TRUE(Has(OpenStatus("absent"), "No such file"));
  Write("key", std::string(32, 'k'));
  fs::create_symlink(dir_ / "key", dir_ / "link");
  EXPECT_TRUE(Has(OpenStatus("link"), "symbolic link"));
  fs::create_directory(dir_ / "folder");
  EXPECT_TRUE(Has(OpenStatus("folder"), "not a regular file"));
  ASSERT_EQ(::mkfifo((dir_ / "fifo").c_str(), 0600), 0);
  EXPECT_TRUE(Has(OpenStatus("fifo"), "not a regular file"));
  EXPECT_TRUE(Has(KeyRing::Open("/dev/null").status(), "not a regular file"));
}

TEST_F(KeyRingTest, AnotherUsersFileIsRefused) {
  Write("key", std::string(32, 'k'), 0600);
  if (::geteuid() != 0 || ::chown((dir_ / "key").c_str(), 12345, 12345) != 0) {
    GTEST_SKIP() << "needs root, to give a file away";
  }
  EXPECT_TRUE(Has(OpenStatus("key"), "belongs to another user")) << OpenStatus("key").message();
}

TEST_F(KeyRingTest, ATenantsKeyComesBackAndIsNotAnothers) {
  BlockKey alice, bob;
  {
    const auto ring = Bound();
    EXPECT_FALSE(ring->Has(ring->IdOf("alice")));
    alice = ring->RootOf({}, "alice");
    bob = ring->RootOf({}, "bob");
    EXPECT_TRUE(ring->Has(ring->IdOf("alice")));
    EXPECT_EQ(ring->RootOf({}, "alice"), alice);
  }
  EXPECT_NE(alice, bob);
  EXPECT_NE(alice, RootKey({}, "alice")) << "a secret is part of it";
  const auto ring = Bound();
  EXPECT_TRUE(ring->Has(ring->IdOf("alice")));
  EXPECT_FALSE(ring->Has(ring->IdOf("carol")));
  EXPECT_EQ(ring->RootOf({}, "alice"), alice);
  EXPECT_EQ(ring->RootOf({}, "bob"), bob);
  Digest other_model;
  other_model.bytes[0] = 1;
  EXPECT_NE(ring->RootOf(other_model, "bob"), bob);

  // A block of alice's opens with her cipher and her salt only.
  const Salt salt = {7}, other_salt = {8};
  std::array<std::byte, 100> bytes{};
  const Nonce nonce{};
  const GcmTag tag =
      ring->CipherOf(ring->IdOf("alice"), salt)->Seal(nonce, {}, bytes, bytes.data());
  auto copy = bytes;
  EXPECT_FALSE(ring->CipherOf(ring->IdOf("bob"), salt)->Open(nonce, {}, tag, bytes, copy.data()));
  EXPECT_FALSE(
      ring->CipherOf(ring->IdOf("alice"), other_salt)->Open(nonce, {}, tag, bytes, copy.data()));
  EXPECT_TRUE(ring->CipherOf(ring->IdOf("alice"), salt)->Open(nonce, {}, tag, bytes, copy.data()));
  EXPECT_EQ(ring->CipherOf(ring->IdOf("carol"), salt), nullptr);
}

TEST_F(KeyRingTest, TheFileIsPrivateAndNamesNobody) {
  const mode_t mask = ::umask(0);
  Bound()->RootOf({}, "a-name-to-look-for");
  ::umask(mask);
  struct stat info;
  ASSERT_EQ(::stat((dir_ / "tenants").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
  EXPECT_EQ(Read("tenants").size(), 32u + 76 + 8);
  EXPECT_EQ(Read("tenants").find("look-for"), std::string::npos);
  EXPECT_FALSE(fs::exists(dir_ / "tenants.new"));
}

TEST_F(KeyRingTest, ErasedIsErased) {
  const std::string before = [&] {
    const auto ring = Bound();
    const BlockKey root = ring->RootOf({}, "alice");
    (void)ring->RootOf({}, "bob");
    const std::string bytes = Read("tenants");
    EXPECT_TRUE(ring->Erase(ring->IdOf("alice")).value());
    EXPECT_FALSE(ring->Has(ring->IdOf("alice")));
    EXPECT_EQ(ring->CipherOf(ring->IdOf("alice"), {}), nullptr);
    EXPECT_FALSE(ring->Erase(ring->IdOf("alice")).value()) << "there is no key any more";
    EXPECT_NE(Read("tenants"), bytes);
    EXPECT_NE(ring->RootOf({}, "alice"), root) << "a new tenant of the same name";
    EXPECT_TRUE(ring->Erase(ring->IdOf("alice")).value());
    return bytes;
  }();
  const auto ring = Bound();
  EXPECT_FALSE(ring->Has(ring->IdOf("alice")));
  EXPECT_TRUE(ring->Has(ring->IdOf("bob")));
  const std::string after = Read("tenants");
  EXPECT_EQ(after.size(), 32u + 76 + 8);
  EXPECT_EQ(before.size(), 32u + 2 * 76 + 8);
  // One of the two entries is left, and it is bob's.
  const bool first = after.substr(48, 60) == before.substr(48, 60);
  const bool second = after.substr(48, 60) == before.substr(48 + 76, 60);
  EXPECT_NE(first, second);
}

TEST_F(KeyRingTest, AnyFlippedByteOfTheFileIsFound) {
  (void)Bound()->RootOf({}, "alice");
  const std::string good = Read("tenants");
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x20);
    Write("tenants", bad);
    const Status status = BindStatus();
    EXPECT_TRUE(status.code() == Code::kCorrupt || status.code() == Code::kMismatch) << i;
    EXPECT_TRUE(Has(status, dir_ / "tenants")) << status.message();
  }
  for (size_t length = 0; length < good.size(); ++length) {
    Write("tenants", good.substr(0, length));
    EXPECT_EQ(BindStatus().code(), Code::kCorrupt) << length;
  }
  Write("tenants", good + "x");
  EXPECT_EQ(BindStatus().code(), Code::kCorrupt);
  Write("tenants", std::string(10 << 20, '\0'));
  EXPECT_TRUE(Has(BindStatus(), "length of 10485760 bytes"));
  Write("tenants", good);
  EXPECT_TRUE(BindStatus().ok());
}

TEST_F(KeyRingTest, TheTenantsOfAnotherStoreOrMasterKeyAreRefused) {
  (void)Bound()->RootOf({}, "alice");
  const Status other_store = Master()->Bind(dir_.path(), {9}, kDeadlineUs);
  EXPECT_EQ(other_store.code(), Code::kMismatch);
  EXPECT_TRUE(Has(other_store, "uuid")) << other_store.message();
  Write("other", std::string(32, 'o'));
  EXPECT_EQ(Master("other")->Bind(dir_.path(), kUuid, kDeadlineUs).code(), Code::kCorrupt);
}

TEST_F(KeyRingTest, NothingButAPrivateRegularFileIsRead) {
  (void)Bound()->RootOf({}, "alice");
  ASSERT_EQ(::chmod((dir_ / "tenants").c_str(), 0644), 0);
  EXPECT_TRUE(Has(BindStatus(), "must have mode 0600"));
  ASSERT_EQ(::chmod((dir_ / "tenants").c_str(), 0600), 0);
  fs::rename(dir_ / "tenants", dir_ / "elsewhere");
  fs::create_symlink(dir_ / "elsewhere", dir_ / "tenants");
  EXPECT_TRUE(Has(BindStatus(), "symbolic link"));
  fs::remove(dir_ / "tenants");
  ASSERT_EQ(::mkfifo((dir_ / "tenants").c_str(), 0600), 0);
  EXPECT_TRUE(Has(BindStatus(), "not a regular file"));
}

TEST_F(KeyRingTest, AKeyThatCannotBeWrittenServesThisProcess) {
  fs::create_directory(dir_ / "tenants.new");  // in the way of the temporary file
  Write("tenants.new/x", "");
  BlockKey root;
  {
    const auto ring = Bound();
    root = ring->RootOf({}, "alice");
    EXPECT_EQ(ring->RootOf({}, "alice"), root);
    EXPECT_NE(ring->CipherOf(ring->IdOf("alice"), {}), nullptr);
    EXPECT_FALSE(fs::exists(dir_ / "tenants"));
    const auto erased = ring->Erase(ring->IdOf("alice"));
    EXPECT_EQ(erased.status().code(), Code::kIo);
    EXPECT_TRUE(Has(erased.status(), "tenants.new")) << erased.status().message();
    EXPECT_TRUE(ring->Has(ring->IdOf("alice"))) << "not erased";
  }
  {
    const auto ring = Bound();
    EXPECT_FALSE(ring->Has(ring->IdOf("alice"))) << "a restart forgets it";
    (void)ring->RootOf({}, "alice");
    fs::remove_all(dir_ / "tenants.new");
    root = ring->RootOf({}, "alice");  // and tries again
    EXPECT_TRUE(fs::exists(dir_ / "tenants"));
  }
  EXPECT_EQ(Bound()->RootOf({}, "alice"), root);
}

}  // namespace
}  // namespace cachedattn
