// The states of a copy, who may change them, and in which order copies go.
#include "csrc/store/directory.h"

#include <gtest/gtest.h>

#include <random>

namespace cachedattn {
namespace {

constexpr uint32_t kBlockSize = 16;

class DirectoryTest : public ::testing::Test {
 protected:
  static BlockKey Key(uint8_t number) {
    BlockKey key;
    key.bytes[0] = number;
    return key;
  }
  BlockRef Insert(uint8_t number, uint32_t num_tokens = kBlockSize) {
    return directory_.Insert(tenant_, Key(number), Key(0), num_tokens, 0);
  }
  BlockRef InsertReady(uint8_t number, Tier tier = Tier::kDram, uint32_t num_tokens = kBlockSize) {
    BlockRef block = Insert(number, num_tokens);
    directory_.FinishFill(directory_.BeginFill(block, tier, slots_.Take()));
    return block;
  }
  void Check() {
    std::vector<SlotId> places[kNumTiers];
    directory_.CheckInvariants(&places);
  }

  SlotPool slots_{8};
  Directory directory_{kBlockSize, true};
  const uint32_t tenant_ = directory_.TenantIndex(TenantIdOf("t"));
};
using DirectoryDeathTest = DirectoryTest;

TEST_F(DirectoryTest, ACopyGoesFromAbsentToReadyAndBack) {
  const BlockRef block = Insert(1);
  EXPECT_FALSE(block->resident(true));
  Transfer transfer = directory_.BeginFill(block, Tier::kDram, slots_.Take());
  EXPECT_EQ(block->copy(Tier::kDram).state, CopyState::kFilling);
  EXPECT_FALSE(block->resident(true));
  EXPECT_EQ(directory_.saved(Tier::kDram).top(), nullptr);
  Check();
  directory_.FinishFill(std::move(transfer));
  EXPECT_TRUE(block->resident(true));
  EXPECT_EQ(directory_.saved(Tier::kDram).size(), 1u);
  Check();
  directory_.Drop(block.get(), Tier::kDram);
  EXPECT_EQ(directory_.Find(Key(1)), nullptr) << "no copy is left";
  EXPECT_EQ(slots_.num_free(), 8u);
  Check();
}

TEST_F(DirectoryTest, AnAbortedFillGivesItsSlotBack) {
  const BlockRef block = InsertReady(1);
  Slot slot = directory_.AbortFill(directory_.BeginFill(block, Tier::kSsd, slots_.Take()));
  EXPECT_TRUE(slot);
  EXPECT_TRUE(block->absent(Tier::kSsd));
  EXPECT_NE(directory_.Find(Key(1)), nullptr);
  Check();
}

TEST_F(DirectoryTest, APinKeepsACopyFromGoing) {
  const BlockRef block = InsertReady(1);
  {
    BlockPin a = directory_.Pin(block, Tier::kDram);
    BlockPin b = directory_.Pin(block, Tier::kDram);
    EXPECT_EQ(directory_.saved(Tier::kDram).top(), nullptr);
    EXPECT_EQ(directory_.num_pinned(Tier::kDram), 1u);
    a.Release();
    EXPECT_EQ(directory_.saved(Tier::kDram).top(), nullptr);
    BlockPin c = std::move(b);
    Check();
  }
  EXPECT_EQ(directory_.saved(Tier::kDram).size(), 1u);
  EXPECT_EQ(directory_.num_pinned(Tier::kDram), 0u);
}

TEST_F(DirectoryTest, AForgottenBlockHoldsItsSlotsWhileInUse) {
  BlockRef block = InsertReady(1);
  BlockPin pin = directory_.Pin(block, Tier::kDram);
  directory_.Forget(block.get());
  EXPECT_EQ(directory_.Find(Key(1)), nullptr);
  Check();
  block.reset();
  EXPECT_EQ(slots_.num_free(), 7u);
  const BlockRef again = InsertReady(1);  // the key is free again
  Check();
  pin.Release();
  EXPECT_EQ(slots_.num_free(), 7u);
  EXPECT_EQ(directory_.Find(Key(1)), again);
  Check();
}

TEST_F(DirectoryTest, EvictableCopiesAreInTheOrderOfRank) {
  const BlockRef a = InsertReady(1), b = InsertReady(2), c = InsertReady(3), d = InsertReady(4);
  a->stamp = 2;
  c->depth = 9;  // before b, of the same stamp
  d->queue_position = 7;
  const auto order = [&] { return directory_.saved(Tier::kDram).Lowest(9); };
  for (const BlockRef& block : {a, b, c, d}) directory_.Rerank(block.get());
  EXPECT_EQ(order(), (std::vector<Block*>{c.get(), b.get(), a.get(), d.get()}));
  a->queue_position = 6;  // nearer to the head
  b->stamp = 3;
  d->queue_position = kNotQueued;
  for (const BlockRef& block : {a, b, c, d}) directory_.Rerank(block.get());
  EXPECT_EQ(order(), (std::vector<Block*>{c.get(), d.get(), b.get(), a.get()}));
  Check();
}

TEST_F(DirectoryTest, UnsavedCopiesAreKeptApart) {
  const BlockRef a = InsertReady(1), b = InsertReady(2);
  directory_.SetUnsaved(a.get(), Tier::kDram, true);
  EXPECT_EQ(directory_.saved(Tier::kDram).top(), b.get());
  EXPECT_EQ(directory_.unsaved(Tier::kDram).top(), a.get());
  Check();
  {
    const BlockPin pin = directory_.Pin(a, Tier::kDram);
    EXPECT_EQ(directory_.unsaved(Tier::kDram).top(), nullptr);
    directory_.SetUnsaved(a.get(), Tier::kDram, false);
    Check();
  }
  EXPECT_EQ(directory_.unsaved(Tier::kDram).top(), nullptr);
  EXPECT_EQ(directory_.saved(Tier::kDram).size(), 2u);
  directory_.SetUnsaved(a.get(), Tier::kDram, true);
  directory_.Drop(a.get(), Tier::kDram);
  EXPECT_EQ(directory_.unsaved(Tier::kDram).size(), 0u);
  Check();
}

TEST_F(DirectoryTest, EveryTenantHasAnOrderOfItsOwn) {
  const uint32_t other = directory_.TenantIndex(TenantIdOf("other"));
  EXPECT_EQ(directory_.TenantIndex(TenantIdOf("t")), tenant_);
  EXPECT_EQ(directory_.FindTenant(TenantIdOf("nobody")), std::nullopt);
  EXPECT_EQ(directory_.tenant(other), TenantIdOf("other"));
  const BlockRef a = InsertReady(1);
  const BlockRef b = directory_.Insert(other, Key(2), Key(0), kBlockSize, 0);
  directory_.FinishFill(directory_.BeginFill(b, Tier::kDram, slots_.Take()));
  a->stamp = 1;
  directory_.Rerank(a.get());
  EXPECT_EQ(directory_.saved(Tier::kDram).top(), b.get());
  EXPECT_EQ(directory_.saved(Tier::kDram, tenant_).top(), a.get());
  EXPECT_EQ(directory_.saved(Tier::kDram, other).top(), b.get());
  Check();
}

// Against a sorted list, for as many blocks as make several levels.
TEST(RankHeapTest, KeepsTheOrderThroughEveryChange) {
  std::mt19937 random(7);
  std::vector<Block> blocks(300);
  for (uint32_t i = 0; i < blocks.size(); ++i) blocks[i].depth = i;  // no two ranks are equal
  RankHeap heap(1);
  std::vector<Block*> inside;
  const auto by_rank = [](const Block* a, const Block* b) { return a->rank() < b->rank(); };
  for (int step = 0; step < 20000; ++step) {
    Block* block = &blocks[random() % blocks.size()];
    const auto it = std::ranges::find(inside, block);
    const uint64_t stamp = random() % 50;
    if (it == inside.end()) {
      block->stamp = stamp;
      heap.Push(block);
      inside.push_back(block);
    } else if (random() % 2 == 0) {
      block->stamp = stamp;
      heap.Rerank(block);
    } else {
      heap.Erase(block);
      inside.erase(it);
    }
    if (step % 10 != 0) continue;
    heap.CheckInvariants();
    std::ranges::sort(inside, by_rank);
    ASSERT_EQ(heap.Lowest(blocks.size()), inside);
    ASSERT_EQ(heap.top(), inside.empty() ? nullptr : inside[0]);
  }
}

TEST_F(DirectoryTest, ALongerBlockReplacesUnusedTails) {
  const BlockRef used = InsertReady(1, Tier::kDram, 3), unused = InsertReady(2, Tier::kDram, 5);
  EXPECT_EQ(std::ranges::distance(directory_.partials(Key(0))), 2);
  const BlockRef full = InsertReady(3);
  directory_.SetReplaced(full.get(), {Key(1), Key(2)});
  const BlockPin pin = directory_.Pin(used, Tier::kDram);
  directory_.DropReplaced(full.get());
  EXPECT_NE(directory_.Find(Key(1)), nullptr);
  EXPECT_EQ(directory_.Find(Key(2)), nullptr);
  EXPECT_EQ(std::ranges::distance(directory_.partials(Key(0))), 1);
  Check();
}

TEST_F(DirectoryDeathTest, WrongStepsAbort) {
  const BlockRef block = InsertReady(1);
  EXPECT_DEATH((void)directory_.BeginFill(block, Tier::kDram, slots_.Take()), "check failed");
  EXPECT_DEATH((void)directory_.Pin(block, Tier::kSsd), "check failed");
  const BlockPin pin = directory_.Pin(block, Tier::kDram);
  EXPECT_DEATH(directory_.Drop(block.get(), Tier::kDram), "check failed");
  EXPECT_DEATH((void)Insert(1), "check failed");
}

}  // namespace
}  // namespace cachedattn
