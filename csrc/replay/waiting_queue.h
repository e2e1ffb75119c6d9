// WaitingQueue: the chains of requests that have arrived and not begun.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "csrc/store/chain.h"

namespace cachedattn {

// Requests that wait, next to run first.
class WaitingQueue {
 public:
  void Join(std::shared_ptr<Chain> chain) { chains_.push_back(std::move(chain)); }
  // It is the first, or one of few before it that found no room.
  void Leave(const std::shared_ptr<Chain>& chain) {
    const auto first = chains_.begin() + static_cast<ptrdiff_t>(first_);
    const auto it = std::find(first, chains_.end(), chain);
    std::rotate(first, it, it + 1);
    chains_[first_].reset();
    if (++first_ < 1024 || 2 * first_ < chains_.size()) return;
    chains_.erase(chains_.begin(), chains_.begin() + first_);
    first_ = 0;
  }
  std::span<const std::shared_ptr<Chain>> waiting() const {
    return std::span(chains_).subspan(first_);
  }

 private:
  std::vector<std::shared_ptr<Chain>> chains_;
  size_t first_ = 0;
};

}  // namespace cachedattn
