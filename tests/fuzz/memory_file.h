// MemoryFile: a BlockFile in memory whose engine does everything at once, on the caller's thread.
//
// The room between the superblock and the first slot is not kept: it reads as zeros.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/io/block_file.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {

// The bytes of a store: the pages in front, then, at kFirstSlot, the slots and the index.
struct Image {
  static constexpr uint64_t kFrontBytes = 3 * kPage;
  std::vector<std::byte> front = std::vector<std::byte>(kFrontBytes);
  std::vector<std::byte> slots;
  uint64_t size = 0;  // of the file

  void Resize(uint64_t bytes) {
    if (bytes < kFrontBytes)
      std::fill(front.begin() + static_cast<ptrdiff_t>(bytes), front.end(), std::byte{0});
    slots.resize(bytes > kFirstSlot ? bytes - kFirstSlot : 0);
    size = bytes;
  }
  // The kept bytes at `offset`, and how many of them lie in one piece there.
  std::pair<std::byte*, uint64_t> At(uint64_t offset) {
    if (offset < kFrontBytes) return {front.data() + offset, kFrontBytes - offset};
    if (offset < kFirstSlot) return {nullptr, kFirstSlot - offset};
    return {slots.data() + (offset - kFirstSlot), size - offset};
  }
};

class MemoryEngine : public IoEngine {
 public:
  MemoryEngine(Image* image, uint32_t depth) : image_(*image), depth_(depth) {}

  void Submit(const IoRequest& request) override {
    CA_CHECK(in_flight() < depth_);
    CA_CHECK(request.offset % kPage == 0 && request.size % kPage == 0);
    finished_.push_back({request.tag, request.op == IoOp::kSync ? 0 : Move(request)});
  }
  size_t Poll(std::span<IoCompletion> out, int64_t) override {
    const size_t count = std::min(out.size(), finished_.size());
    std::copy_n(finished_.begin(), count, out.begin());
    finished_.erase(finished_.begin(), finished_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }
  uint32_t depth() const override { return depth_; }
  uint32_t in_flight() const override { return static_cast<uint32_t>(finished_.size()); }
  const char* name() const override { return "memory"; }
  const std::string& why() const override { return name_; }

 private:
  int32_t Move(const IoRequest& request) {
    uint64_t done = 0;
    const uint64_t end = request.offset + request.size;
    if (request.op == IoOp::kWrite && end > image_.size) image_.Resize(end);
    while (done < request.size && request.offset + done < image_.size) {
      auto [bytes, count] = image_.At(request.offset + done);
      count = std::min({count, request.size - done, image_.size - request.offset - done});
      if (request.op == IoOp::kWrite) {
        CA_CHECK(bytes != nullptr);  // nothing writes between the front and the slots
        std::memcpy(bytes, request.data + done, count);
      } else if (bytes == nullptr) {
        std::memset(request.data + done, 0, count);
      } else {
        std::memcpy(request.data + done, bytes, count);
      }
      done += count;
    }
    return static_cast<int32_t>(done);
  }

  Image& image_;
  const uint32_t depth_;
  std::deque<IoCompletion> finished_;
  const std::string name_ = "memory";
};

class MemoryFile : public BlockFile {
 public:
  explicit MemoryFile(Image* image) : image_(*image) {}
  uint64_t size() const override { return image_.size; }
  Status Resize(uint64_t bytes) override {
    // A file never becomes longer than its opener's cap.
    CA_CHECK(bytes <= kFirstSlot + (1 << 20));
    image_.Resize(bytes);
    return Status();
  }
  Result<std::unique_ptr<IoEngine>> OpenEngine(const IoOptions& options) override {
    return std::unique_ptr<IoEngine>(std::make_unique<MemoryEngine>(&image_, options.depth));
  }
  const std::string& path() const override { return path_; }
  bool direct() const override { return true; }

 private:
  Image& image_;
  const std::string path_ = "memory";
};

}  // namespace cachedattn
