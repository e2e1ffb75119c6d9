// The states of a copy, who may change them, and which of a conversation's copies goes first.
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
  BlockRef Insert(uint8_t number, uint32_t num_tokens = kBlockSize, uint8_t parent = 0) {
    return directory_.Insert(tenant_, Key(number), Key(parent), num_tokens, parent,
                             /*follows=*/parent != 0, conversation_);
  }
  BlockRef InsertReady(uint8_t number, Tier tier = Tier::kDram, uint32_t num_tokens = kBlockSize) {
    BlockRef block = Insert(number, num_tokens);
    directory_.FinishFill(directory_.BeginFill(block, tier, slots_.Take()));
    return block;
  }
  void Fill(const BlockRef& block, Tier tier = Tier::kDram) {
    directory_.FinishFill(directory_.BeginFill(block, tier, slots_.Take()));
  }
  // Blocks `first` to `last`, each after the one before it.
  std::vector<BlockRef> InsertChain(uint8_t first, uint8_t last, uint8_t parent = 0) {
    std::vector<BlockRef> blocks;
    for (uint8_t number = first; number <= last; parent = number++) {
      blocks.push_back(Insert(number, kBlockSize, parent));
      Fill(blocks.back());
    }
    return blocks;
  }
  Block* Last(Tier tier = Tier::kDram) const { return directory_.Last(conversation_, tier); }
  void Check() {
    std::vector<SlotId> places[kNumTiers];
    directory_.CheckInvariants(&places);
  }

  SlotPool slots_{8}, many_slots_{200};
  const std::unique_ptr<Policy> policy_ = Policy::Make({}, &SystemClock());
  Directory directory_{kBlockSize, policy_.get()};
  const uint32_t tenant_ = directory_.TenantIndex(TenantIdOf("t"));
  const Conversation conversation_ = policy_->Hold(1, tenant_);
};
using DirectoryDeathTest = DirectoryTest;

TEST_F(DirectoryTest, ACopyGoesFromAbsentToReadyAndBack) {
  const BlockRef block = Insert(1);
  EXPECT_FALSE(block->resident(true));
  Transfer transfer = directory_.BeginFill(block, Tier::kDram, slots_.Take());
  EXPECT_EQ(block->copy(Tier::kDram).state, CopyState::kFilling);
  EXPECT_FALSE(block->resident(true));
  EXPECT_EQ(Last(), nullptr);
  Check();
  directory_.FinishFill(std::move(transfer));
  EXPECT_TRUE(block->resident(true));
  EXPECT_EQ(Last(), block.get());
  EXPECT_EQ(directory_.num_idle(Tier::kDram), 1u);
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
    EXPECT_EQ(Last(), nullptr);
    EXPECT_EQ(directory_.num_pinned(Tier::kDram), 1u);
    a.Release();
    EXPECT_EQ(Last(), nullptr);
    BlockPin c = std::move(b);
    Check();
  }
  EXPECT_EQ(Last(), block.get());
  EXPECT_EQ(directory_.num_idle(Tier::kDram), 1u);
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

TEST_F(DirectoryTest, AConversationLosesItsLastBlockFirst) {
  const std::vector<BlockRef> chain = InsertChain(1, 4);
  for (int i = 3; i >= 0; --i) {
    ASSERT_EQ(Last(), chain[i].get());
    EXPECT_EQ(policy_->Victim(Tier::kDram), conversation_);
    EXPECT_EQ(policy_->Victim(Tier::kSsd), kNoConversation);
    directory_.Drop(Last(), Tier::kDram);
    Check();
  }
  EXPECT_EQ(Last(), nullptr);
  EXPECT_EQ(policy_->Victim(Tier::kDram), kNoConversation);
}

