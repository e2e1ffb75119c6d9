// A store of four slots, made by the real writer, for the fuzz targets to damage.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "csrc/tier/ssd_file.h"
#include "tests/fuzz/memory_file.h"

namespace cachedattn {

// Reads an input front to back; behind its end there are zeros.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : rest_(data, size) {}
  bool empty() const { return rest_.empty(); }
  std::span<const uint8_t> Take(size_t count) {
    const auto taken = rest_.first(std::min(count, rest_.size()));
    rest_ = rest_.subspan(taken.size());
    return taken;
  }
  template <typename T>
  T Number() {
    T value{};
    const auto bytes = Take(sizeof(T));
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }

 private:
  std::span<const uint8_t> rest_;
};

// What a target does with one input; libFuzzer's entry is in mini_store.cc.
void FuzzOne(Input input);

constexpr uint32_t kMiniSlots = 4;

// Two layers of 32 bytes in slices of a page; a slot has three pages.
inline KvLayout MiniLayout() { return {2, 1, 2, 4, DType::kBFloat16}; }

SsdOptions MiniOptions(uint32_t num_slots = kMiniSlots);

// Blocks 0 to 2 in slots 0 to 2, a newer copy of block 0 in slot 3. `clean`: closed with an index.
const Image& MiniStore(bool clean);

// Opens the store in `image`, scans it, reads what it lists, writes a block, closes it and opens
// it again, as far as it lets itself be opened. Stops the process when a block that reads well was
// never written, or when a store that opens does not work.
void UseStore(Image* image, const SsdOptions& options);

// The superblock copy of the higher generation, whole or not.
const Superblock& NewerSuperblock(const Image& image);

// Make the checksums of what is in its place in the mini store right.
void SealSuperblocks(Image* image);
void SealHeaders(Image* image);
void SealIndex(Image* image);

}  // namespace cachedattn
