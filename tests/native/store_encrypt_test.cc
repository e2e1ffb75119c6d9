// An encrypted store: tenants apart, nothing plain on the disk or in a core dump, and erase.
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <filesystem>
#include <set>

#include "tests/native/testing/mappings.h"
#include "tests/native/testing/master_key.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

// K of the token at place `place` of a context, in layer 1 and head 0.
const std::byte* KAt(AttentionStore* store, std::span<const int32_t> table, uint32_t place) {
  const KvLayout& layout = store->layout();
  const AttentionStore::PoolView pool = store->pool();
  const auto slot = static_cast<uint64_t>(table[place / layout.block_size]);
  return pool.base + slot * pool.slot_stride + pool.layer_stride +
         place % layout.block_size * layout.head_dim * SizeOf(layout.dtype);
}

class StoreEncryptTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteMasterKey(dir_ / "key"); }

  StoreOptions Options(bool encrypt = true, uint32_t device = 0) {
    StoreOptions options = TinyOptions({16, 32, device}, dir_ / (encrypt ? "kv" : "plain"));
    if (encrypt) options.master_key_file = dir_ / "key";
    return options;
  }
  // What was reused at the beginning of a turn.
  static CachedTokens Play(AttentionStore* store, const std::string& tenant, const Tokens& tokens) {
    Turn turn(store, tokens, {}, tenant);
    EXPECT_TRUE(turn.Begin());
    const CachedTokens cached = turn.cached();
    turn.Finish();
    store->Drain();  // what is being saved is not found yet
    store->CheckInvariants();
    return cached;
  }
  static CachedTokens Find(AttentionStore* store, const std::string& tenant, const Tokens& tokens) {
    const auto chain = store->NewChain(tenant, {});
    chain->Append(tokens);
    return store->Lookup(*chain);
  }

  const Tokens tokens_ = MakeTokens(4 * kBlock + 3, 1);
  TempDir dir_;
};

TEST_F(StoreEncryptTest, TenantsAreApartOnEveryTierAndAfterARestart) {
  const auto size = static_cast<uint32_t>(tokens_.size());
  for (const uint32_t device : {0u, 20u}) {
    fs::remove_all(dir_ / "kv");
    auto store = MustOpenStore(Options(true, device));
    EXPECT_EQ(Play(store.get(), "alice", tokens_).total, 0u);
    store->Flush();  // a tail on the device is a hit when it is saved
    EXPECT_EQ(Find(store.get(), "bob", tokens_ + tokens_).total, 0u);
    EXPECT_EQ(Play(store.get(), "alice", tokens_ + tokens_).total, size);
    store->Flush();
    store->DropTier(Tier::kDevice);
    store->DropTier(Tier::kDram);
    EXPECT_EQ(Find(store.get(), "bob", tokens_ + tokens_).total, 0u);
    EXPECT_EQ(From(Play(store.get(), "alice", tokens_ + tokens_ + tokens_), Tier::kSsd), 2 * size);
    ASSERT_TRUE(store->Close().ok());
    store.reset();
    store = MustOpenStore(Options(true, device));
    EXPECT_EQ(Play(store.get(), "bob", tokens_).total, 0u);
    EXPECT_EQ(From(Play(store.get(), "alice", tokens_ + MakeTokens(5, 9)), Tier::kSsd),
              4 * kBlock + 0u);
    EXPECT_EQ(store->stats().checksum_failures, 0u);
  }
}

TEST_F(StoreEncryptTest, OptionsAndKeysAreChecked) {
  StoreOptions options = Options();
  options.ssd_bytes = 0;
  EXPECT_EQ(AttentionStore::Open(options).status().code(), Code::kInvalidArgument);
  options = Options();
  options.master_key_file = dir_ / "absent";
  EXPECT_EQ(AttentionStore::Open(options).status().code(), Code::kIo);
  EXPECT_FALSE(fs::exists(dir_ / "kv")) << "nothing is made without a key";
  MustOpenStore(Options()).reset();
  options = Options();
  options.master_key_file = "";
  EXPECT_EQ(AttentionStore::Open(options).status().code(), Code::kMismatch);
  WriteMasterKey(dir_ / "other", 'o');
  options.master_key_file = dir_ / "other";
  EXPECT_EQ(AttentionStore::Open(options).status().code(), Code::kMismatch);
  EXPECT_TRUE(AttentionStore::Open(Options()).ok()) << "a refusal changes nothing";
}

