#include "csrc/copy/pinner.h"

#include <algorithm>

namespace cachedattn {

namespace {

constexpr uint64_t kPartBytes = 256 << 20;  // a tenth of a second or so, mostly of taking pages

}  // namespace

Pinner::Pinner(Gpu* gpu, std::span<std::byte> slab, uint64_t slot_bytes)
    : gpu_(gpu),
      slab_(slab),
      part_bytes_(std::max<uint64_t>(kPartBytes / slot_bytes, 1) * slot_bytes),
      thread_([this] { Run(); }) {}

Pinner::~Pinner() {
  stopping_ = true;
  thread_.join();
  for (uint64_t first = 0; first < pinned_bytes_; first += part_bytes_) gpu_->Unpin(Part(first));
}

std::string Pinner::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

std::span<std::byte> Pinner::Part(uint64_t first) const {
  return slab_.subspan(first, std::min(part_bytes_, slab_.size() - first));
}

void Pinner::Run() {
  while (!stopping_ && pinned_bytes_ < slab_.size()) {
    const std::span<std::byte> part = Part(pinned_bytes_);
    if (Status status = gpu_->Pin(part); !status.ok()) {
      const std::lock_guard lock(mutex_);
      failure_ = status.message();
      return;
    }
    pinned_bytes_ += part.size();
  }
}

}  // namespace cachedattn
