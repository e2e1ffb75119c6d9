// Pinner: makes a slab of host memory one that a GPU copies from and to without staging, part by
// part, on a thread of its own: the store serves meanwhile, with staged copies.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#include "csrc/copy/gpu.h"

namespace cachedattn {

class Pinner {
 public:
  // Slots of `slot_bytes` are pinned whole. `gpu` and `slab` outlive this.
  Pinner(Gpu* gpu, std::span<std::byte> slab, uint64_t slot_bytes);
  ~Pinner();  // stops after the part under way, and unpins
  Pinner(const Pinner&) = delete;
  Pinner& operator=(const Pinner&) = delete;

  uint64_t pinned_bytes() const { return pinned_bytes_; }  // from the front of the slab on
  // Why the rest stays as it is; empty while all goes well.
  std::string failure() const;

 private:
  void Run();
  std::span<std::byte> Part(uint64_t first) const;

  Gpu* const gpu_;
  const std::span<std::byte> slab_;
  const uint64_t part_bytes_;
  std::atomic<uint64_t> pinned_bytes_ = 0;
  std::atomic<bool> stopping_ = false;
  mutable std::mutex mutex_;
  std::string failure_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace cachedattn
