// A store after fork: the child is told that it is not its own and changes nothing; the parent goes
// on with the I/O that was under way.
#include <fstream>
#include <iterator>
#include <random>

#include "tests/native/testing/child.h"
#include "tests/native/testing/ledger.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

std::string FileBytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// What a child may do with all that it has inherited; "" when every answer was right.
std::string UseAll(std::unique_ptr<AttentionStore> store, std::unique_ptr<Turn> turn) {
  const auto closed = [](const Status& status) {
    return status.code() == Code::kClosed &&
           status.message().find("open a store after the fork") != std::string::npos;
  };
  if (!closed(store->CheckUsable())) return "CheckUsable";
  auto chain = store->NewChain("t", {});
  chain->Append(MakeTokens(3 * kBlock, 1));
  if (!closed(store->Begin(chain, UINT32_MAX).status())) return "Begin";
  if (store->Lookup(*chain).total != 0) return "Lookup";
  const std::shared_ptr<Chain> waiting[] = {chain};
  store->SetQueue(waiting);
  store->Poll();
  store->Flush();
  store->DropTier(Tier::kDram);
  if (turn != nullptr) {
    Sequence* sequence = turn->sequence();
    if (!closed(sequence->Reserve(1))) return "Reserve";
    if (!closed(sequence->WaitLayer(0))) return "WaitLayer";
    sequence->LayerDone(0, 1);
    sequence->Append(MakeTokens(1, 5));
    sequence->Commit();
  }
  if (!closed(store->Close())) return "Close";
  turn.reset();
  store.reset();
  return "";
}

class StoreForkTest : public ::testing::TestWithParam<IoKind> {};
INSTANTIATE_TEST_SUITE_P(Auto, StoreForkTest, ::testing::Values(IoKind::kAuto));
INSTANTIATE_TEST_SUITE_P(Threads, StoreForkTest, ::testing::Values(IoKind::kThreads));

// The parent's turns go on through forks at random moments, with reads and writes under way.
TEST_P(StoreForkTest, TheParentGoesOn) {
  TempDir dir;
  StoreOptions options = TinyOptions({24, 64, 0}, dir / "kv");
  options.dram_reserve = 0.5;  // so that blocks are on their way to the disk at any time
  options.io = GetParam();
  auto store = MustOpenStore(options);
  Ledger ledger(options.identity);
  std::mt19937 random(1);
  uint32_t forks = 0, reading = 0, writing = 0;
  uint64_t reused = 0;
  while (forks < 100) {
    const Play play = ledger.Next(&random);
    const Tokens& tokens = ledger.Apply(play);
    if (random() % 4 == 0) store->DropTier(Tier::kDram);
    auto turn = std::make_unique<Turn>(store.get(), tokens, Ledger::TruncationOf(play.conversation),
                                       Ledger::kTenant);
    while (!turn->Begin()) ASSERT_TRUE(store->Drain());  // its own writes make the room
    for (int i = 0; i < 3 && store->stats().writes_in_flight == 0; ++i) store->Poll();
    if (turn->sequence()->loading() || store->stats().writes_in_flight > 0) {
      ++forks;
      reading += store->stats().reads_in_flight > 0;
      writing += store->stats().writes_in_flight > 0;
      const std::string answer =
          RunInChild([&] { return UseAll(std::move(store), std::move(turn)); });
      ASSERT_EQ(answer, "") << "fork " << forks;
    }
    reused += turn->cached().total;
    turn->Finish();
    store->CheckInvariants();
  }
  EXPECT_GT(reading, 0u);
  EXPECT_GT(writing, 0u);
  EXPECT_GT(reused, 0u);
  EXPECT_EQ(store->stats().failed_loads, 0u);
  EXPECT_EQ(store->stats().failed_saves, 0u);
  EXPECT_EQ(store->stats().checksum_failures, 0u);
  EXPECT_TRUE(store->Close().ok());
}

TEST_P(StoreForkTest, TheChildWritesNothing) {
  TempDir dir;
  StoreOptions options = TinyOptions({24, 64, 0}, dir / "kv");
  options.io = GetParam();
  auto store = MustOpenStore(options);
  PlayTurn(store.get(), MakeTokens(5 * kBlock + 3, 1));
  store->Flush();
  const std::string before = FileBytes(BlocksFile(options.path));
  EXPECT_CHILD_OK([&] { return UseAll(std::move(store), nullptr); });
  EXPECT_TRUE(FileBytes(BlocksFile(options.path)) == before);
  EXPECT_EQ(ReadSsdInfo(options.path).value().clean, false);
  EXPECT_TRUE(store->Close().ok());
  EXPECT_EQ(ReadSsdInfo(options.path).value().clean, true);
}

// A child may have a store of its own.
TEST_P(StoreForkTest, TheChildOpensItsOwn) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer ends a child that starts threads";
#endif
  TempDir dir;
  StoreOptions options = TinyOptions({24, 64, 0}, dir / "kv");
  options.io = GetParam();
  auto store = MustOpenStore(options);
  EXPECT_CHILD_OK([&]() -> std::string {
    const Status same = AttentionStore::Open(options).status();
    if (same.code() != Code::kBusy) return "the parent's: " + same.message();
    StoreOptions other = options;
    other.path = dir / "other";
    auto own = AttentionStore::Open(other);
    if (!own.ok()) return own.status().message();
    PlayTurn(own.value().get(), MakeTokens(3 * kBlock, 1));
    return ::testing::Test::HasFailure() ? "wrong" : own.value()->Close().message();
  });
}

}  // namespace
}  // namespace cachedattn