TEST_F(StoreEncryptTest, NothingPlainAndNoTokenIsOnTheDisk) {
  uint32_t found[2] = {};
  for (const bool encrypt : {false, true}) {
    // Runs of K, and of tokens, that stand nowhere else.
    std::set<std::string> needles;
    {
      auto store = MustOpenStore(Options(encrypt));
      Turn turn(store.get(), tokens_, {}, "alice");
      ASSERT_TRUE(turn.Begin());
      ASSERT_TRUE(turn.Step(4 * kBlock).ok());
      const auto table = turn.sequence()->block_table();
      for (uint32_t place = 0; place < 4 * kBlock; place += 5) {
        const auto* k = reinterpret_cast<const char*>(KAt(store.get(), table, place));
        needles.emplace(k, 16);
      }
      turn.Finish();
      ASSERT_TRUE(store->Close().ok());
    }
    for (size_t i = 0; i + 4 <= tokens_.size(); ++i) {
      needles.emplace(reinterpret_cast<const char*>(tokens_.data() + i), 4 * sizeof(TokenId));
    }
    needles.insert("alice");
    for (const auto& entry : fs::directory_iterator(dir_ / (encrypt ? "kv" : "plain"))) {
      std::ifstream in(entry.path(), std::ios::binary);
      const std::string bytes((std::istreambuf_iterator<char>(in)), {});
      for (const std::string& needle : needles) {
        found[encrypt] += bytes.find(needle) != std::string::npos;
      }
    }
  }
  EXPECT_GE(found[0], 10u) << "the search finds what is there";
  EXPECT_EQ(found[1], 0u);
}

TEST_F(StoreEncryptTest, TheKeysOfBlocksSayNothingOfTheTokens) {
  auto store = MustOpenStore(Options());
  const auto chain = store->NewChain("alice", {});
  chain->Append(tokens_);
  Chain guess(TenantIdOf("alice"), RootKey(Options().identity, "alice"), kBlock, {});
  guess.Append(tokens_);
  EXPECT_NE(chain->key(0), guess.key(0));
  EXPECT_NE(chain->tenant(), guess.tenant());
  WriteMasterKey(dir_ / "other", 'o');
  StoreOptions other = Options();
  other.path = dir_ / "second";
  const auto elsewhere = MustOpenStore(other)->NewChain("alice", {});
  EXPECT_NE(chain->tenant(), elsewhere->tenant()) << "two stores cannot be linked by their tenants";
}

// Counts a pattern in all memory that a core dump would hold. The pattern is handed over with
// every byte inverted, so that the search does not find itself.
uint32_t CountInDump(const std::vector<uint8_t>& inverted) {
  std::vector<uint8_t> chunk(1 << 20);
  uint32_t found = 0;
  for (const Mapping& mapping : Mappings()) {
    if (!mapping.readable || !mapping.dumped) continue;
    for (uint64_t at = mapping.begin; at < mapping.end; at += chunk.size() - inverted.size()) {
      const iovec local{chunk.data(), std::min<uint64_t>(chunk.size(), mapping.end - at)};
      const iovec remote{reinterpret_cast<void*>(at), local.iov_len};
      const ssize_t count = ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0);
      for (ssize_t i = 0; i + static_cast<ssize_t>(inverted.size()) <= count; ++i) {
        const uint8_t* bytes = chunk.data() + i;
        const bool here = bytes[0] == static_cast<uint8_t>(~inverted[0]) &&
                          std::equal(inverted.begin(), inverted.end(), bytes,
                                     [](uint8_t a, uint8_t b) { return b == (a ^ 0xFF); });
        found += here;
      }
    }
  }
  Wipe(chunk);
  return found;
}

TEST_F(StoreEncryptTest, ACoreDumpHoldsNeitherTheMasterKeyNorKv) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer keeps memory of its own";
#endif
  std::vector<uint8_t> inverted(32);
  FillRandom(inverted);
  {
    std::vector<uint8_t> key = inverted;
    for (uint8_t& byte : key) byte ^= 0xFF;
    EXPECT_GE(CountInDump(inverted), 1u) << "the search finds what is there";
    const UniqueFd fd(::open((dir_ / "key").c_str(), O_WRONLY | O_TRUNC));
    ASSERT_EQ(::write(fd.get(), key.data(), key.size()), 32);
    Wipe(key);
  }
  ASSERT_EQ(CountInDump(inverted), 0u);
  auto store = MustOpenStore(Options());
  Turn turn(store.get(), tokens_, {}, "alice");
  ASSERT_TRUE(turn.Begin());
  ASSERT_TRUE(turn.Step(4 * kBlock).ok());
  const auto* k =
      reinterpret_cast<const uint8_t*>(KAt(store.get(), turn.sequence()->block_table(), 7));
  std::vector<uint8_t> kv(k, k + 24);
  for (uint8_t& byte : kv) byte ^= 0xFF;
  turn.Finish();
  store->Flush();
  store->DropTier(Tier::kDram);
  EXPECT_EQ(From(Play(store.get(), "alice", tokens_ + tokens_), Tier::kSsd), tokens_.size());
  EXPECT_EQ(CountInDump(inverted), 0u) << "the master key";
  EXPECT_EQ(CountInDump(kv), 0u) << "K of a block";
}

