// The states of a copy, who may change them, and in which order copies go.
#include "csrc/store/directory.h"

#include <gtest/gtest.h>

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
    return directory_.Insert(Key(number), Key(0), num_tokens, 0);
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
  Directory directory_{kBlockSize};
};
using DirectoryDeathTest = DirectoryTest;

TEST_F(DirectoryTest, ACopyGoesFromAbsentToReadyAndBack) {
  const BlockRef block = Insert(1);
  EXPECT_FALSE(block->resident());
  Transfer transfer = directory_.BeginFill(block, Tier::kDram, slots_.Take());
  EXPECT_EQ(block->copy(Tier::kDram).state, CopyState::kFilling);
  EXPECT_FALSE(block->resident());
  EXPECT_TRUE(directory_.evictable(Tier::kDram).empty());
  Check();
  directory_.FinishFill(std::move(transfer));
  EXPECT_TRUE(block->resident());
  EXPECT_EQ(directory_.evictable(Tier::kDram).size(), 1u);
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
    EXPECT_TRUE(directory_.evictable(Tier::kDram).empty());
    EXPECT_EQ(directory_.num_pinned(Tier::kDram), 1u);
    a.Release();
    EXPECT_TRUE(directory_.evictable(Tier::kDram).empty());
    BlockPin c = std::move(b);
    Check();
  }
  EXPECT_EQ(directory_.evictable(Tier::kDram).size(), 1u);
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
  const BlockRef a = InsertReady(1), b = InsertReady(2), c = InsertReady(3);
  directory_.SetRank(a.get(), {2, 0});
  directory_.SetRank(b.get(), {1, 5});
  directory_.SetRank(c.get(), {1, 4});
  std::vector<Block*> order;
  for (const auto& ranked : directory_.evictable(Tier::kDram)) order.push_back(ranked.block);
  EXPECT_EQ(order, (std::vector<Block*>{c.get(), b.get(), a.get()}));
  Check();
}

TEST_F(DirectoryTest, ALongerBlockReplacesUnusedTails) {
  const BlockRef used = InsertReady(1, Tier::kDram, 3), unused = InsertReady(2, Tier::kDram, 5);
  EXPECT_EQ(directory_.partials(Key(0)).size(), 2u);
  const BlockRef full = InsertReady(3);
  full->replaces = {Key(1), Key(2)};
  const BlockPin pin = directory_.Pin(used, Tier::kDram);
  directory_.DropReplaced(full.get());
  EXPECT_NE(directory_.Find(Key(1)), nullptr);
  EXPECT_EQ(directory_.Find(Key(2)), nullptr);
  EXPECT_EQ(directory_.partials(Key(0)).size(), 1u);
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