TEST_F(DirectoryTest, WhatIsFollowedStaysWhateverItsFollowerDoes) {
  const std::vector<BlockRef> chain = InsertChain(1, 2);
  const BlockRef next = Insert(3, kBlockSize, 2);
  Transfer transfer = directory_.BeginFill(next, Tier::kDram, slots_.Take());
  EXPECT_EQ(Last(), nullptr) << "one that is on its way counts";
  Check();
  directory_.FinishFill(std::move(transfer));
  {
    const BlockPin pin = directory_.Pin(next, Tier::kDram);
    EXPECT_EQ(Last(), nullptr);
    Check();
  }
  EXPECT_EQ(Last(), next.get());
  Fill(chain[0], Tier::kSsd);
  Fill(next, Tier::kSsd);
  EXPECT_EQ(Last(Tier::kSsd), chain[0].get()) << "tiers are looked at apart";
  Check();
}

TEST_F(DirectoryTest, ASharedBlockGoesAfterAllThatFollowIt) {
  const std::vector<BlockRef> shared = InsertChain(1, 1);
  const Conversation other = policy_->Hold(2, tenant_);
  const std::vector<BlockRef> mine = InsertChain(2, 2, 1), theirs = InsertChain(3, 3, 1);
  directory_.SetOwner(theirs[0].get(), other);
  directory_.SetOwner(shared[0].get(), other);
  Check();
  EXPECT_EQ(directory_.Last(other, Tier::kDram), theirs[0].get());
  EXPECT_EQ(Last(), mine[0].get());
  directory_.Drop(theirs[0].get(), Tier::kDram);
  EXPECT_EQ(directory_.Last(other, Tier::kDram), nullptr);
  directory_.Drop(mine[0].get(), Tier::kDram);
  EXPECT_EQ(directory_.Last(other, Tier::kDram), shared[0].get());
  EXPECT_EQ(Last(), nullptr);
  Check();
}

TEST_F(DirectoryTest, AnAbandonedBranchGoesBeforeTheOneThatIsUsed) {
  (void)InsertChain(1, 2);
  const std::vector<BlockRef> branch = InsertChain(3, 4, 1);
  EXPECT_EQ(Last(), directory_.Find(Key(2)).get());
  directory_.Drop(Last(), Tier::kDram);
  EXPECT_EQ(Last(), branch[1].get());
  Check();
}

TEST_F(DirectoryTest, WhatACutHasDroppedFollowsNothing) {
  const std::vector<BlockRef> chain = InsertChain(1, 3);
  directory_.Detach(chain[2].get());
  directory_.Detach(chain[2].get());
  Check();
  directory_.Drop(chain[1].get(), Tier::kDram);
  Check();
  EXPECT_EQ(Last(), chain[0].get()) << "right after what has followed it";
}

TEST_F(DirectoryTest, FollowersOfABlockThatIsGoneCountWhenItIsBack) {
  const std::vector<BlockRef> chain = InsertChain(1, 3);
  directory_.Forget(chain[1].get());
  Check();
  EXPECT_EQ(Last(), chain[0].get());
  const BlockRef again = Insert(2, kBlockSize, 1);
  Fill(again);
  Check();
  EXPECT_EQ(again->copy(Tier::kDram).followers, 1u);
  directory_.Drop(chain[2].get(), Tier::kDram);
  EXPECT_EQ(again->copy(Tier::kDram).followers, 0u);
  Check();
}

TEST_F(DirectoryTest, WhatLeavesIsKeptApartAndHoldsNothingBack) {
  const std::vector<BlockRef> chain = InsertChain(1, 2);
  directory_.SetLeaving(chain[1].get(), Tier::kDram, true);
  EXPECT_EQ(Last(), chain[0].get());
  EXPECT_EQ(directory_.FirstLeaving(Tier::kDram), chain[1].get());
  EXPECT_EQ(directory_.num_leaving(Tier::kDram), 1u);
  EXPECT_EQ(directory_.num_idle(Tier::kDram), 1u);
  Check();
  {
    const BlockPin pin = directory_.Pin(chain[1], Tier::kDram);
    EXPECT_EQ(directory_.num_leaving(Tier::kDram), 0u);
    Check();
    directory_.SetLeaving(chain[1].get(), Tier::kDram, false);
    Check();
    EXPECT_EQ(Last(), nullptr);
  }
  EXPECT_EQ(Last(), chain[1].get());
  directory_.SetLeaving(chain[1].get(), Tier::kDram, true);
  directory_.Drop(chain[1].get(), Tier::kDram);
  EXPECT_EQ(directory_.num_leaving(Tier::kDram), 0u);
  Check();
}