TEST_F(StoreEncryptTest, AnErasedTenantIsGoneFromEveryTier) {
  for (const uint32_t device : {0u, 20u}) {
    fs::remove_all(dir_ / "kv");
    const Tokens longer = tokens_ + tokens_;
    auto store = MustOpenStore(Options(true, device));
    Play(store.get(), "alice", tokens_);
    Play(store.get(), "bob", tokens_);
    const auto old_chain = store->NewChain("alice", {});
    old_chain->Append(longer);
    {
      Turn turn(store.get(), longer, {}, "alice");
      ASSERT_TRUE(turn.Begin());
      EXPECT_EQ(store->EraseTenant("alice").status().code(), Code::kBusy);
      EXPECT_EQ(store->Lookup(*old_chain).total, tokens_.size());
    }
    EXPECT_FALSE(store->EraseTenant("carol").value());
    EXPECT_TRUE(store->EraseTenant("alice").value());
    store->CheckInvariants();
    EXPECT_EQ(store->Lookup(*old_chain).total, 0u);
    EXPECT_FALSE(store->EraseTenant("alice").value());
    EXPECT_EQ(Find(store.get(), "bob", longer).total, tokens_.size());

    // A chain made before the erase computes, and nothing of it is written.
    const uint64_t written = store->stats().ssd_bytes_written;
    auto begun = store->Begin(old_chain, UINT32_MAX);
    ASSERT_TRUE(begun.ok());
    ASSERT_TRUE(begun.value()->Reserve(kBlock).ok());
    for (uint32_t layer = 0; layer < TinyLayout().num_layers; ++layer) {
      begun.value()->LayerDone(layer, kBlock);
    }
    begun.value()->Append(std::span(longer).first(kBlock));
    begun.value()->Commit();
    begun.value().reset();
    store->Flush();
    EXPECT_EQ(store->stats().ssd_bytes_written, written);
    store->CheckInvariants();

    // A new tenant of the same name begins with nothing, and works.
    EXPECT_EQ(Play(store.get(), "alice", tokens_).total, 0u);
    EXPECT_TRUE(store->EraseTenant("alice").value());
    ASSERT_TRUE(store->Close().ok());
    store.reset();
    store = MustOpenStore(Options(true, device));
    EXPECT_EQ(Find(store.get(), "alice", longer).total, 0u);
    EXPECT_EQ(Play(store.get(), "bob", longer).total, tokens_.size());
    EXPECT_EQ(store->stats().failed_loads, 0u);
  }
}

TEST_F(StoreEncryptTest, BlocksOfATenantErasedWhileClosedTakeNoPlace) {
  {
    auto store = MustOpenStore(Options());
    Play(store.get(), "alice", tokens_);
    Play(store.get(), "bob", tokens_);
    ASSERT_TRUE(store->Close().ok());
  }
  ASSERT_TRUE(EraseTenant(dir_ / "kv", dir_ / "key", "alice").value());
  auto store = MustOpenStore(Options());
  store->CheckInvariants();
  EXPECT_EQ(store->stats().tiers[static_cast<int>(Tier::kSsd)].used_slots, 5u);
  EXPECT_EQ(Find(store.get(), "alice", tokens_ + tokens_).total, 0u);
  EXPECT_EQ(Find(store.get(), "bob", tokens_ + tokens_).total, tokens_.size());
}

TEST_F(StoreEncryptTest, APlainStoreErasesNobody) {
  auto store = MustOpenStore(Options(false));
  EXPECT_EQ(store->EraseTenant("alice").status().code(), Code::kInvalidArgument);
  EXPECT_EQ(MustOpenStore(TinyOptions({16}))->EraseTenant("alice").status().code(),
            Code::kInvalidArgument);
}

}  // namespace
}  // namespace cachedattn
