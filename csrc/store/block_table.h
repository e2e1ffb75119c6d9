// BlockTable: the listed blocks by key, with open addressing.
//
// Where to look follows from a key alone. So FindEach asks memory for the places of a whole
// history, and then for its blocks, before it looks at the first: in a store of a million blocks
// each is a miss of all caches, and to wait for them one by one is most of what a lookup takes.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "csrc/store/block.h"

namespace cachedattn {

class BlockTable {
 public:
  // Room for so many without an allocation.
  void Reserve(size_t num_blocks);
  size_t capacity() const { return places_.size() / 3 * 2; }  // at least a third stays empty
  size_t size() const { return size_; }

  // nullptr: not listed. Valid until the table changes.
  const BlockRef* Find(const BlockKey& key) const;
  // Calls visit(index, Find(key)) for one key after the other until that is false.
  void FindEach(std::span<const BlockKey> keys, const auto& visit) const {
    constexpr size_t kAhead = 16;  // enough for the misses that a core can have under way
    for (size_t i = 0; i < keys.size() + 2 * kAhead; ++i) {
      if (i < keys.size()) __builtin_prefetch(places_.data() + Home(HashOf(keys[i])));
      if (i >= kAhead && i - kAhead < keys.size()) PrefetchBlock(HashOf(keys[i - kAhead]));
      if (i >= 2 * kAhead && !visit(i - 2 * kAhead, Find(keys[i - 2 * kAhead]))) return;
    }
  }
  void ForEach(const auto& visit) const {
    for (const Place& place : places_) {
      if (place.block != nullptr) visit(*place.block);
    }
  }

  // REQUIRES: no block with this key. After std::bad_alloc the table is as it was.
  void Insert(BlockRef block);
  // REQUIRES: there is one.
  void Erase(const BlockKey& key);

 private:
  struct Place {
    uint64_t hash = 0;  // of the block's key: few other blocks have to be looked at
    BlockRef block;
  };

  static uint64_t HashOf(const BlockKey& key) { return DigestHash()(key); }
  // The first place to look at. In the order of hashes, whatever the number of places.
  size_t Home(uint64_t hash) const {
    return static_cast<size_t>((static_cast<unsigned __int128>(hash) * places_.size()) >> 64);
  }
  size_t Next(size_t place) const { return place + 1 == places_.size() ? 0 : place + 1; }
  // How far `place` is behind `home`.
  size_t Distance(size_t home, size_t place) const {
    return place >= home ? place - home : place + places_.size() - home;
  }
  void PrefetchBlock(uint64_t hash) const;
  void Resize(size_t num_places);

  std::vector<Place> places_;
  size_t size_ = 0;
};

}  // namespace cachedattn
