// Trace: timed events of the movers and of the sequences, for tests and charts. Off by default.
#pragma once

#include <ctime>
#include <utility>
#include <vector>

#include "csrc/store/attention_store.h"

namespace cachedattn {

class Trace {
 public:
  static constexpr size_t kMaxEvents = 1 << 20;  // later ones are lost

  void Enable(bool on) {
    on_ = on;
    events_.clear();
  }
  std::vector<TraceEvent> Take() { return std::exchange(events_, {}); }

  void Add(TraceKind kind, uint64_t sequence, uint32_t first_layer, uint32_t num_layers,
           SlotId slot) {
    if (!on_ || events_.size() >= kMaxEvents) return;
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    events_.push_back({.time_ns = now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec,
                       .kind = kind,
                       .sequence = sequence,
                       .first_layer = first_layer,
                       .num_layers = num_layers,
                       .slot = slot});
  }

 private:
  bool on_ = false;
  std::vector<TraceEvent> events_;
};

}  // namespace cachedattn
