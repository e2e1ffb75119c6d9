#include "csrc/store/block_table.h"

#include <algorithm>
#include <utility>

namespace cachedattn {

void BlockTable::Reserve(size_t num_blocks) {
  if (num_blocks > capacity()) Resize((num_blocks + 1) / 2 * 3);
}

const BlockRef* BlockTable::Find(const BlockKey& key) const {
  if (places_.empty()) return nullptr;
  const uint64_t hash = HashOf(key);
  for (size_t i = Home(hash); places_[i].block != nullptr; i = Next(i)) {
    if (places_[i].hash == hash && places_[i].block->key == key) return &places_[i].block;
  }
  return nullptr;
}

void BlockTable::PrefetchBlock(uint64_t hash) const {
  if (places_.empty()) return;
  for (size_t i = Home(hash); places_[i].block != nullptr; i = Next(i)) {
    if (places_[i].hash != hash) continue;
    const auto* bytes = reinterpret_cast<const std::byte*>(places_[i].block.get());
    for (size_t line = 0; line < sizeof(Block); line += 64) __builtin_prefetch(bytes + line);
    return;
  }
}

void BlockTable::Insert(BlockRef block) {
  CA_CHECK(Find(block->key) == nullptr);
  if (size_ == capacity()) Resize(std::max<size_t>(48, 2 * places_.size()));
  const uint64_t hash = HashOf(block->key);
  size_t i = Home(hash);
  while (places_[i].block != nullptr) i = Next(i);
  places_[i] = {hash, std::move(block)};
  ++size_;
}

void BlockTable::Erase(const BlockKey& key) {
  const uint64_t hash = HashOf(key);
  size_t hole = Home(hash);
  for (;; hole = Next(hole)) {
    CA_CHECK(places_[hole].block != nullptr);
    if (places_[hole].hash == hash && places_[hole].block->key == key) break;
  }
  const BlockRef erased = std::move(places_[hole].block);  // `key` may be its own
  --size_;
  // Whatever a search would not find behind the hole any more moves into it.
  for (size_t i = Next(hole); places_[i].block != nullptr; i = Next(i)) {
    if (Distance(Home(places_[i].hash), i) < Distance(hole, i)) continue;
    places_[hole] = std::move(places_[i]);
    hole = i;
  }
}

void BlockTable::Resize(size_t num_places) {
  std::vector<Place> before(num_places);
  before.swap(places_);
  for (Place& place : before) {
    if (place.block == nullptr) continue;
    size_t i = Home(place.hash);
    while (places_[i].block != nullptr) i = Next(i);
    places_[i] = std::move(place);
  }
}

}  // namespace cachedattn
