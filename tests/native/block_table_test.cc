// The table of listed blocks against std::map, with keys that meet on purpose.
#include "csrc/store/block_table.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

namespace cachedattn {
namespace {

// Of so few hashes, in all parts of the table, that most keys are not where they belong.
BlockKey Key(uint32_t number) {
  BlockKey key;
  const uint64_t hash = number % 24 * (UINT64_MAX / 23);
  std::memcpy(key.bytes.data(), &hash, sizeof hash);
  std::memcpy(key.bytes.data() + sizeof hash, &number, sizeof number);
  return key;
}

BlockRef NewBlock(uint32_t number) {
  auto block = std::make_shared<Block>();
  block->key = Key(number);
  return block;
}

class BlockTableTest : public ::testing::Test {
 protected:
  void Check() {
    ASSERT_EQ(table_.size(), model_.size());
    size_t visited = 0;
    table_.ForEach([&](const Block& block) {
      ++visited;
      EXPECT_EQ(model_.count(block.depth), 1u);
    });
    EXPECT_EQ(visited, model_.size());
    std::vector<BlockKey> keys;
    for (uint32_t number = 0; number < kNumbers; ++number) keys.push_back(Key(number));
    uint32_t next = 0;
    table_.FindEach(keys, [&](size_t i, const BlockRef* block) {
      EXPECT_EQ(i, next++);
      const auto it = model_.find(static_cast<uint32_t>(i));
      EXPECT_EQ(block == nullptr, it == model_.end());
      EXPECT_EQ(block, table_.Find(keys[i]));
      if (block != nullptr && it != model_.end()) {
        EXPECT_EQ(*block, it->second);
      }
      return true;
    });
    EXPECT_EQ(next, kNumbers);
  }

  static constexpr uint32_t kNumbers = 200;
  BlockTable table_;
  std::map<uint32_t, BlockRef> model_;
};

TEST_F(BlockTableTest, HoldsWhatAMapHolds) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  Check();
  for (int i = 0; i < 20000; ++i) {
    const uint32_t number = random() % kNumbers;
    const auto it = model_.find(number);
    const BlockRef* const found = table_.Find(Key(number));
    ASSERT_EQ(found == nullptr, it == model_.end());
    if (it == model_.end()) {
      BlockRef block = NewBlock(number);
      block->depth = number;
      model_.emplace(number, block);
      table_.Insert(std::move(block));
    } else {
      const BlockRef block = it->second;
      model_.erase(it);
      table_.Erase(block->key);
      EXPECT_EQ(block.use_count(), 1) << "the table lets go of it";
    }
    if (i % 64 == 0) Check();
    if (HasFailure()) return;
  }
}

TEST_F(BlockTableTest, ReserveKeepsWhatIsThereAndAllocatesAhead) {
  for (uint32_t number = 0; number < 50; ++number) {
    model_[number] = NewBlock(number);
    model_[number]->depth = number;
    table_.Insert(model_[number]);
  }
  table_.Reserve(1001);
  const size_t capacity = table_.capacity();
  EXPECT_GE(capacity, 1001u);
  Check();
  for (uint32_t number = 50; number < 1001; ++number) table_.Insert(NewBlock(number));
  EXPECT_EQ(table_.capacity(), capacity);
  EXPECT_EQ(table_.size(), 1001u);
}

TEST_F(BlockTableTest, FindEachStopsWhenToldTo) {
  table_.Insert(NewBlock(3));
  const std::vector<BlockKey> keys = {Key(3), Key(4), Key(3)};
  std::vector<bool> found;
  table_.FindEach(keys, [&](size_t, const BlockRef* block) {
    found.push_back(block != nullptr);
    return block != nullptr;
  });
  EXPECT_EQ(found, (std::vector<bool>{true, false}));
}

}  // namespace
}  // namespace cachedattn
