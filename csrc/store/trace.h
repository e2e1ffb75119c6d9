// Trace: timed events of the movers and of the sequences, for tests and charts. Off by default.
#pragma once

#include <vector>

#include "csrc/store/attention_store.h"

namespace cachedattn {

class Trace {
 public:
  explicit Trace(const Clock* clock) : clock_(clock) {}

  static constexpr size_t kMaxEvents = 1 << 20;  // later ones are lost

  void Enable(bool on) {
    on_ = on;
    events_.clear();
    if (on) events_.reserve(kMaxEvents);  // Add takes no memory
  }
  std::vector<TraceEvent> Take() {
    std::vector<TraceEvent> taken(events_);
    events_.clear();
    return taken;
  }

  void Add(TraceKind kind, uint64_t sequence, uint32_t first_layer, uint32_t num_layers,
           SlotId slot) {
    if (!on_ || events_.size() >= kMaxEvents) return;
    events_.push_back({.time_ns = clock_->NowNs(),
                       .kind = kind,
                       .sequence = sequence,
                       .first_layer = first_layer,
                       .num_layers = num_layers,
                       .slot = slot});
  }

 private:
  const Clock* const clock_;
  bool on_ = false;
  std::vector<TraceEvent> events_;
};

}  // namespace cachedattn