TEST_F(DirectoryTest, TenantsHaveNumbers) {
  const uint32_t other = directory_.TenantIndex(TenantIdOf("other"));
  EXPECT_EQ(directory_.TenantIndex(TenantIdOf("t")), tenant_);
  EXPECT_EQ(directory_.FindTenant(TenantIdOf("nobody")), std::nullopt);
  EXPECT_EQ(directory_.tenant(other), TenantIdOf("other"));
}

// Random steps over a forest of blocks; the directory's own count of everything must hold.
TEST_F(DirectoryTest, AnyStepsKeepTheInvariants) {
  std::mt19937 random(7);
  std::vector<BlockRef> blocks(40);
  std::vector<BlockPin> pins;
  const Conversation other = policy_->Hold(2, tenant_);
  for (int step = 0; step < 20000; ++step) {
    const auto number = static_cast<uint8_t>(1 + random() % blocks.size());
    BlockRef& block = blocks[number - 1];
    block = directory_.Find(Key(number));
    const auto tier = static_cast<Tier>(random() % kNumTiers);
    if (block == nullptr) {
      block = Insert(number, kBlockSize, number / 3);
      directory_.FinishFill(directory_.BeginFill(block, tier, many_slots_.Take()));
    } else if (block->absent(tier)) {
      directory_.FinishFill(directory_.BeginFill(block, tier, many_slots_.Take()));
    }
    switch (random() % 6) {
      case 0:
        directory_.SetLeaving(block.get(), tier, random() % 2 == 0);
        break;
      case 1:
        directory_.SetOwner(block.get(), random() % 2 == 0 ? other : conversation_);
        break;
      case 2:
        pins.push_back(directory_.Pin(block, tier));
        break;
      case 3:
        pins.clear();
        break;
      case 4:
        if (random() % 8 == 0) directory_.Forget(block.get());
        break;
      default:
        if (block->copy(tier).pins == 0) directory_.Drop(block.get(), tier);
    }
    if (step % 10 == 0) Check();
  }
}

TEST_F(DirectoryTest, ALongerBlockReplacesUnusedTails) {
  const BlockRef used = InsertReady(1, Tier::kDram, 3), unused = InsertReady(2, Tier::kDram, 5);
  EXPECT_EQ(directory_.PartialLengths(Key(0)), (std::vector<uint32_t>{5, 3}));
  const BlockRef full = InsertReady(3);
  directory_.SetReplaced(full.get(), {Key(1), Key(2)});
  const BlockPin pin = directory_.Pin(used, Tier::kDram);
  directory_.DropReplaced(full.get(), true);
  EXPECT_NE(directory_.Find(Key(1)), nullptr);
  EXPECT_EQ(directory_.Find(Key(2)), nullptr);
  EXPECT_EQ(directory_.PartialLengths(Key(0)), (std::vector<uint32_t>{3}));
  Check();
}

// What a lookup tries does not grow with those who share a prompt and end soon after it.
TEST_F(DirectoryTest, ManyTailsHaveFewLengths) {
  std::vector<BlockRef> tails;
  for (uint8_t i = 1; i <= 6; ++i) tails.push_back(InsertReady(i, Tier::kDram, 1 + i % 3));
  EXPECT_EQ(directory_.PartialLengths(Key(0)), (std::vector<uint32_t>{3, 2, 1}));
  for (uint8_t i = 1; i <= 6; ++i) {
    if (i % 3 != 1) directory_.Drop(tails[i - 1].get(), Tier::kDram);
  }
  EXPECT_EQ(directory_.PartialLengths(Key(0)), (std::vector<uint32_t>{2}));
  EXPECT_TRUE(directory_.PartialLengths(Key(1)).empty());
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
