#include "csrc/tier/slot_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <span>

#include "csrc/tier/memory_tier.h"

namespace cachedattn {
namespace {

TEST(SlotPoolTest, EachPlaceHasOneOwner) {
  SlotPool pool(3);
  std::set<SlotId> ids;
  std::vector<Slot> slots;
  for (int i = 0; i < 3; ++i) slots.push_back(pool.Take());
  for (const Slot& slot : slots) ids.insert(slot.id());
  EXPECT_EQ(ids, (std::set<SlotId>{0, 1, 2}));
  EXPECT_FALSE(pool.Take());
  slots.pop_back();
  EXPECT_EQ(pool.num_free(), 1u);
  EXPECT_TRUE(pool.Take());
}

TEST(SlotPoolTest, MovingASlotMovesTheRight) {
  SlotPool pool(2);
  Slot a = pool.Take();
  const SlotId id = a.id();
  Slot b = std::move(a);
  EXPECT_FALSE(a);  // NOLINT: what is tested
  EXPECT_EQ(b.id(), id);
  b = pool.Take();  // lets go of the first
  EXPECT_EQ(pool.num_free(), 1u);
  EXPECT_TRUE(pool.is_free(id));
}

TEST(SlotPoolTest, ChosenPlacesAreTakenOnce) {
  SlotPool pool(4);
  const Slot a = pool.TakeAt(2), b = pool.TakeAt(0);
  std::set<SlotId> rest;
  const Slot c = pool.Take(), d = pool.Take();
  EXPECT_EQ((std::set<SlotId>{c.id(), d.id()}), (std::set<SlotId>{1, 3}));
  EXPECT_FALSE(pool.Take());
}

TEST(MemoryTierTest, SlotsAreAlignedAndApart) {
  const KvLayout layout{2, 1, 16, 16, DType::kBFloat16};
  auto tier = MemoryTier::Open(Tier::kDram, 3 * layout.host_slot_bytes() + 100, layout);
  ASSERT_TRUE(tier.ok());
  MemoryTier& memory = *tier.value();
  EXPECT_EQ(memory.slots().capacity(), 3u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.slot(0)) % kPage, 0u);  // a small slab
  for (SlotId id = 0; id < 3; ++id) {
    EXPECT_EQ(memory.payload(id) - memory.slot(id), static_cast<int64_t>(kPage));
    std::memset(memory.slot(id), static_cast<int>(id) + 1, layout.host_slot_bytes());
  }
  for (SlotId id = 0; id < 3; ++id) {
    EXPECT_EQ(memory.slot(id)[layout.host_slot_bytes() - 1], std::byte(id + 1));
  }
  auto device = MemoryTier::Open(Tier::kDevice, layout.payload_bytes(), layout);
  ASSERT_TRUE(device.ok());
  EXPECT_EQ(device.value()->payload(0), device.value()->slot(0));
}

TEST(MemoryTierTest, AFreePlaceHoldsPoison) {
  const KvLayout layout{2, 1, 16, 16, DType::kBFloat16};
  auto tier = MemoryTier::Open(Tier::kDram, layout.host_slot_bytes(), layout, /*poison=*/true);
  ASSERT_TRUE(tier.ok());
  MemoryTier& memory = *tier.value();
  const auto is_poison = [&] {
    return std::ranges::all_of(std::span(memory.payload(0), layout.slice_bytes()),
                               [](std::byte b) { return b == std::byte{0xFF}; });
  };
  Slot slot = memory.slots().Take();
  EXPECT_TRUE(is_poison()) << "not yet written";
  std::memset(memory.slot(0), 1, layout.host_slot_bytes());
  slot.Release();
  EXPECT_TRUE(is_poison()) << "free again";
  EXPECT_EQ(memory.slot(0)[0], std::byte{1}) << "the header page is not K or V";
  memory.payload(0)[layout.slice_stride() + 3] = std::byte{0};
  EXPECT_DEATH((void)memory.slots().Take(), "IsPoison");
}

}  // namespace
}  // namespace cachedattn
