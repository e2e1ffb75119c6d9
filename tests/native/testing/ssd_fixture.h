// Small stores for the tests of the SSD tier.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "csrc/tier/ssd_format.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

// Three layers of 2560 bytes in slices of 4096, so that there is padding; a slot has 16 KiB.
inline KvLayout SmallLayout() { return {3, 1, 40, 16, DType::kBFloat16}; }

// Deadline where the disk is not what is tested: a shared one may be away for seconds.
constexpr int64_t kPatientUs = 60'000'000;

inline SsdOptions SmallStore(const std::string& directory, uint32_t num_slots = 8) {
  SsdOptions options;
  options.directory = directory;
  options.layout = SmallLayout();
  options.identity.bytes[0] = 17;
  options.model_name = "tiny";
  options.max_bytes = SsdFileBytes(options.layout, num_slots);
  options.io.depth = 4;
  options.io_deadline_us = kPatientUs;
  return options;
}

inline std::unique_ptr<SsdTier> MustOpen(const SsdOptions& options) {
  Result<std::unique_ptr<SsdTier>> tier = SsdTier::Open(options);
  if (!tier.ok()) {
    ADD_FAILURE() << tier.status().message();
    std::abort();
  }
  return std::move(tier.value());
}

inline BlockHeader HeaderOfBlock(uint32_t number, uint64_t generation = 1) {
  const TokenId token = static_cast<TokenId>(number);
  const BlockKey root = RootKey({}, "");
  return {ChildKey(root, {}, std::span(&token, 1)),
          root,
          {1, 2, 3},
          number % 16 + 1,
          number,
          generation};
}

// A page-aligned host slot.
class HostSlot {
 public:
  explicit HostSlot(const KvLayout& layout = SmallLayout())
      : size_(layout.host_slot_bytes()),
        data_(static_cast<std::byte*>(std::aligned_alloc(kPage, size_)), &std::free) {
    std::memset(data_.get(), 0, size_);
  }
  // Fills every slice with the block's own noise; the padding stays zero.
  HostSlot& Fill(const KvLayout& layout, uint32_t seed) {
    std::mt19937 random(seed);
    for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
      std::byte* slice = data() + layout.host_slice_offset(layer);
      for (uint64_t i = 0; i < layout.slice_bytes(); ++i) {
        slice[i] = static_cast<std::byte>(random());
      }
    }
    return *this;
  }
  std::byte* data() { return data_.get(); }
  uint64_t size() const { return size_; }
  bool SamePayload(HostSlot& other) {
    return std::memcmp(data() + kPage, other.data() + kPage, size_ - kPage) == 0;
  }

 private:
  uint64_t size_;
  std::unique_ptr<std::byte, void (*)(void*)> data_;
};

// Polls until nothing is in flight.
inline std::vector<SsdCompletion> Drain(SsdTier* tier) {
  std::vector<SsdCompletion> finished;
  while (tier->in_flight() > 0) tier->Poll(&finished, 100'000);
  return finished;
}

inline Status WriteBlock(SsdTier* tier, SlotId slot, uint32_t number, uint64_t generation = 1) {
  HostSlot host;
  host.Fill(SmallLayout(), number);
  tier->StartWrite(slot, HeaderOfBlock(number, generation), false, host.data(), 1);
  return Drain(tier).at(0).status;
}

// Reads a whole block in one piece and compares its bytes.
inline Status ReadBlock(SsdTier* tier, SlotId slot, uint32_t number, uint64_t generation = 1) {
  HostSlot host, expected;
  expected.Fill(SmallLayout(), number);
  tier->StartRead(slot, HeaderOfBlock(number, generation), 0, SmallLayout().num_layers, host.data(),
                  2);
  Status status = Drain(tier).at(0).status;
  if (status.ok()) {
    EXPECT_TRUE(host.SamePayload(expected));
  }
  return status;
}

inline std::vector<SlotId> SlotsOf(const std::vector<SlotDamage>& damaged) {
  std::vector<SlotId> slots;
  for (const SlotDamage& damage : damaged) slots.push_back(damage.slot);
  return slots;
}

inline std::string BlocksFile(const std::string& directory) { return directory + "/blocks"; }

inline uint64_t SlotOffset(SlotId slot) {
  return kFirstSlot + slot * SmallLayout().host_slot_bytes();
}

// The file's bytes, behind the store's back.
template <typename T>
T ReadRaw(const std::string& file, uint64_t offset) {
  T value;
  std::ifstream in(file, std::ios::binary);
  in.seekg(static_cast<std::streamoff>(offset));
  in.read(reinterpret_cast<char*>(&value), sizeof(value));
  EXPECT_TRUE(in.good());
  return value;
}

template <typename T>
void WriteRaw(const std::string& file, uint64_t offset, const T& value) {
  std::fstream out(file, std::ios::binary | std::ios::in | std::ios::out);
  out.seekp(static_cast<std::streamoff>(offset));
  out.write(reinterpret_cast<const char*>(&value), sizeof(value));
  EXPECT_TRUE(out.flush().good());
}

inline void FlipByte(const std::string& file, uint64_t offset) {
  WriteRaw<uint8_t>(file, offset, ReadRaw<uint8_t>(file, offset) ^ 0x40);
}

}  // namespace cachedattn
